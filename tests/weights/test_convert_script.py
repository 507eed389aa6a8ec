"""convert_weights.py at the root is ``chatpose convert``: the same options, the same errors in one line."""

import runpy
import sys
from pathlib import Path

import pytest

from chatpose_jax.cli import convert

SCRIPT = Path(__file__).resolve().parents[2] / "convert_weights.py"


def script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def test_a_missing_source_is_one_line(tmp_path, monkeypatch, capsys):
    assert script(monkeypatch, tmp_path / "nowhere", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "nowhere" in line


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (OSError(28, "No space left on device", "out"), 2, "error: out: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_faults_of_the_world_are_one_line(tmp_path, monkeypatch, capsys, fault, status, words):
    def fail(args):
        assert [args.path, args.out] == [str(tmp_path / "source"), str(tmp_path / "out")]
        raise fault

    monkeypatch.setattr(convert, "run", fail)
    assert script(monkeypatch, tmp_path / "source", tmp_path / "out") == status
    assert capsys.readouterr().err.strip() == words

"""``bench/on_gpu.sh``: a part that fails or hangs costs itself only; all parts run on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("on_gpu", ROOT / "bench" / "on_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_gpu", module)
    spec.loader.exec_module(module)
    return module


BODY = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
row = {"batch": 8, "what": "forward", "seconds": 0.002, "bound_seconds": 0.001}
path.write_text(json.dumps({"rows": [row]}))
if sys.argv[1] == "raise": raise RuntimeError("the card is gone")
if sys.argv[1] == "hang": time.sleep(600)
"""


def test_a_part_that_fails_costs_only_itself(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "part.py").write_text(BODY)
    monkeypatch.setattr(script, "BENCH", tmp_path)
    words = {name: ("part.py", name) for name in ("raise", "hang", "fine")}
    todo = [
        script.Part("raises", words["raise"], 60),
        script.Part("hangs", words["hang"], 3),
        script.Part("lacks", words["fine"], 60, ("no_such_package",)),
        script.Part("body", words["fine"], 60),
    ]
    monkeypatch.setattr(script, "parts", lambda preset: todo)
    assert script.main(["--preset", "small", "--platform", "cpu", "--out", str(tmp_path / "out")]) == 1
    report = json.loads((tmp_path / "out" / "on_gpu.json").read_text())
    said = {name: part["status"] for name, part in report["parts"].items()}
    assert said["raises"] == "failed with status 1" and said["hangs"].startswith("stopped after")
    assert said["lacks"] == "left out" and said["body"] == "ok"
    assert report["parts"]["hangs"]["result"]["rows"]  # what it measured before is kept
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| body, forward, 8 at a time: ms | 2.000 | – | 1.000 | 50 % |" in table
    assert "the card is gone" in table and "not installed here: no_such_package" in table
    assert "Traceback" in (tmp_path / "out" / "log.txt").read_text()
    assert "body, forward" in capsys.readouterr().out


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "bench" / "on_gpu.sh"), "--preset", "small", "--platform", "cpu", "--minutes", "30"]
    env = {**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": ""}
    done = subprocess.run([*command, "--out", str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "on_gpu.json").read_text())
    assert {part["status"] for part in report["parts"].values()} <= {"ok", "left out"}
    assert "decoding, batch 16: ms a token" in (tmp_path / "table.md").read_text()

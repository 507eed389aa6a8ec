"""The pose heads of docs/extending.md, followed from an empty folder: its files as they stand there, its commands in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import HeadConfig, preset
from chatpose_jax.models.heads import HEADS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()
SECTION = PAGE.split("## A pose head")[1].split("\n## ")[0]
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", SECTION, flags=re.S))
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", SECTION.replace("\\\n", ""), flags=re.S)
    for line in block.splitlines()
]
FEW = (
    "--rows 8 --set train.steps=3 --set train.eval_every=3 --set train.batch_size=8 "
    "--set data.sources.synthetic.train_size=48 --set data.sources.synthetic.val_size=48"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's files, and ``chatpose`` as an installation would have it."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/chatpose"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{ROOT}" exec "{sys.executable}" -m chatpose_jax.cli "$@"\n')
    script.chmod(0o755)
    return tmp_path


def run(folder: Path, command: str) -> str:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_page_has_two_heads_and_four_commands() -> None:
    assert list(FILES) == ["myheads.py", "tall.py"]
    assert [command.split()[2] for command in COMMANDS] == ["demo", "chat", "train", "chat"]


@pytest.mark.parametrize("name", ["myheads:Deep", "tall:WithShape"])
def test_a_head_of_the_page_fits_every_model(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(str(folder))
    options = (("hidden", 192),) if name == "myheads:Deep" else ()
    for size in ("tiny", "chatpose_13b"):
        params = abstract_params(preset(size).replace(head=HeadConfig(name, options)))
        assert len(params["pose_head"]) == (1 if name == "myheads:Deep" else 3)
    sys.modules.pop(name.split(":")[0])


def test_heads_in_the_box_stand_on_the_page_about_them() -> None:
    page = (ROOT / "docs/heads.md").read_text()
    for name in HEADS:
        assert f"\n## `{name}`" in page and f"\n| [`{name}`](#{name}) |" in page


@pytest.mark.slow
def test_the_head_of_the_page_trains_in_the_demo_and_answers(folder: Path) -> None:
    run(folder, f"{COMMANDS[0]} {FEW}")
    run(folder, f"{COMMANDS[1]} --force-pose")
    assert (folder / "answer-deep/turn-1-pose-1.glb").exists()


@pytest.mark.slow
def test_betas_of_the_page_are_learnt(folder: Path) -> None:
    run(folder, COMMANDS[2])
    tall, short = (
        json.loads(run(folder, COMMANDS[3].replace("tall person", f"{word} person"))) for word in ("tall", "short")
    )
    assert tall["poses"][0]["betas"][0] > 1 and short["poses"][0]["betas"][0] < -1

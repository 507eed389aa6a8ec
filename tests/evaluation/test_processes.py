"""Processes that know of each other share the questions, and write what one writes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.evaluation.given_systems"
WORDS = ["eval", "poses", "--data", f"{HERE}:rows", "--quiet", "--drawings", "1", "--system"]


def start(words):
    command = [sys.executable, "-m", "chatpose_jax.cli", *WORDS, *words]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def two(words):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    several = ["--coordinator", address, "--num-processes", "2", "--process-id"]
    running = [start([*words, *several, str(rank)]) for rank in range(2)]
    said = [process.communicate(timeout=300) for process in running]
    return [process.returncode for process in running], said


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    alone = start([f"{HERE}:Drawn", "--out", str(tmp_path / "one")])
    assert alone.wait(300) == 0
    codes, said = two([f"{HERE}:Drawn", "--out", str(tmp_path / "two")])
    assert codes == [0, 0], said
    assert "wrote" in said[0][0] and "wrote" not in said[1][0], "process 0 writes and speaks"
    one, both = (
        {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for out in (tmp_path / "one", tmp_path / "two")
    )
    assert one == both and "poses/rows/drawn/gallery.json" in one
    codes, said = two([f"{HERE}:Broken,name=broken", "--out", str(tmp_path / "two")])
    assert codes == [2, 2] and all("KeyError: 'left hip'" in err for _, err in said), "an error of one ends all"

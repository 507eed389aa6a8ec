"""The script that anyone can run, for three kills."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
    command = [
        sys.executable,
        ROOT / "bench" / "kill_and_resume.py",
        "--kills",
        3,
        "--seed",
        1,
        "--folder",
        tmp_path / "x",
    ]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills: " in done.stdout
    assert "every loss and the weights equal to the last bit" in done.stdout

"""The script that anyone can run, for three kills."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("place", [(), ("--bucket", "gs"), ("--bucket", "s3")], ids=" ".join)
def test_nothing_is_lost(tmp_path, place):
    if place:
        pytest.importorskip("moto" if "s3" in place else "gcp_storage_emulator")
    command = [
        sys.executable,
        ROOT / "bench" / "kill_and_resume.py",
        "--kills",
        3,
        "--seed",
        1,
        "--folder",
        tmp_path / "x",
        *place,
    ]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills: " in done.stdout
    assert "every loss and the weights equal to the last bit" in done.stdout

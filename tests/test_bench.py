"""The benches' scripts run: small presets, one pair, no figure looked at."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "lora_step"])
def test_the_small_preset_runs(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    out = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(ROOT / f"bench/{name}.py"),
        "--preset",
        "small",
        "--want",
        "1",
        "--tries",
        "1",
        "--patience",
        "0",
    ]
    result = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert out.stat().st_size > 100

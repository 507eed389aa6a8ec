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
if sys.argv[1] == "odd": path.write_text(json.dumps({"rows": [{"batch": 8}]}))
if sys.argv[1] == "hang":
    try: time.sleep(600)
    finally: print("ended in order", flush=True)
"""


def test_a_part_that_fails_costs_only_itself(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "part.py").write_text(BODY)
    monkeypatch.setattr(script, "BENCH", tmp_path)
    words = {name: ("part.py", name) for name in ("raise", "hang", "odd", "fine")}
    todo = [
        script.Part("decoding", words["odd"], 60),
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
    assert "| rows of body | cannot be made" not in table and "| decoding, batch 8: ms a token | – |" in table
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Traceback" in log and "ended in order" in log
    assert "body, forward" in capsys.readouterr().out


STEP = {"preset": "13b", "batch": 16, "length": 1024, "remat": "full", "bound_seconds": 1.6}
KEPT = {**STEP, "batch": 8, "remat": "dots", "bound_seconds": 0.5}


def measured(rate: float) -> dict[str, Any]:
    return {"tokens_per_second": rate, "mfu": rate / 2e4, "peak_bytes": 40 * 2**30, "first_step": 60.2}


def decoded(batch: int, seconds: float) -> dict[str, Any]:
    return {"batch": batch, "token_seconds": seconds, "bound_seconds": 0.008, "prefill_seconds": 0.1}


FOUND = {
    "card": {"bandwidth": 3e12, "makers_bandwidth": 3.35e12, "flops": 8e14, "makers_flops": 9.89e14, "flops_float32": 5e13},
    "tests": {"passed": 9, "failed": ["a"], "skipped": []},
    "step": {**STEP, "jax": measured(8000)},
    "step, torch": {**STEP, "torch": measured(5000)},
    "step, kept": {**KEPT, "jax": measured(9000)},
    "plan": {"plan": {"peak": 44 * 2**30}},
    "decoding": {"rows": [decoded(1, 0.01)]},
    "decoding, transformers": {"rows": [decoded(1, 0.03), decoded(16, 0.04)]},
    "decoding, int4": {"quantize": "int4", "rows": [decoded(1, 0.016)]},
    "body": {"rows": [{"what": "forward", "batch": 1024, "seconds": 4e-4, "bound_seconds": 2e-4}]},
}  # fmt: skip
TABLE = """
copies, TB/s | 3.00 | – | 3.35 | 90 %
bfloat16 products, TFLOP/s | 800.00 | – | 989.00 | 81 %
float32 products, TFLOP/s | 50.00 | – | – | –
tests | 9 passed, 1 failed, 0 skipped | – | – | a
LoRA step, 13b, 16 × 1024, remat full: tokens/s | 8,000 | 5,000 | 10,240 | 78 % · 1.60
LoRA step, 13b, 16 × 1024, remat full: LoRA-MFU, % | 40.0 | 25.0 | – | –
LoRA step, 13b, 16 × 1024, remat full: peak memory, GiB (bound: plan) | 40.00 | 40.00 | 44.00 | 91 %
LoRA step, 13b, 16 × 1024, remat full: first step, s | 60 | 60 | – | –
LoRA step, 13b, 8 × 1024, remat dots: tokens/s | 9,000 | 5,000 | 16,384 | 55 % · 1.80
LoRA step, 13b, 8 × 1024, remat dots: LoRA-MFU, % | 45.0 | 25.0 | – | –
LoRA step, 13b, 8 × 1024, remat dots: peak memory, GiB (bound: plan) | 40.00 | 40.00 | – | –
LoRA step, 13b, 8 × 1024, remat dots: first step, s | 60 | 60 | – | –
decoding, batch 1: ms a token | 10.00 | 30.00 | 8.00 | 80 % · 3.00
decoding, batch 1: prefill, ms | 100 | 100 | – | –
decoding, batch 16: ms a token | – | 40.00 | 8.00 | –
decoding, batch 16: prefill, ms | – | 100 | – | –
decoding, int4 base, batch 1: ms a token | 16.00 | 30.00 | 8.00 | 50 % · 1.88
decoding, int4 base, batch 1: prefill, ms | 100 | 100 | – | –
body, forward, 1024 at a time: ms | 0.400 | – | 0.200 | 50 %
"""


def test_the_table_of_a_card(script: Any) -> None:
    """What CPUs cannot show: shares of bounds, ratios, peaks of memory; and that rows stay where other parts gave nothing."""
    parts = {name: {"status": "ok", "result": result} for name, result in FOUND.items()}
    assert [" | ".join(row) for row in script.table(parts)] == TABLE.strip().splitlines()
    for name in FOUND:
        fewer = {**parts, name: {"status": "left out", "result": None, "error": "no time was left"}}
        rows = script.table(fewer)
        assert rows[-1] == (name, "left out", "–", "–", "no time was left")
        assert not any("cannot be made" in row for row in rows)
    assert any("remat dots: tokens/s" in row[0] for row in script.table({"step, kept": parts["step, kept"]}))
    odd = {**parts, "body": {"status": "ok", "result": {"rows": [{}]}}}
    assert script.table(odd)[-1][:2] == ("rows of body", "cannot be made")


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "bench" / "on_gpu.sh"), "--preset", "small", "--platform", "cpu", "--minutes", "30"]
    env = {**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": ""}
    done = subprocess.run([*command, "--out", str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "on_gpu.json").read_text())
    assert {part["status"] for part in report["parts"].values()} <= {"ok", "left out"}
    assert "decoding, batch 16: ms a token" in (tmp_path / "table.md").read_text()

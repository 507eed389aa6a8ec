"""Which dtype a processor computes in, by what Linux says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatpose_jax.models import arithmetic
from chatpose_jax.models.arithmetic import available_memory, fast_dtype

CPUINFO = "processor\t: 0\nmodel name\t: a processor\nflags\t\t: fpu avx2 {}\nbugs\t\t:\n\n"


@pytest.mark.parametrize(
    "flag, expected", [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx512f", "float32")]
)
def test_a_cpu_computes_in_bfloat16_only_if_it_multiplies_it(tmp_path: Path, flag: str, expected: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO.format(flag))
    assert fast_dtype("bfloat16", file) == expected
    assert fast_dtype("float32", file) == "float32" and fast_dtype("float16", file) == "float16"


def test_without_cpuinfo_a_cpu_computes_in_float32_and_memory_is_unknown(tmp_path: Path) -> None:
    assert fast_dtype("bfloat16", tmp_path / "none") == "float32"
    assert available_memory(tmp_path / "none") == 0
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert available_memory(tmp_path / "meminfo") == 2 << 20


def test_other_devices_keep_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "platform", lambda: "tpu")
    monkeypatch.setattr(arithmetic, "_multiplies_bfloat16", lambda cpuinfo: False)
    assert fast_dtype("bfloat16") == "bfloat16"

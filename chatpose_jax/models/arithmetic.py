"""Which dtype this machine computes fast in."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from chatpose_jax.models.config import DType
from chatpose_jax.models.sharding import platform

BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")
"""Flags of x86 processors that multiply bfloat16 numbers, as Linux names them."""


def fast_dtype(dtype: DType, cpuinfo: Path = Path("/proc/cpuinfo")) -> DType:
    """The dtype to compute in for a model of this dtype: float32 instead of bfloat16 on a CPU that cannot multiply bfloat16 numbers.

    There each product converts both operands first, and single tokens take twice as long as in float32 (docs/benchmarks.md). float32 holds every
    bfloat16 number exactly. All other devices and dtypes keep theirs.
    """
    if dtype == "bfloat16" and platform() == "cpu" and not _multiplies_bfloat16(cpuinfo):
        return "float32"
    return dtype


@functools.cache
def _multiplies_bfloat16(cpuinfo: Path) -> bool:
    """False also where the system does not tell."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not set(BFLOAT16_FLAGS).isdisjoint(flags[1].split())


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that processes of this machine can still take; 0 where the system does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0

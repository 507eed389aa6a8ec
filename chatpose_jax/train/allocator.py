"""Memory of a process that computes on CPU."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed for the next allocation; False where the C library is another one.

    XLA's CPU backend allocates the temporaries of a step anew at every step. Where the kernel takes them back in between, each of their pages is
    faulted in and zeroed again: for a small model that takes as long as half of the arithmetic (``docs/benchmarks.md``). The process keeps its peak.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # other C libraries; Windows has no CDLL(None)
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, LARGEST))

"""Memory of a process that computes on CPU."""

from __future__ import annotations

import ctypes
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed for the next allocation; False, and nothing done, where the C library is another one.

    XLA's CPU backend allocates the temporaries of a step anew at every step. Where the kernel takes them back in between, each of their pages is
    faulted in and zeroed again (``bench/page_faults.py``). The process keeps its peak.

    To be called before JAX starts a backend, whose threads would have arenas of their own: those give back whatever is larger than 64 MB.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # other C libraries; Windows has no CDLL(None)
        return False
    never = -1
    return bool(mallopt(M_ARENA_MAX, 1) and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, never))


def cpu_only() -> bool:
    """Whether JAX will compute on CPU, told without starting a backend: it was asked to, or has nothing else installed."""
    asked = (jax.config.jax_platforms or "").split(",")[0]  # type: ignore[attr-defined]
    return asked == "cpu" or not (asked or find_spec("libtpu") or entry_points(group="jax_plugins"))

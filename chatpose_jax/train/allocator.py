"""Memory allocation on CPU."""

from __future__ import annotations

import ctypes
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep freed memory for the next allocation. Returns False, and does nothing, with another C library.

    XLA's CPU backend allocates the temporaries of a step at every step. If freed memory goes back to the kernel in between, each page is faulted
    in and zeroed again (``bench/page_faults.py``). The process keeps the memory of its peak.

    Call it before JAX starts a backend. The backend's threads would otherwise have arenas of their own, which return blocks above 64 MB.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # other C libraries; Windows has no CDLL(None)
        return False
    never = -1
    return bool(mallopt(M_ARENA_MAX, 1) and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, never))


def cpu_only() -> bool:
    """Whether JAX will compute on CPU, by its settings or because no other platform is installed. Starts no backend."""
    asked = (jax.config.jax_platforms or "").split(",")[0]  # type: ignore[attr-defined]
    return asked == "cpu" or not (asked or find_spec("libtpu") or entry_points(group="jax_plugins"))

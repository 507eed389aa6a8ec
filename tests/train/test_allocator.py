"""Freed memory stays with the process, where the C library is glibc and JAX computes on CPU."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

import jax
import pytest

from chatpose_jax.train import allocator

PROGRAM = """
import ctypes, json, resource, sys
if sys.argv[1] == "keep":
    from chatpose_jax.train.allocator import keep_freed_memory
    assert keep_freed_memory()
from concurrent.futures import ThreadPoolExecutor

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]

def use():
    block = libc.malloc(100 << 20)
    ctypes.memset(block, 1, 100 << 20)
    libc.free(block)

with ThreadPoolExecutor(1) as pool:  # whose thread would have an arena of its own, which keeps no more than 64 MB
    pool.submit(use).result()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        pool.submit(use).result()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

end = libc.sbrk(0)
libc.free(libc.malloc(3 << 30))  # no page of it is touched
print(json.dumps({"faults": faults, "kept": libc.sbrk(0) - end}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_what_is_freed_is_kept_however_large() -> None:
    def measure(mode: str) -> dict[str, int]:
        return json.loads(
            subprocess.run([sys.executable, "-c", PROGRAM, mode], check=True, stdout=subprocess.PIPE).stdout
        )

    kept, given_back = measure("keep"), measure("default")
    assert kept["faults"] < 100 < given_back["faults"]
    assert given_back["kept"] == 0
    assert kept["kept"] > 2 << 30


@pytest.mark.parametrize(
    ("asked", "libtpu", "plugins", "expected"),
    [
        ("cpu", True, True, True),
        ("cpu,cuda", True, True, True),
        ("cuda,cpu", False, False, False),
        ("", False, False, True),
        (None, False, False, True),
        ("", True, False, False),
        (None, False, True, False),
    ],
)
def test_cpu_is_what_was_asked_for_or_all_there_is(
    asked: str | None, libtpu: bool, plugins: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(*_: Any, **__: Any) -> list[str]:
        return ["cuda"] if plugins else []

    monkeypatch.setattr(allocator, "find_spec", lambda name: name if libtpu else None)
    monkeypatch.setattr(allocator, "entry_points", found)
    before = jax.config.jax_platforms  # type: ignore[attr-defined]
    jax.config.update("jax_platforms", asked)
    try:
        assert allocator.cpu_only() is expected
    finally:
        jax.config.update("jax_platforms", before)

"""A cache of compiled programs on disk: the first step of a program that was compiled before takes seconds."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

from chatpose_jax.storage import is_bucket

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
LIMIT = 2 << 30
"""Size limit in bytes, for all processors together. The least recently used programs are removed first."""


def keep_compiled() -> Path | None:
    """Turns on JAX's compilation cache in the user's cache folder. Returns the folder, or None if nothing was changed.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder (empty: no cache), and ``JAX_ENABLE_COMPILATION_CACHE=0`` turns the cache off.

    Each kind of processor has its own folder, because home folders are shared between machines and a program for one CPU may crash on
    another. Cached programs are executed, so a folder that others may write to is not used. This is for runs of one process; the processes
    of a larger run must all find the same programs (see ``launch/``).
    """
    if VARIABLE in os.environ or jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    try:
        folder = cache_home() / "chatpose-jax" / "compiled" / processor()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
            raise PermissionError(0, "others may write there, and cached programs are executed", str(folder))
        prune(folder.parent, LIMIT)
    except (OSError, RuntimeError) as error:  # no home, no space, read-only
        print(f"compiled programs are not kept for the next run: {error} (set {VARIABLE})", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def no_other_caches() -> None:
    """Turns off what XLA itself would write into the folder of compiled programs if that is on a bucket: XLA knows disks only, and would make a local
    folder of the address.
    """
    if is_bucket(os.environ.get(VARIABLE, "")):
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def cache_home() -> Path:
    """``$XDG_CACHE_HOME``, which must be absolute to count, or ``~/.cache``."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A name for this machine's CPU as XLA's target: its architecture, model, instruction set and number of cores."""
    known = [platform.machine(), platform.processor(), str(os.cpu_count())]
    if hasattr(os, "sched_getaffinity"):
        known.append(str(len(os.sched_getaffinity(0))))
    if cpuinfo.is_file():
        names = ("model name", "flags", "Features", "CPU part")
        lines = (line.partition(":") for line in cpuinfo.read_text(errors="replace").splitlines())
        known += sorted({f"{name.strip()}:{value.strip()}" for name, _, value in lines if name.strip() in names})
    return f"{platform.machine()}-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}"


def prune(folder: Path, limit: int) -> None:
    """Removes files below ``folder``, least recently read first, until they take at most ``limit`` bytes."""
    found = sorted(
        (
            (max(stat.st_atime, stat.st_mtime), stat.st_size, file)
            for file in folder.rglob("*")
            if (stat := _stat(file))
        ),
        key=lambda entry: entry[0],
        reverse=True,
    )
    kept = 0
    for _, size, file in found:
        kept += size
        if kept > limit:
            file.unlink(missing_ok=True)


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat() if file.is_file() else None
    except FileNotFoundError:  # another run removed it
        return None

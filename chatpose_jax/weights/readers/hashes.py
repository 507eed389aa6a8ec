"""SHA-256 of files while they are read, lists of such sums, and pages let go behind the reader."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError

SUMS_FILE = "SHA256SUMS"


def sha256(path: Path, on_bytes: Callable[[int], Any] = lambda count: None) -> str:
    """Hex digest of a file, read in pieces of 8 MiB; ``on_bytes`` hears of each, before the next one is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 23):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def forget(path: Path, until: int = 0) -> None:
    """Lets go of the first ``until`` bytes of a file in the page cache (0: of all), where the system can be told so."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, until, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Trail:
    """How far a conversion has read its files, which it takes in the order of their paths. One who follows finds their
    pages in the cache, and lets go of them: they would otherwise take all memory that is free."""

    _STEP = 64 << 20

    def __init__(self) -> None:
        self._position = ("", 0)
        self._moved = threading.Condition()
        self._end = self._cut = False

    def has_read(self, file: str, offset: int) -> None:
        """A block at ``offset`` was read, and everything before it."""
        if (file, offset) > self._position:
            with self._moved:
                self._position = file, offset
                self._moved.notify_all()

    def finish(self) -> None:
        """Nothing more will be read."""
        with self._moved:
            self._end = True
            self._moved.notify_all()

    def cut(self) -> None:
        """Nobody needs what follows: it ends with CancelledError."""
        self._cut = True
        self.finish()

    def follow(self, path: Path) -> None:
        """Returns when a file has been read, its pages let go."""
        for offset in range(0, path.stat().st_size, self._STEP):
            self._wait(path, offset + self._STEP)
            forget(path, offset + self._STEP)
        forget(path)

    def sha256(self, path: Path) -> str:
        """The same, with the file's digest."""
        offset = forgotten = 0

        def go_on(count: int) -> None:
            nonlocal offset, forgotten
            offset += count
            self._wait(path, offset)
            if offset >= forgotten + self._STEP:
                forgotten = offset
                forget(path, offset)

        digest = sha256(path, go_on)
        forget(path)
        return digest

    def _wait(self, path: Path, offset: int) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._end or (str(path), offset) <= self._position)
        if self._cut:
            raise concurrent.futures.CancelledError


def read_sums(path: Path) -> dict[str, str]:
    """File names and SHA-256 digests of a list in the format of ``sha256sum``; raises UserError for anything else.

    A name that is listed in a folder counts where it is not listed by itself.
    """
    sums: dict[str, str] = {}
    in_folders: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as a list of SHA-256 sums ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64})[ \t]+\*?(.+)", line.rstrip())
        if match is None:
            raise UserError(f"{path}, line {number}: expected 64 hex digits and a file name, as sha256sum writes them")
        file = Path(match[2])  # "./name" is "name"
        (sums if file.name == str(file) else in_folders)[file.name] = match[1].lower()
    return in_folders | sums

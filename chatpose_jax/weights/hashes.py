"""SHA-256 of the source files during a conversion: compares them with lists of sums, and frees the page cache."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from chatpose_jax.errors import UserError
from chatpose_jax.weights.sources import Source
from chatpose_jax.weights.stream import forget

SUMS_FILE = "SHA256SUMS"
_PIECE = 8 << 20
_END = (chr(0x10FFFF), 0)
"""Sorts after all files."""


class Follower(contextlib.AbstractContextManager["Follower"]):
    """A thread that follows a conversion, which reads its files in the order of their paths. It finds their pages in the page cache, computes the
    digests, and drops the pages, which would otherwise take all free memory.
    """

    def __init__(self, files: Sequence[Path], expected: Mapping[Path, str], hashes: bool):
        self.expected, self.hashes = expected, hashes
        self.position, self.moved, self.ended = ("", 0), threading.Condition(), False
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.digests = self.thread.submit(self._follow, files)

    def __exit__(self, *error: object) -> None:
        self.ended = True
        self.has_read(*_END)
        self.thread.shutdown()

    def has_read(self, file: str, offset: int) -> None:
        """Reports that a block at ``offset`` was read, and everything before it. Raises UserError if a digest differs from the list."""
        with self.moved:
            self.position = max(self.position, (file, offset))
            self.moved.notify()
        if self.digests.done() and not self.ended:
            self.digests.result()

    def result(self) -> dict[Path, str]:
        """Waits for all files and returns their digests. Raises UserError for the first that differs from the list."""
        self.has_read(*_END)
        return self.digests.result()

    def _wait(self, position: tuple[str, int]) -> None:
        with self.moved:
            self.moved.wait_for(lambda: position <= self.position)

    def _follow(self, files: Sequence[Path]) -> dict[Path, str]:
        digests = {}
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as opened:
                for start in range(0, file.stat().st_size, _PIECE):
                    self._wait((str(file), start + _PIECE))
                    if self.ended:
                        return {}
                    if self.hashes:
                        digest.update(opened.read(_PIECE))
                    forget(opened.fileno(), start + _PIECE)
            if self.hashes:
                digests[file] = digest.hexdigest()
                if (listed := self.expected.get(file, digests[file])) != digests[file]:
                    raise UserError(
                        f"{file}: its SHA-256 is {digests[file]}, the list has {listed}; the file is damaged or another one; fetch it again"
                    )
        return digests


def expected_hashes(sources: Sequence[Source], given: str | Path | None) -> dict[Path, str]:
    """The expected digests of the sources' files, from the given list and the list in each source's folder."""
    expected: dict[Path, str] = {}
    for number, source in enumerate(sources):
        own = source.checkpoint.folder / SUMS_FILE
        lists = [Path(given)] if given is not None else []
        lists += [own] if own.is_file() else []
        for path in lists:
            sums = read_sums(path)
            must = path == own or number == 0
            if must and (unlisted := [file.name for file in source.checkpoint.files if file.name not in sums]):
                raise UserError(f"{path}: does not list {unlisted[0]}; add its sum, or convert without the list")
            found = {file: sums[file.name] for file in source.checkpoint.files if file.name in sums}
            if differing := [file.name for file in found if expected.get(file, found[file]) != found[file]]:
                raise UserError(f"{path} and {lists[0]} list different sums for {differing[0]}")
            expected |= found
    return expected


def read_sums(path: Path) -> dict[str, str]:
    """File names and SHA-256 digests of a list in the format of ``sha256sum``. Raises UserError for any other format.

    A path in a folder is listed under its file name, unless the list has that file name itself too.
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

"""SHA-256 of a conversion's files: computed beside it, compared with lists of such sums."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from chatpose_jax.errors import UserError
from chatpose_jax.weights.sources import Source

SUMS_FILE = "SHA256SUMS"


@contextlib.contextmanager
def hashing(
    files: Sequence[Path], expected: Mapping[Path, str]
) -> Iterator[concurrent.futures.Future[dict[Path, str]]]:
    """While the block runs, a thread computes the digests of files. Gives their future, which raises UserError for the first
    file that has another digest than ``expected``."""
    left = threading.Event()

    def work() -> dict[Path, str]:
        digests: dict[Path, str] = {}
        for file in files:
            digests[file] = sha256(file, left)
            if digests[file] != expected.get(file, digests[file]):
                raise UserError(
                    f"{file}: its SHA-256 is {digests[file]}, listed is {expected[file]}; the file is damaged or another one: fetch it again"
                )
        return digests

    with concurrent.futures.ThreadPoolExecutor(1) as background:
        try:
            yield background.submit(work)
        finally:
            left.set()


def sha256(path: Path, stopped: threading.Event | None = None) -> str:
    """Hex digest of a file, read in pieces of 8 MiB. Raises CancelledError once ``stopped`` is set."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 23):
            digest.update(block)
            if stopped is not None and stopped.is_set():
                raise concurrent.futures.CancelledError
    return digest.hexdigest()


def expected_hashes(sources: Sequence[Source], given: str | Path | None) -> dict[Path, str]:
    """The digests that the sources' files must have, from the given list and from the list in each source's folder."""
    expected: dict[Path, str] = {}
    for number, source in enumerate(sources):
        own = source.checkpoint.folder / SUMS_FILE
        lists = [Path(given)] if given is not None else []
        lists += [own] if own.is_file() else []
        for path in lists:
            sums = read_sums(path)
            must = path == own or number == 0
            if must and (unlisted := [file.name for file in source.checkpoint.files if file.name not in sums]):
                raise UserError(f"{path}: does not list {unlisted[0]}; add its sum, or leave the list away")
            found = {file: sums[file.name] for file in source.checkpoint.files if file.name in sums}
            if differing := [file.name for file in found if expected.get(file, found[file]) != found[file]]:
                raise UserError(f"{path} and {lists[0]} list different sums for {differing[0]}")
            expected |= found
    return expected


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

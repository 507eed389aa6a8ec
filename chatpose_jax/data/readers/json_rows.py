"""Reads large JSON files in parts, without the whole file in memory: a list of objects, or JSON lines.

One pass finds where the parts begin and end. After that a process reads the bytes of its own parts only.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from chatpose_jax.data.readers.untrusted import MAX_MEMBER, open_bytes
from chatpose_jax.errors import UserError

ROWS_A_PART = 256
_CHUNK = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
_MARK = "\ufeff".encode().decode("latin-1")


class Rows(NamedTuple):
    """Neighbouring rows of a file. file: relative to a folder. first: the number of the first row, as in ``read_rows``. start, end: in bytes."""

    file: str
    first: int
    start: int
    end: int


def json_form(path: Path) -> Literal["list", "lines"] | None:
    """ "list" for a file that begins as a JSON list, "lines" for one that begins with a JSON object, None for others.

    Raises UserError for a file that cannot be read.
    """
    with _plain(path) as file:
        start = file.read(4096).decode("latin-1").removeprefix(_MARK)
    return {"[": "list", "{": "lines"}.get(start[_skip(start, 0) :][:1])  # type: ignore[return-value]


def split_rows(
    folder: Path, file: str, count: int = ROWS_A_PART, see: Callable[[Mapping[str, Any]], None] | None = None
) -> list[Rows]:
    """The parts of a file, of ``count`` rows each. The file is read once, with one row in memory at a time.

    see: is called with each row of a JSON list, whose text is that of its bytes as latin-1 (``text.encode("latin-1")`` are the bytes).

    Raises UserError, with the row and the byte, where the file is neither a list of objects nor JSON lines, is damaged or is cut off.
    """
    path = folder / file
    spans = _lines(path) if json_form(path) == "lines" else _objects(path, see)
    parts: list[Rows] = []
    for number, start, end in spans:
        if not parts or number >= parts[-1].first + count:
            parts.append(Rows(file, number, start, end))
        parts[-1] = parts[-1]._replace(end=end)
    return parts


def read_rows(folder: Path, rows: Rows) -> Iterator[tuple[int, bytes]]:
    """The rows of a part, each with its number: in a list from 0 on, in JSON lines the number of its line, from 1 on.

    ``untrusted.parse_json`` is the next step. Raises UserError if the file has changed since ``split_rows``.
    """
    path = folder / rows.file
    with _plain(path) as file:
        file.seek(rows.start)
        data = file.read(rows.end - rows.start)
    changed = UserError(f"{path} has changed while it was read; start again")
    if len(data) < rows.end - rows.start:
        raise changed
    if json_form(path) == "lines":
        for number, line in enumerate(data.split(b"\n"), rows.first):
            if line.strip():
                yield number, line
        return
    text, at, number = data.decode("latin-1"), 0, rows.first
    decode = json.JSONDecoder().raw_decode
    while at < len(text):
        try:
            _, end = decode(text, at)
        except ValueError:
            raise changed from None
        yield number, data[at:end]
        number, at = number + 1, _skip(text, end)
        if text[at : at + 1] not in ("", ","):
            raise changed
        at = _skip(text, at + 1)


def _plain(path: Path) -> IO[bytes]:
    file = open_bytes(path)
    if isinstance(file, gzip.GzipFile):
        file.close()
        raise UserError(f"{path} is packed by gzip, and parts of it cannot be read; unpack it first")
    return file


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    at = 0
    with _plain(path) as file:
        for number, line in enumerate(file, 1):
            if len(line) > MAX_MEMBER:
                raise UserError(f"{path}: line {number} has more than {MAX_MEMBER:,} bytes, which is the limit")
            if line.strip():
                yield number, at, at + len(line)
            at += len(line)


def _objects(path: Path, see: Callable[[Mapping[str, Any]], None] | None) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each object in a JSON list. As latin-1, characters are bytes, and JSON's own signs are the same."""
    with _plain(path) as file:
        window = _Window(file, path)
        if window.text.startswith(_MARK):
            window.at = len(_MARK)
        window.expect("[", "a list of objects, or JSON lines")
        if window.sign() == "]":
            return
        for number in itertools.count():
            if window.sign() != "{":
                raise window.error(f"expected an object for row {number}")
            start = window.base + window.at
            value = window.decode(number)
            if see is not None:
                see(value)
            yield number, start, window.base + window.at
            if window.sign() == "]":
                return
            window.expect(",", f"a comma or the end of the list after row {number}")


class _Window:
    """The part of a file that is in memory. text: from byte ``base`` on. at: the place in it."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path, self.base, self.at = file, path, 0, 0
        self.text = file.read(_CHUNK).decode("latin-1")
        self._decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Reads on, and forgets what is before ``at``. False at the end of the file."""
        rest = self.text[self.at :]
        data = self.file.read(max(_CHUNK, len(rest)))
        self.base, self.at, self.text = self.base + self.at, 0, rest + data.decode("latin-1")
        return bool(data)

    def sign(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while (at := _skip(self.text, self.at)) == len(self.text):
            self.at = at
            if not self.more():
                return ""
        self.at = at
        return self.text[at]

    def expect(self, sign: str, words: str) -> None:
        if self.sign() != sign:
            raise self.error(f"expected {words}")
        self.at += 1

    def decode(self, number: int) -> Any:
        while True:
            try:
                value, self.at = self._decode(self.text, self.at)
                return value
            except RecursionError:
                raise self.error(f"row {number} is nested too deeply") from None
            except ValueError as error:
                if len(self.text) - self.at > MAX_MEMBER:
                    raise self.error(f"row {number} is damaged, or has more than {MAX_MEMBER:,} bytes") from None
                if not self.more():
                    raise self.error(f"row {number} is damaged or cut off ({error})") from None

    def error(self, words: str) -> UserError:
        found = repr(self.text[self.at : self.at + 40]) if self.at < len(self.text) else "the end of the file"
        return UserError(
            f"{self.path}: {words}; found {found} at byte {self.base + self.at:,}. Get the file again, or mend it"
        )

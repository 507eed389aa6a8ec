"""A reader of records that a test has written, and the call that prepares them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import msgpack

from chatpose_jax.data.config import Split
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.reader import About, Skipped
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

PER_PART = 8


class Given:
    """Reads the files of ``write``."""

    about: ClassVar[About] = About("Given rows", "CC0, free for all uses", "https://example.org/given", ("records",))

    def __init__(self, source: Path) -> None:
        self.source = source

    def parts(self, split: Split) -> Sequence[int]:
        return range(0, len(self._read(split)), PER_PART)

    def read(self, split: Split, part: int) -> Iterator[Record | Skipped]:
        yield from map(from_bytes, self._read(split)[part : part + PER_PART])

    def _read(self, split: Split) -> list[bytes]:
        file = self.source / split
        return msgpack.unpackb(file.read_bytes()) if file.exists() else []


def write(folder: Path, **splits: Sequence[Record]) -> Path:
    """Prepares a folder with these records."""
    source = folder.with_name(f"{folder.name}-source")
    source.mkdir(parents=True)
    for split, records in splits.items():
        (source / split).write_bytes(msgpack.packb([to_bytes(record) for record in records]))
    prepare(f"{__name__}:Given", source, folder, processor=tiny_processor(preset("tiny")))
    return folder

"""Reads records of a prepared split by number: from the files of its shards on a disk, or by byte ranges from an object store."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from chatpose_jax import storage
from chatpose_jax.data import store
from chatpose_jax.data.array_record import offsets_of, records_of, tail_size
from chatpose_jax.errors import UserError
from chatpose_jax.storage import Location

OPEN_SHARDS = 64
"""The most shards of a split that are open at a time."""
KEEP = 1 << 30
"""Bytes of a split in an object store. One that has no more is kept in memory as it is read; of a larger one only the wanted records are read."""
PIECE = 8 << 20
"""Bytes that are read at a time of a split that is kept, and the most that are read at once of one that is not."""
GAP = 1 << 17
"""Bytes between two wanted records that are read along with them: a request more would take longer."""
_AT_ONCE = 8  # pieces of a file that is copied


class Shards(Protocol):
    """The shards of one split. Several threads may read."""

    def read(self, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of some records, each given as (shard, its number in there). Raises UserError where a shard is missing or damaged."""
        ...


def shards(folder: Location, about: Sequence[Mapping[str, Any]]) -> Shards:
    """The shards in the folder of a split. about: their entries in ``dataset.json``. None is opened yet."""
    return InStore(folder, about) if storage.is_bucket(folder) else OnDisk(folder, about)


def changed(file: Location, error: Exception | str) -> UserError:
    """The error to raise for a file of a split that is missing or not what it was."""
    what = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(
        f"{file} is not as it was prepared ({what}); 'chatpose data check {file.parent.parent}' says what is damaged. "
        "Copy the folder again, or prepare it again into a new one"
    )


class OnDisk:
    """Files that are opened when their first record is needed."""

    def __init__(self, folder: Path, about: Sequence[Mapping[str, Any]]) -> None:
        self.folder, self.about = folder, about
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
        """See ``Shards``."""
        return [self._record(shard, number) for shard, number in wanted]

    def _record(self, shard: int, number: int) -> bytes:
        reader = self._reader(shard)
        try:
            return reader.read([number])[0]
        except (RuntimeError, IndexError) as error:
            raise changed(self.folder / self.about[shard]["file"], f"record {number}: {error}") from None

    def _reader(self, shard: int) -> Any:
        with self._lock:
            reader = self._open.pop(shard, None)
            if reader is None:
                reader = self._open_shard(shard)
                while len(self._open) >= OPEN_SHARDS:
                    self._open.popitem(last=False)  # closed when no thread reads from it any more
            self._open[shard] = reader
        return reader

    def _open_shard(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        about, file = self.about[shard], self.folder / self.about[shard]["file"]
        try:
            if (size := file.stat().st_size) != about["bytes"]:
                raise ValueError(f"{size} bytes instead of {about['bytes']}")
            reader = ArrayRecordReader(str(file), store.READER)
            if (records := reader.num_records()) != about["records"]:
                raise ValueError(f"{records} records instead of {about['records']}")
        except (OSError, ValueError, RuntimeError) as error:
            raise changed(file, error) from None
        return reader


class _Range(NamedTuple):
    """Bytes of a shard, from start to before end."""

    shard: int
    start: int
    end: int


class InStore:
    """Objects of a store, of which byte ranges are read, those of one call at the same time.

    A split of at most ``KEEP`` bytes is read in pieces that are kept, so that there are few requests. Of a larger one the wanted records are
    read, neighbours together. The first record of a shard also reads the places of all, at its end.
    """

    def __init__(self, folder: Location, about: Sequence[Mapping[str, Any]]) -> None:
        self.folder, self.about = folder, about
        self._keep = sum(shard["bytes"] for shard in about) <= KEEP
        self._pieces: dict[_Range, bytes] = {}
        self._offsets: dict[int, np.ndarray] = {}
        self._lock = threading.RLock()

    def read(self, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
        """See ``Shards``."""
        self._find({shard for shard, _ in wanted})
        ranges = []
        for shard, number in wanted:
            offsets = self._offsets[shard]
            if not 0 <= number < len(offsets) - 1:
                raise changed(self._file(shard), f"record {number} of {len(offsets) - 1}")
            ranges.append(_Range(shard, int(offsets[number]), int(offsets[number + 1])))
        found = []
        for (shard, number), some, data in zip(wanted, ranges, self._bytes(ranges)):
            try:
                (record,) = records_of(data, some.start)
            except ValueError as error:
                raise changed(self._file(shard), f"record {number}: {error}") from None
            found.append(record)
        return found

    def _find(self, numbers: set[int]) -> None:
        """Reads where the records of some shards begin."""
        with self._lock:
            new = sorted(numbers - self._offsets.keys())
            tails = []
            for number in new:
                about = self.about[number]
                size = min(tail_size(about["records"]), about["bytes"])
                tails.append(_Range(number, about["bytes"] - size, about["bytes"]))
            for tail, data in zip(tails, self._bytes(tails)):
                try:
                    offsets = offsets_of(data, tail.start)
                    if (records := len(offsets) - 1) != (expected := self.about[tail.shard]["records"]):
                        raise ValueError(f"{records} records instead of {expected}")
                except ValueError as error:
                    raise changed(self._file(tail.shard), error) from None
                self._offsets[tail.shard] = offsets

    def _bytes(self, ranges: Sequence[_Range]) -> list[bytes]:
        if not self._keep:
            return self._merged(ranges)
        with self._lock:  # two threads often want the same pieces
            pieces = {some: self._pieces_of(some) for some in ranges}
            new = sorted(set(itertools.chain.from_iterable(pieces.values())) - self._pieces.keys())
            self._pieces.update(zip(new, self._fetch(new)))
        found = []
        for some in ranges:
            first = pieces[some][0].start
            data = (
                b"".join(self._pieces[piece] for piece in pieces[some])
                if len(pieces[some]) > 1
                else self._pieces[pieces[some][0]]
            )
            found.append(data[some.start - first : some.end - first])
        return found

    def _pieces_of(self, some: _Range) -> list[_Range]:
        size = self.about[some.shard]["bytes"]
        starts = range(some.start // PIECE * PIECE, some.end, PIECE)
        return [_Range(some.shard, start, min(start + PIECE, size)) for start in starts]

    def _merged(self, ranges: Sequence[_Range]) -> list[bytes]:
        merged: list[_Range] = []
        owners: dict[_Range, int] = {}
        for some in sorted(set(ranges)):
            last = merged[-1] if merged else some
            if merged and some.shard == last.shard and some.start - last.end <= GAP and some.end - last.start <= PIECE:
                merged[-1] = last._replace(end=some.end)
            else:
                merged.append(some)
            owners[some] = len(merged) - 1
        data = self._fetch(merged)
        return [
            data[owners[some]][some.start - merged[owners[some]].start : some.end - merged[owners[some]].start]
            for some in ranges
        ]

    def _fetch(self, ranges: Sequence[_Range]) -> list[bytes]:
        try:
            found = storage.read_ranges([(self._file(shard), start, end) for shard, start, end in ranges])
        except FileNotFoundError as error:
            raise changed(storage.location(error.filename), error) from None
        for some, data in zip(ranges, found):
            if len(data) != some.end - some.start:
                size = some.start + len(data)
                raise changed(self._file(some.shard), f"{size} bytes instead of {self.about[some.shard]['bytes']}")
        return found

    def _file(self, shard: int) -> Location:
        return self.folder / self.about[shard]["file"]


@contextlib.contextmanager
def local_copy(file: Location) -> Iterator[Path]:
    """Context manager: a file of a disk itself, or a copy of an object of a store, which is removed at the end. Raises OSError."""
    if not storage.is_bucket(file):
        yield Path(file)
        return
    size = storage.size(file)
    with tempfile.TemporaryDirectory(prefix="chatpose-") as folder:
        copy = Path(folder, file.name)
        with copy.open("wb") as target:
            pieces = [(file, start, min(start + PIECE, size)) for start in range(0, size, PIECE)]
            for first in range(0, len(pieces), _AT_ONCE):
                target.writelines(storage.read_ranges(pieces[first : first + _AT_ONCE]))
        yield copy


@contextlib.contextmanager
def local_file(file: Location) -> Iterator[Path]:
    """Context manager: a path to write to. At the end ``file`` has what was written there, whole: on a disk by another name, in an object store by an
    upload. After an exception it is as before. Raises OSError."""
    if not storage.is_bucket(file):
        temporary = Path(file).with_name(f"{file.name}.{os.getpid()}.tmp")
        yield temporary
        temporary.replace(file)
        return
    with tempfile.TemporaryDirectory(prefix="chatpose-") as folder:
        temporary = Path(folder, file.name)
        yield temporary
        with temporary.open("rb") as source, storage.writing(file) as target:
            shutil.copyfileobj(source, target, PIECE)

"""Writes a prepared folder from the original files. It may be killed at any moment: the same call then continues, and writes the same bytes."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgpack
import numpy as np

from chatpose_jax import __version__, named, storage
from chatpose_jax.data import store
from chatpose_jax.data.collate import as_trained, count_example
from chatpose_jax.data.config import Split
from chatpose_jax.data.datasets import DATA_SETS
from chatpose_jax.data.pool import Tick, share
from chatpose_jax.data.reader import Reader, Skipped
from chatpose_jax.data.record import SCHEMA, Record, to_bytes
from chatpose_jax.data.shards import local_file
from chatpose_jax.errors import UserError
from chatpose_jax.locks import Held, only_writer
from chatpose_jax.processing.processor import Processor
from chatpose_jax.settings import one_line, whole
from chatpose_jax.storage import Location

MAX_SHARDS = 512
"""The most shards of a split. If it has more parts, neighbouring parts share a shard."""
MAX_BROKEN = 100
MAX_WORDS = 1000
"""Characters that are kept of the key, and of the detail, of a broken item."""
MAX_CONVERSATIONS = int(np.iinfo(store.ROW["conversation"]).max)
"""The most conversations of a record that the index can number."""
MALFORMED = "no valid row"
LOCK = ".lock"
"""In the folder that is written: what a later call needs to continue, and the lock. They are removed at the end."""
_AT_A_TIME = 32


class TooManyBroken(UserError):
    """More items are broken than ``max_broken``."""


class Broken(NamedTuple):
    """An item that gave no record because it is damaged."""

    key: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to write, from neighbouring parts of a split."""

    split: Split
    number: int
    count: int
    parts: tuple[Any, ...]

    __repr__ = one_line

    def shard(self, out: Location) -> Location:
        return out / self.split / store.shard_name(self.number, self.count)

    def note(self, out: Location) -> Location:
        """The file that says what the shard holds. Where it is, the shard is complete."""
        return out / store.WORK / self.split / f"{self.number:05d}"


def prepare(
    name: str,
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    processor: Processor,
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
    max_broken: int = MAX_BROKEN,
    progress: bool = False,
) -> dict[str, Any]:
    """Reads the original files of a data set, and writes the folder that the source of this name reads.

    Args:
        name: an entry of ``DATA_SETS``, or ``package.module:Class`` of a reader of one's own.
        source: folder of the original files, on a disk.
        out: folder to write, or its address in an object store. One that an earlier call with equal arguments has begun is completed.
        processor: counts the tokens of rows for the index. Training with another tokenizer counts them again.
        options: of the reader.
        workers: processes that read. The result does not depend on their number.
        max_broken: up to so many broken items are left out; one more is an error.
        progress: show a progress bar.

    Returns:
        The description, as in ``dataset.json``.

    Raises:
        UserError for options that do not fit, missing files, a folder that holds anything else, and too many broken items; OSError where
        writing fails. What is finished stays.
    """
    if storage.is_bucket(source):
        raise UserError(
            f"--source {source} is in an object store; original files are read from a disk: copy them to one, or mount the store"
        )
    out, source = storage.location(out), Path(source)
    whole("workers", workers, 1)
    whole("max_broken", max_broken, 0)
    options = dict(options or {})
    kind = find_reader(name)
    reader = make_reader(name, source, options)
    parts = {split: some for split in get_args(Split) if (some := list(reader.parts(split)))}
    if not parts:
        raise UserError(f"data set {name!r}: {source} holds nothing to read; expected {'; '.join(kind.about.files)}")
    plan = {
        "schema": SCHEMA,
        "name": name,
        "about": {field: getattr(kind.about, field) for field in ("title", "licence", "page")},
        "options": _plain(_defaults(kind) | options),
        "version": __version__,
        "lengths": processor.fingerprint,
    }
    with only_writer(out, out / LOCK) as held:
        if (out / store.DESCRIPTION).exists():
            return _finished(out, plan, parts)
        _begin(out, plan, source, parts)
        jobs = [job for split, some in parts.items() for job in _jobs(split, some)]
        _write_shards(ShardWriter(out, reader, processor, max_broken), jobs, workers, progress, held)
        splits = {split: _complete(out, [job for job in jobs if job.split == split]) for split in parts}
        description = {**plan, "splits": splits}
        storage.write_bytes(out / store.DESCRIPTION, store.to_json(description))
        storage.remove_tree(out / store.WORK)
    return description


def find_reader(name: str) -> type[Reader]:
    """The class of a data set's reader. Raises UserError where there is none of this name."""
    where = f"data set {name!r}"
    found = named.find(where, name, DATA_SETS)
    if not all(hasattr(found, part) for part in ("about", "parts", "read")):
        raise UserError(
            f"{where}: expected a class with about, parts and read (chatpose_jax.data.reader.Reader), found {found!r:.100}"
        )
    return found


def make_reader(name: str, source: Path, options: Mapping[str, Any]) -> Reader:
    """The reader of a data set for the files in ``source``. Raises UserError for options that do not fit, and for missing files."""
    where, kind = f"data set {name!r}", find_reader(name)
    named.check_options(where, named.signature(where, kind), options)
    if not source.is_dir():
        raise UserError(f"{where}: --source {source} is no folder; expected one with {'; '.join(kind.about.files)}")
    try:
        return kind(source, **options)
    except UserError:
        raise
    except Exception as error:
        raise named.raised(where, error) from error


def reader_options(kind: type[Reader]) -> list[str]:
    """The options of a reader, each as ``name: type = default``."""
    parameters = named.signature(kind.about.title, kind).parameters.values()
    return [str(parameter) for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _defaults(kind: type[Reader]) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _jobs(split: Split, parts: Sequence[Any]) -> Iterator[Job]:
    count = min(len(parts), MAX_SHARDS)
    for number in range(count):
        first, end = (len(parts) * place // count for place in (number, number + 1))
        yield Job(split, number, count, tuple(parts[first:end]))


def _finished(out: Location, plan: Mapping[str, Any], parts: Mapping[Split, Sequence[Any]]) -> dict[str, Any]:
    found = store.read_description(out)
    shards = {split: len(about["shards"]) for split, about in found["splits"].items()}
    wanted = {split: min(len(some), MAX_SHARDS) for split, some in parts.items()}
    _demand_same(f"{out} holds a data set with", {**found, "shards": shards}, {**plan, "shards": wanted})
    storage.remove_tree(out / store.WORK)  # a killed call left it: this is its last step
    return found


_OF_FILES = ("parts", "shards")
"""Entries of a plan that follow from the original files alone."""
_NAMES = {"lengths": "tokens that were counted for the tokenizer and template (--model)"}
"""Entries of a plan whose names say too little."""


def _demand_same(holds: str, found: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Raises UserError, which says what differs, where a folder was begun or written by a call of which this one is no repetition."""
    advice = "choose another folder, or delete this one"
    for name, value in plan.items():
        if (was := found.get(name)) == value:
            continue
        if name in _OF_FILES:
            raise UserError(
                f"{holds} other original files: those in --source were changed since it was begun; {advice}"
            )
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            keys = [key for key in {**was, **value} if was.get(key) != value.get(key)]
            was, value = ({key: some.get(key) for key in keys} for some in (was, value))
        raise UserError(f"{holds} {_NAMES.get(name, name)} {was!r:.200}, and this call has {value!r:.200}; {advice}")


def _begin(out: Location, plan: Mapping[str, Any], source: Path, parts: Mapping[Split, Sequence[Any]]) -> None:
    """Makes the folders, or checks that those of an earlier call are for the same result."""
    plan = {
        **plan,
        "source": str(source.resolve()),
        "parts": {split: list(map(str, some)) for split, some in parts.items()},
    }
    file = out / store.WORK / "plan"
    if file.exists():
        _demand_same(f"{out} holds the beginning of a data set with", msgpack.unpackb(file.read_bytes()), plan)
    elif others := sorted(path.name for path in out.iterdir() if path.name not in (LOCK, store.WORK)):
        raise UserError(f"{out} holds other files ({others[0]}); choose a new or an empty folder")
    (out / store.WORK).mkdir(exist_ok=True)
    storage.write_bytes(file, msgpack.packb(plan))  # the first file, by which a later call knows the folder
    for folder in (out, out / store.WORK, *(parent / split for split in parts for parent in (out, out / store.WORK))):
        folder.mkdir(exist_ok=True)
        for left in folder.glob("*.tmp"):
            left.unlink()


def _write_shards(writer: ShardWriter, jobs: Sequence[Job], workers: int, progress: bool, held: Held) -> None:
    """Writes all shards that are not there yet."""
    from tqdm import tqdm

    notes = _notes(writer.out, jobs)
    done = [note for note in notes if note]
    pending = [job for job, note in zip(jobs, notes) if not note]
    broken = [item for note in done for item in note.broken]
    _limit(broken, writer.max_broken)
    with (
        tqdm(
            total=len(jobs),
            initial=len(done),
            unit="shard",
            disable=not progress,
            dynamic_ncols=True,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
        ) as bar,
        contextlib.closing(
            share(writer, pending, workers, lambda count: bar.set_postfix(items=count, refresh=sys.stderr.isatty()))
        ) as found,
    ):
        for some in found:
            broken += some
            bar.update()
            held.check()
            _limit(broken, writer.max_broken)


def _limit(broken: Sequence[Broken], most: int) -> None:
    if len(broken) > most:
        first = "; ".join(f"{item.key}: {item.reason} ({item.detail})" for item in broken[:3])
        raise TooManyBroken(
            f"{len(broken)} items are broken, more than --max-broken {most}: {first}"
            f"{' …' if len(broken) > 3 else ''}. If so many may be left out, the same command with a larger --max-broken continues"
        )


class _Note(NamedTuple):
    """What a finished shard holds. rows: its part of the index, as bytes."""

    rows: bytes
    records: int
    skipped: dict[str, int]
    broken: list[Broken]
    bytes: int
    sha256: str


def _notes(out: Location, jobs: Sequence[Job]) -> list[_Note | None]:
    """The notes of shards, None for one that is not finished. Several are read at a time, for a store answers slowly."""

    def read(job: Job) -> _Note | None:
        try:
            note = _Note(*msgpack.unpackb(job.note(out).read_bytes()))
            if storage.size(job.shard(out)) != note.bytes:
                return None
        except FileNotFoundError:
            return None
        return note._replace(broken=[Broken(*item) for item in note.broken])

    with concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(read, jobs))


def _plain_words(text: str) -> str:
    """A text that can be written to a file: short, Unicode, and without addresses of objects, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)[:MAX_WORDS].encode(errors="replace").decode()


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Writes shards, one at a time. It is pickled to other processes."""

    out: Location
    reader: Reader
    processor: Processor
    max_broken: int

    def __call__(self, job: Job, tick: Tick) -> list[Broken]:
        """Writes one shard and its note, and returns its broken items."""
        shard, note = job.shard(self.out), job.note(self.out)
        rows: list[tuple[int, ...]] = []
        skipped: collections.Counter[str] = collections.Counter()
        broken: list[Broken] = []
        records = 0
        with local_file(shard) as temporary:
            file, items = _ShardFile(temporary), self._items(job)
            # Several at a time: code that runs between the decoding of two images runs from cold caches, at a third of the speed.
            while some := list(itertools.islice(items, _AT_A_TIME)):
                for found in [self._packed(item) if isinstance(item, Record) else item for item in some]:
                    if isinstance(found, Skipped):
                        skipped[found.reason] += 1
                        if found.broken:
                            broken.append(Broken(_plain_words(found.key), found.reason, _plain_words(found.detail)))
                            _limit(broken, self.max_broken)
                        continue
                    data, counts = found
                    file.write(data)
                    rows += [(job.number, records, place, *numbers) for place, numbers in enumerate(counts)]
                    records += 1
                tick(len(some))
            size, digest = file.close()
        entries = np.array(rows, store.ROW).tobytes()
        storage.write_bytes(note, msgpack.packb(_Note(entries, records, dict(skipped), broken, size, digest)))
        return broken

    def _items(self, job: Job) -> Iterator[Any]:
        for part in job.parts:
            try:
                yield from self.reader.read(job.split, part)
            except UserError:
                raise
            except Exception as error:
                raise named.raised(f"{type(self.reader).about.title}, {job.split}, {part}", error) from error

    def _packed(self, record: Record) -> tuple[bytes, list[tuple[int, ...]]] | Skipped:
        """The record's bytes, and what the index says of its rows: kind, images, poses, tokens, tail. A ``Skipped`` where training would refuse a
        row, or where text is not Unicode (JSON can hold half of a surrogate pair)."""
        rows: list[tuple[int, ...]] = []
        try:
            as_trained(record.poses)
            if len(record.conversations) > MAX_CONVERSATIONS:
                raise ValueError(f"it has {len(record.conversations):,} conversations, more than {MAX_CONVERSATIONS:,}")
            for place in range(len(record.conversations)):
                found = count_example(self.processor, record.example(place))
                tokens = found.tokens - found.images * self.processor.ids.num_patches
                rows.append((store.KINDS.index(record.kind), found.images, found.poses, tokens, found.tail))
            return to_bytes(record), rows
        except ValueError as error:
            return Skipped(record.key, MALFORMED, broken=True, detail=str(error))


class _ShardFile:
    """Writes an ArrayRecord file. A failure is an OSError that names the file."""

    def __init__(self, file: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self.file = file
        self._writer = self._call(ArrayRecordWriter, str(file), store.WRITER)

    def write(self, data: bytes) -> None:
        self._call(self._writer.write, data)

    def close(self) -> tuple[int, str]:
        """Flushes the file to disk. Returns its size and its SHA-256."""
        self._call(self._writer.close)
        with self.file.open("rb") as stream:
            os.fsync(stream.fileno())
            return os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()

    def _call(self, function: Callable[..., Any], *values: Any) -> Any:
        try:
            return function(*values)
        except RuntimeError as error:  # its text has the system's words for the cause
            words = str(error)
            number = next((code for code in _CAUSES if os.strerror(code) in words), errno.EIO)
            raise OSError(number, os.strerror(number), str(self.file)) from error


_CAUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)


def _complete(out: Location, jobs: Sequence[Job]) -> dict[str, Any]:
    """Writes the index of a split, and returns what the description says of the split."""
    notes = [note for note in _notes(out, jobs) if note]
    rows = np.concatenate([np.frombuffer(note.rows, store.ROW) for note in notes])
    index = io.BytesIO()
    np.save(index, rows)
    storage.write_bytes(out / jobs[0].split / store.INDEX, index.getvalue())
    skipped: collections.Counter[str] = collections.Counter()
    for note in notes:
        skipped.update(note.skipped)
    return {
        "rows": len(rows),
        "records": sum(note.records for note in notes),
        "kinds": {
            kind: int(count) for place, kind in enumerate(store.KINDS) if (count := (rows["kind"] == place).sum())
        },
        "skipped": dict(sorted(skipped.items())),
        "broken": [item._asdict() for note in notes for item in note.broken],
        "index": {"bytes": len(index.getvalue()), "sha256": hashlib.sha256(index.getvalue()).hexdigest()},
        "shards": [
            {"file": job.shard(out).name, "records": note.records, "bytes": note.bytes, "sha256": note.sha256}
            for job, note in zip(jobs, notes)
        ],
    }

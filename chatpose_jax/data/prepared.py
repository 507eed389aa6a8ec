"""The rows of a prepared data set, read by number."""

from __future__ import annotations

import collections
import hashlib
import operator
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax import named
from chatpose_jax.data import store
from chatpose_jax.data.config import Split
from chatpose_jax.data.datasets import DATA_SETS
from chatpose_jax.data.example import Example
from chatpose_jax.data.lengths import lengths_of
from chatpose_jax.data.reader import where_to_get
from chatpose_jax.data.record import Record, from_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import Processor

OPEN_SHARDS = 64
"""The most shards of a split that are open at a time."""


class NotPrepared(UserError):
    """The folder of a data set is not there, or not complete. folder: its path."""

    def __init__(self, words: str, folder: str) -> None:
        super().__init__(words)
        self.folder = folder


def prepared(split: Split, *, folder: str) -> Prepared:
    """The source "prepared" of ``data.sources``: a folder that ``chatpose data prepare`` wrote.

    Raises UserError where it is none, or is damaged.
    """
    return Prepared(folder, split)


def data_set(name: str, root: str) -> Any:
    """The source of a data set: as ``prepared``, with the folder ``root/name`` by default."""

    def make(split: Split, *, folder: str = str(Path(root) / name)) -> Prepared:
        path = Path(folder)
        if not (path / store.DESCRIPTION).exists():
            about = named.find(f"data set {name!r}", name, DATA_SETS).about
            begun = "is not complete" if path.exists() else "is not there"
            raise NotPrepared(
                f"the prepared folder {folder} of {about.title} {begun}. {where_to_get(about)}, then type: "
                f"chatpose data prepare {name} --source FOLDER --out {folder} (docs/data-sets.md says what FOLDER holds)",
                folder,
            )
        found = Prepared(path, split)
        if found.description["name"] != name:
            raise UserError(f"{folder} holds the data set {found.description['name']!r}, expected {name!r}")
        return found

    return make


class Prepared(Sequence[Example]):
    """The rows of one split of a prepared folder. They may be read by several threads, and the object may be pickled.

    A row is a conversation of a record (``record``). The index is memory-mapped, and a shard is opened when its first row is needed.

    folder, split: what it reads. A split that the data set does not have is empty. description: ``dataset.json``.
    """

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.folder, self.split = Path(folder).expanduser(), split
        self.description = store.read_description(self.folder)
        about = self.description["splits"].get(split)
        self._shards: list[dict[str, Any]] = about["shards"] if about else []
        self._index = self._map(about) if about else np.empty(0, store.ROW)
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def fingerprint(self) -> str:
        """Tells one preparation of the split from another: a hash of its files' hashes, which ``dataset.json`` has."""
        about = self.description["splits"].get(self.split)
        files = [about["index"]["sha256"], *(shard["sha256"] for shard in about["shards"])] if about else []
        return hashlib.blake2b("".join(files).encode(), digest_size=8).hexdigest()

    @property
    def entries(self) -> np.ndarray:
        """(N,) ``store.ROW``, what the index says of each row, mapped from its file."""
        return self._index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> Any:
        """Row ``index``, or the rows of a slice; IndexError beyond the size."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.record(index).example(int(self._index[index]["conversation"]))

    def record(self, index: int) -> Record:
        """The record that row ``index`` belongs to. Raises UserError where its shard is missing or damaged."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self._index[index]
        shard, number = int(row["shard"]), int(row["record"])
        reader = self._reader(shard)
        try:
            return from_bytes(reader.read([number])[0])
        except (RuntimeError, IndexError, UserError) as error:
            raise self._changed(self.shard(shard), f"record {number}: {error}") from None

    def sizes(self, processor: Processor, max_length: int) -> np.ndarray:
        """(N, 3) int32: tokens, images and poses of each row; see ``data.sizes.known_sizes``. -1 for rows of which an image or a pose is cut off.

        Tokens come from the index. Where it was made with another tokenizer or template, they are counted once, and kept beside the index.
        """
        tokens, tail = self._lengths(processor)
        images, poses = self._index["images"].astype(np.int32), self._index["poses"].astype(np.int32)
        total = tokens + images * processor.ids.num_patches
        limit = min(max_length, processor.ids.context)
        sizes = np.stack([np.minimum(total, limit), images, poses], axis=1)
        sizes[total - limit > tail] = -1
        return sizes

    def _lengths(self, processor: Processor) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int32 each: tokens without those of images, and how many of them follow the last image or pose."""
        if processor.fingerprint == self.description["lengths"]:
            found = self._index
        else:
            found = lengths_of(self, self.folder / self.split, processor)
        return found["tokens"].astype(np.int32), found["tail"].astype(np.int32)

    def _map(self, about: dict[str, Any]) -> np.ndarray:
        file = self.folder / self.split / store.INDEX
        try:
            if (size := file.stat().st_size) != about["index"]["bytes"]:
                raise ValueError(f"{size} bytes instead of {about['index']['bytes']}")
            index = np.load(file, mmap_mode="r")
            if index.dtype != store.ROW or index.shape != (about["rows"],):
                raise ValueError(f"{index.dtype} {index.shape}")
        except (OSError, ValueError) as error:
            raise self._changed(file, error) from None
        return index

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

        about, file = self._shards[shard], self.shard(shard)
        try:
            if (size := file.stat().st_size) != about["bytes"]:
                raise ValueError(f"{size} bytes instead of {about['bytes']}")
            reader = ArrayRecordReader(str(file), store.READER)
            if (records := reader.num_records()) != about["records"]:
                raise ValueError(f"{records} records instead of {about['records']}")
        except (OSError, ValueError, RuntimeError) as error:
            raise self._changed(file, error) from None
        return reader

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / self.split / self._shards[number]["file"]

    def _changed(self, file: Path, error: Exception | str) -> UserError:
        what = getattr(error, "strerror", None) or str(error).splitlines()[0]
        return UserError(
            f"{file} is not as it was prepared ({what}); 'chatpose data check {self.folder}' says what is damaged. "
            "Copy the folder again, or prepare it again into a new one"
        )

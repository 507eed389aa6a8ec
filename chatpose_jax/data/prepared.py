"""The rows of a prepared data set, read by number."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from chatpose_jax import named, storage
from chatpose_jax.data import store
from chatpose_jax.data.config import Split
from chatpose_jax.data.datasets import DATA_SETS
from chatpose_jax.data.example import Example, ExampleRows
from chatpose_jax.data.lengths import lengths_of
from chatpose_jax.data.reader import where_to_get
from chatpose_jax.data.record import Record, from_bytes
from chatpose_jax.data.shards import changed, shards
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import Processor
from chatpose_jax.storage import Location


class NotPrepared(UserError):
    """The folder of a data set is not there, or not complete. folder: its path or address."""

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

    def make(split: Split, *, folder: str = str(storage.location(root) / name)) -> Prepared:
        path = storage.location(os.path.expanduser(folder))
        with storage.reachable(path):
            complete = (path / store.DESCRIPTION).exists()
        if not complete:
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


class Prepared(ExampleRows):
    """The rows of one split of a prepared folder. They may be read by several threads, and the object may be pickled.

    A row is a conversation of a record (``record``). On a disk the index is memory-mapped, and a shard is opened when its first row is needed. In a
    bucket the index is read at once, and rows that are asked for together (a slice, ``__getitems__``) are read at the same time.

    folder, split: what it reads, a path or an address (``storage``). A split that the data set does not have is empty. description: ``dataset.json``.
    """

    def __init__(self, folder: str | PathLike[str], split: Split) -> None:
        self.folder, self.split = storage.location(os.path.expanduser(folder)), split
        self.description = store.read_description(self.folder)
        about = self.description["splits"].get(split)
        self._about: list[dict[str, Any]] = about["shards"] if about else []
        self._shards = shards(self.folder / split, self._about)
        self._index = self._map(about) if about else np.empty(0, store.ROW)

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
        """(N,) ``store.ROW``, what the index says of each row, mapped from its file on a disk."""
        return self._index

    def __len__(self) -> int:
        return len(self._index)

    def __getitems__(self, numbers: Sequence[int]) -> list[Example]:
        """Some rows, read together."""
        places = self._index["conversation"]
        return [record.example(int(places[number])) for number, record in zip(numbers, self.records(numbers))]

    def record(self, index: int) -> Record:
        """The record that row ``index`` belongs to. Raises UserError where its shard is missing or damaged."""
        return self.records([index])[0]

    def records(self, numbers: Sequence[int]) -> list[Record]:
        """The same of several rows, read together."""
        rows = self._index[[self._number(index) for index in numbers]]
        places = list(zip(rows["shard"].tolist(), rows["record"].tolist()))
        found = []
        for (shard, number), data in zip(places, self._shards.read(places)):
            try:
                found.append(from_bytes(data))
            except UserError as error:
                raise changed(self.shard(shard), f"record {number}: {error}") from None
        return found

    def _number(self, index: int) -> int:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return index

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
            return store.open_index(file, about)
        except (OSError, ValueError) as error:
            raise changed(file, error) from None

    def shard(self, number: int) -> Location:
        """The file of a shard."""
        return self.folder / self.split / self._about[number]["file"]

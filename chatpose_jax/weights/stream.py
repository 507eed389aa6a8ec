"""Streams leaves into a new Orbax checkpoint.

Orbax saves arrays that are in memory. A conversion has none: a ``Leaf`` is read block by block while earlier blocks are being written.
``_LeafHandler`` lets Orbax save such leaves. The result is an ordinary checkpoint that any Orbax program restores.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from chatpose_jax.models.quantize import INT4, nbytes
from chatpose_jax.processes import all_or_none
from chatpose_jax.storage import Location
from chatpose_jax.weights.arrays import save
from chatpose_jax.weights.leaves import BLOCK, Leaf, read_ahead

OnBytes = Callable[[int], Any]
OnRead = Callable[[str, int], Any]

_IN_FLIGHT = 64 << 20
"""Largest number of bytes that wait to be written while more are read."""
_CHUNK = 16 << 20
"""Size of one stored chunk in bytes: the unit that a sharded restore reads."""
_SETTLE = 128 << 20
"""Number of bytes written between two flushes to disk; a flush also drops their pages from the page cache."""


def chunk_shape(leaf: Leaf) -> tuple[int, ...]:
    """The chunk shape. A leaf that is cheap to read is one chunk. Any other is split by layer, and the larger axis is halved until a chunk has at
    most 16 MiB, so that a sharded restore reads little more than its own part.
    """
    if leaf.nbytes * leaf.cost <= _CHUNK:
        return leaf.shape
    shape = [1 if leaf.stacked and axis == 0 else n for axis, n in enumerate(leaf.shape)]
    while math.prod(shape) * leaf.dtype.itemsize > _CHUNK:
        axis = int(np.argmax(shape))
        shape[axis] = -(-shape[axis] // 2)
    return tuple(shape)


def write_leaves(
    folder: Location,
    leaves: Mapping[str, Leaf],
    *,
    on_bytes: OnBytes = lambda count: None,
    on_read: OnRead = lambda file, offset: None,
    compress: bool = False,
) -> None:
    """Streams leaves into a new Orbax checkpoint ``folder``. Resident memory stays at a few blocks of 16 MiB, whatever the model's size.

    Args:
        on_bytes: called with the number of bytes that were written.
        on_read: called with the file and the offset from which a block was read. Blocks are in the order of the files' paths.
        compress: compress with zstd; int4 always is.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (Leaf, _LeafHandler(on_bytes, on_read, compress)),
        (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None)),
    )
    save(folder, unflatten_dict({path: leaf for path, leaf in leaves.items() if leaf.nbytes}, sep="/"), registry)


class _LeafHandler(ocp.type_handlers.TypeHandler):
    """Saves ``Leaf``s. Each process writes its share of the blocks. Orbax's own array handler restores them."""

    def __init__(self, on_bytes: OnBytes, on_read: OnRead, compress: bool):
        self.on_bytes, self.on_read = on_bytes, on_read
        self.compress = compress

    def typestr(self) -> str:
        return "jax.Array"

    async def metadata(self, infos: Any) -> Any:
        raise NotImplementedError("leaves are only written")

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise NotImplementedError("leaves are only written")

    async def serialize(self, values: Sequence[Leaf], infos: Sequence[Any], args: Any = None) -> list[Any]:
        # If one process fails, all leave Orbax's save here: later in it they would wait for each other.
        with all_or_none():
            boxes, folder = [], None
            for leaf, info in zip(values, infos, strict=True):
                store, folder = await self._create(leaf, info)
                boxes += [(leaf.origin(index), store, leaf, index) for index in leaf.blocks(BLOCK, chunk_shape(leaf))]
            boxes.sort(key=lambda box: box[0])
            self._write(_share(boxes, jax.process_index(), jax.process_count()), _Settler(folder))
        return []

    async def _create(self, leaf: Leaf, info: Any) -> tuple[Any, Path | None]:
        """Creates the array of a leaf; returns it and the folder of all arrays, if that is on a disk."""
        await info.await_path_creation()
        info.use_compression = self.compress or leaf.dtype == INT4  # TensorStore stores a whole byte for each int4
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=True,
            global_shape=leaf.shape,
            local_shape=chunk_shape(leaf),
            dtype=jnp.dtype(leaf.dtype),
            process_index=jax.process_index(),
            arg=ocp.SaveArgs(),
        )
        base = spec["kvstore"]["base"]
        on_disk = base["driver"] == "file"
        if on_disk:
            base["file_io_sync"] = False  # all files are synced together at the end
        array = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
        return array, Path(base["path"]) if on_disk else None

    def _write(self, boxes: Sequence[Any], settler: _Settler) -> None:
        writing: collections.deque[Any] = collections.deque()

        def finish() -> None:
            write, count = writing[0]
            write.result()
            writing.popleft()
            settler.has_written(count)
            self.on_bytes(count)

        reads = [functools.partial(leaf.read, index) for _, _, leaf, index in boxes]
        try:
            for (origin, store, _, index), block in zip(boxes, read_ahead(reads)):
                self.on_read(*origin)
                # Nobody else uses the array, so tensorstore need not copy it.
                write = store[index].write(block, can_reference_source_data_indefinitely=True)
                writing.append((write, nbytes(block)))
                while sum(count for _, count in writing) > _IN_FLIGHT:
                    finish()
            while writing:
                finish()
            settler.finish()
        finally:
            settler.thread.shutdown()
            # After a failure: nothing may be written once the folder is removed.
            for write, _ in writing:
                with contextlib.suppress(Exception):
                    write.result()


def _share(boxes: list[Any], rank: int, count: int) -> list[Any]:
    """The boxes that one process writes. Boxes are ordered by source file and offset, so each file is read once, from front to back. Each process
    has a contiguous part of about the same number of bytes.
    """
    sizes = [math.prod(part.stop - part.start for part in index) * leaf.dtype.itemsize for _, _, leaf, index in boxes]
    ends = itertools.accumulate(sizes)
    return [box for box, size, end in zip(boxes, sizes, ends) if (end - size) * count // sum(sizes) == rank]


class _Settler:
    """Flushes written files to disk and drops their pages from the page cache while a conversion runs. Otherwise the page cache would take all free
    memory. That is slow on virtual machines, and evicts what other programs have cached.
    """

    def __init__(self, folder: Path | None):
        """folder: None if the files are in an object store: then nothing is done."""
        self.folder, self.unsettled = folder, 0
        self.settled: set[Path] = set()
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.running = self.thread.submit(lambda: None)

    def has_written(self, count: int) -> None:
        self.unsettled += count
        if self.unsettled >= _SETTLE and self.running.done():
            self.running.result()
            self.running, self.unsettled = self.thread.submit(self._settle), 0

    def finish(self) -> None:
        """Waits until everything is on disk."""
        self.running.result()
        self.settled.clear()  # some may have grown since
        self._settle()

    def _settle(self) -> None:
        for path in self.folder.rglob("*") if self.folder else ():
            if path not in self.settled:
                self.settled.add(path)
                with contextlib.suppress(FileNotFoundError):  # lock files come and go
                    descriptor = os.open(path, os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                        forget(descriptor)
                    finally:
                        os.close(descriptor)


def forget(descriptor: int, until: int = 0) -> None:
    """Drops the first ``until`` bytes of a file (0: all) from the page cache, if the system supports it."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a folder has no pages
            os.posix_fadvise(descriptor, 0, until, os.POSIX_FADV_DONTNEED)

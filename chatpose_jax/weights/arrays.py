"""Parameter arrays on disk: Orbax (OCDBT), written from arrays or streamed from leaves that are read as they are
written.

Orbax saves what is in memory. A conversion has nothing in memory: a ``Leaf`` is read block by block while earlier
blocks are being written. ``_LeafHandler`` teaches Orbax to save such leaves; the result is an ordinary Orbax
checkpoint that any Orbax program restores.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import itertools
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict

from chatpose_jax.errors import UserError
from chatpose_jax.weights.leaves import Leaf
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.processes import together
from chatpose_jax.weights.readers import forget

Params = dict[str, Any]
OnBytes = Callable[[int], Any]
OnRead = Callable[[str, int], Any]

_BLOCK = 16 << 20
"""Bytes read at once. Larger blocks cost twice the system time: the allocator returns them to the kernel each time."""
_IN_FLIGHT = 64 << 20
"""Bytes that may wait to be written while more is read."""
_READERS = 2
"""Threads that read and transpose; numpy lets go of the interpreter meanwhile."""
_SETTLE = 128 << 20
"""Bytes that are written before they are put on the disk and dropped from the page cache."""
_CHUNK = 16 << 20
"""Bytes of one stored chunk: the unit that a sharded restore reads."""
_SHOWN = 8


class _LeafHandler(ocp.type_handlers.TypeHandler):
    """Saves ``Leaf``s. Each process writes every n-th block; restoring is the business of Orbax's own array handler."""

    def __init__(self, on_bytes: OnBytes, on_read: OnRead, compress: bool):
        self.on_bytes = on_bytes
        self.on_read = on_read
        self.compress = compress

    def typestr(self) -> str:
        return "jax.Array"

    async def metadata(self, infos: Any) -> Any:
        raise NotImplementedError("leaves are only written")

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise NotImplementedError("leaves are only written")

    async def serialize(self, values: Sequence[Leaf], infos: Sequence[Any], args: Any = None) -> list[Any]:
        # All leave Orbax's save here if one fails: behind it, it lets them wait for each other.
        with together():
            await self._write_all(values, infos)
        return []

    async def _write_all(self, values: Sequence[Leaf], infos: Sequence[Any]) -> None:
        boxes, base = [], {}
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            info.use_compression = self.compress
            chunk = chunk_shape(leaf)
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=True,
                global_shape=leaf.shape,
                local_shape=chunk,
                dtype=jnp.dtype(leaf.dtype),
                process_index=jax.process_index(),
                arg=ocp.SaveArgs(),
            )
            base = spec["kvstore"]["base"] | {"file_io_sync": False}  # all together at the end
            spec["kvstore"]["base"] = base
            store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
            boxes += [(leaf.origin(index), store, leaf, index) for index in leaf.blocks(_BLOCK, chunk)]
        share = _share(sorted(boxes, key=lambda box: box[0]), jax.process_index(), jax.process_count())
        loop = asyncio.get_running_loop()
        reading: collections.deque[Any] = collections.deque()
        writing: collections.deque[Any] = collections.deque()
        settler = _Settler(Path(base["path"]))
        with concurrent.futures.ThreadPoolExecutor(_READERS + 1) as pool:
            try:
                settling = loop.run_in_executor(pool, settler.run)
                for origin, store, leaf, index in share:
                    reading.append((origin, store, index, loop.run_in_executor(pool, leaf.read, index)))
                    if len(reading) > _READERS:
                        await self._write(reading, writing, settler)
                while reading:
                    await self._write(reading, writing, settler)
                while writing:
                    await self._finish(writing, settler)
            finally:
                for *_, read in reading:
                    read.cancel()
                # Where the conversion failed: nothing may be written once its folder is removed.
                for write, _ in writing:
                    with contextlib.suppress(Exception):
                        await write
                settler.stop()
            await settling

    async def _write(self, reading: Any, writing: Any, settler: _Settler) -> None:
        origin, store, index, read = reading.popleft()
        block = await read
        self.on_read(*origin)
        # The array is ours alone, so tensorstore need not copy it.
        writing.append((store[index].write(block, can_reference_source_data_indefinitely=True), block.nbytes))
        del block
        while sum(count for _, count in writing) > _IN_FLIGHT:
            await self._finish(writing, settler)

    async def _finish(self, writing: Any, settler: _Settler) -> None:
        write, count = writing[0]
        await write
        writing.popleft()
        settler.has_written(count)
        self.on_bytes(count)


def _share(boxes: list[Any], rank: int, count: int) -> list[Any]:
    """The boxes of one process. All are in the order of the source files, which are so read once, from front to back; each
    process has a stretch of about as many bytes as the others."""
    sizes = [math.prod(part.stop - part.start for part in index) * leaf.dtype.itemsize for _, _, leaf, index in boxes]
    ends = itertools.accumulate(sizes)
    return [box for box, size, end in zip(boxes, sizes, ends) if (end - size) * count // sum(sizes) == rank]


class _ArrayReader(ocp.type_handlers.ArrayHandler):
    """Orbax gives up at the first array that cannot be read, and closes its event loop while others are still being read: Python then
    prints what became of each of them, behind the one error. This reader waits for them."""

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        except Exception:
            await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
            raise


class _Settler:
    """Puts what was written on the disk, and lets go of it in the page cache, while a conversion runs. The cache would
    otherwise take all memory that is free: it costs virtual machines more time than the rest of a conversion, and
    others what they had cached."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settled: set[Path] = set()
        self.unsettled = 0
        self.wake = threading.Event()
        self.stopped = False

    def has_written(self, count: int) -> None:
        self.unsettled += count
        if self.unsettled >= _SETTLE:
            self.unsettled = 0
            self.wake.set()

    def stop(self) -> None:
        self.stopped = True
        self.wake.set()

    def run(self) -> None:
        """Until stopped; then everything is on the disk."""
        while not self.stopped:
            self.wake.wait()
            self.wake.clear()
            self._settle()
        self.settled.clear()  # some may have grown since
        self._settle()

    def _settle(self) -> None:
        for path in self.folder.rglob("*"):
            if path not in self.settled:
                self.settled.add(path)
                with contextlib.suppress(FileNotFoundError):  # lock files come and go
                    descriptor = os.open(path, os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
                    if path.is_file():
                        forget(path)


def chunk_shape(leaf: Leaf) -> tuple[int, ...]:
    """Stored chunks: the whole leaf if little is read for it; else one layer, its larger axis halved until a chunk is at most 16
    MiB, so that a sharded restore reads little beside its own."""
    if leaf.nbytes * leaf.cost <= _CHUNK:
        return leaf.shape
    shape = [1 if leaf.stacked and axis == 0 else n for axis, n in enumerate(leaf.shape)]
    while math.prod(shape) * leaf.dtype.itemsize > _CHUNK:
        axis = int(np.argmax(shape))
        shape[axis] = -(-shape[axis] // 2)
    return tuple(shape)


def write_leaves(
    folder: Path,
    leaves: Mapping[str, Leaf],
    *,
    on_bytes: OnBytes = lambda count: None,
    on_read: OnRead = lambda file, offset: None,
    compress: bool = False,
) -> None:
    """Streams leaves into a new Orbax checkpoint ``folder``. Resident memory stays at a few blocks of 16 MiB,
    whatever the model's size.

    Args:
        on_bytes: hears how many bytes were written.
        on_read: hears the file and the byte from which a block was read; blocks follow the files in order of their paths.
        compress: zstd.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (Leaf, _LeafHandler(on_bytes, on_read, compress)),
        (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None)),
    )
    _save(folder, unflatten_dict({path: leaf for path, leaf in leaves.items() if leaf.nbytes}, sep="/"), registry)


def write_arrays(folder: Path, params: Params) -> None:
    """Writes arrays (numpy or jax, on any mesh, one process or many) as a new Orbax checkpoint ``folder``."""
    flat = {path: array for path, array in by_path(params).items() if array.size}
    _save(folder, unflatten_dict(flat, sep="/"), None)


def _save(folder: Path, tree: Params, registry: Any) -> None:
    options = {} if registry is None else {"type_handler_registry": registry}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, **options)) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(tree))


def read_metadata(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Path → shape and dtype of what is stored. Raises UserError if the folder is no whole Orbax checkpoint."""
    try:
        _check(folder.resolve())
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(folder.resolve()).item_metadata.tree
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in by_path(tree).items()}
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise UserError(
            f"{folder}: not a whole Orbax checkpoint ({_first_line(error)}); convert or copy it again"
        ) from None


def _check(folder: Path) -> None:
    """Raises for a folder whose arrays cannot be listed and described.

    Orbax fails on these in the background: its reason is lost, and pages of log follow the one error that we raise.
    """
    if not (folder / "_METADATA").is_file():
        raise FileNotFoundError("the file _METADATA is missing")
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}).result()
    headers = [key for key in store.list().result() if key.endswith(b"/.zarray")]
    if not headers:
        raise FileNotFoundError("no arrays are listed; manifest.ocdbt is missing or another checkpoint's")
    for header in [store.read(key) for key in headers]:
        header.result()


class Stored:
    """The arrays of a parameter folder, read box by box; nothing is kept."""

    def __init__(self, folder: Path):
        """Raises UserError if the folder is no whole Orbax checkpoint."""
        self.shapes = read_metadata(folder)
        self.folder = folder.resolve()
        self._opened: dict[str, Any] = {}

    def under(self, prefix: str) -> list[str]:
        """Paths that begin with ``prefix``."""
        return [path for path in self.shapes if path.startswith(prefix)]

    def chunk(self, path: str) -> tuple[int, ...]:
        """The boxes that an array is stored in: what is cheap to read at once."""
        return tuple(self._open(path).chunk_layout.read_chunk.shape)

    def read(self, path: str, index: Any = ...) -> np.ndarray:
        """The values of one array under a numpy index, as stored. Raises UserError for damaged data."""
        try:
            return self._open(path)[index].read().result()
        except ValueError as error:
            raise UserError(
                f"{self.folder}: {path} is damaged ({_first_line(error)}); convert or copy it again"
            ) from None

    def _open(self, path: str) -> Any:
        if path not in self._opened:
            base = {"driver": "file", "path": f"{self.folder}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"}
            try:
                self._opened[path] = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
            except ValueError as error:
                raise UserError(
                    f"{self.folder}: {path} is damaged ({_first_line(error)}); convert or copy it again"
                ) from None
        return self._opened[path]


def read_arrays(folder: Path, abstract: Params) -> Params:
    """Restores exactly the leaves of ``abstract`` (``jax.ShapeDtypeStruct``, with or without sharding), cast to their
    dtypes.

    Returns:
        Nested dict of jax arrays; leaves without a sharding go to the first local device.

    Raises:
        UserError: one error that lists missing, extra and misshaped leaves; or damaged data.
    """
    wanted = by_path(abstract)
    empty = {path: leaf for path, leaf in wanted.items() if not math.prod(leaf.shape)}
    stored = read_metadata(folder)
    problems = {
        "missing": [path for path in wanted if path not in stored and path not in empty],
        "extra": [path for path in stored if path not in wanted],
        "misshaped": [
            f"{path} is {tuple(stored[path].shape)}, expected {tuple(leaf.shape)}"
            for path, leaf in wanted.items()
            if path in stored and tuple(stored[path].shape) != tuple(leaf.shape)
        ],
    }
    if any(problems.values()):
        lists = [
            f"{kind} ({len(names)}): {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
            for kind, names in problems.items()
            if names
        ]
        raise UserError(f"{folder}: the stored parameters do not fit the model. {'; '.join(lists)}")

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)
        for path, leaf in wanted.items()
    }
    args = {
        path: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True)
        for path, leaf in targets.items()
        if path not in empty
    }
    try:
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _ArrayReader(array_metadata_store=None)))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            restored = checkpointer.restore(
                folder.resolve(),
                args=ocp.args.PyTreeRestore(
                    item=unflatten_dict({path: targets[path] for path in args}, sep="/"),
                    restore_args=unflatten_dict(args, sep="/"),
                ),
            )
    except Exception as error:
        raise UserError(
            f"{folder}: the stored parameters are damaged ({_first_line(error)}); convert or copy them again"
        ) from None
    flat = flatten_dict(restored, sep="/")
    flat |= {
        path: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), targets[path].sharding) for path, leaf in empty.items()
    }
    return unflatten_dict({path: flat[path] for path in wanted}, sep="/")


def _first_line(error: Exception) -> str:
    text = re.split(r" See full TensorStore details| \[tensorstore_spec=", str(error).strip())[0]
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"

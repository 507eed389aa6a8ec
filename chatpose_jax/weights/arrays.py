"""Parameter arrays on disk: writes Orbax checkpoints (OCDBT), and reads them as a whole or box by box."""

from __future__ import annotations

import asyncio
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict

from chatpose_jax.errors import UserError
from chatpose_jax.orbax_s3 import orbax_options
from chatpose_jax.storage import Location, absolute, kvstore, write_bytes
from chatpose_jax.weights.paths import by_path

Params = dict[str, Any]

COMMITTED = "commit_success.txt"
"""Orbax's mark of a complete checkpoint; in object stores it asks whether the file exists."""

_SHOWN = 8


def write_arrays(folder: Location, params: Params) -> None:
    """Writes arrays (numpy or jax, on any mesh, one process or many) as a new Orbax checkpoint ``folder``."""
    flat = {path: array for path, array in by_path(params).items() if array.size}
    save(folder, unflatten_dict(flat, sep="/"), None)


def save(folder: Location, tree: Params, registry: Any) -> None:
    options = {} if registry is None else {"type_handler_registry": registry}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, **options)
    with ocp.Checkpointer(handler, **orbax_options(folder)) as checkpointer:
        checkpointer.save(absolute(folder), args=ocp.args.PyTreeSave(tree))
    if jax.process_index() == 0:  # Orbax writes the writer's path into this mark, and folders are passed on
        write_bytes(folder / COMMITTED, "complete\n")


def read_metadata(folder: Location) -> dict[str, jax.ShapeDtypeStruct]:
    """Path → shape and dtype of each stored array. Raises UserError if the folder is not a complete Orbax checkpoint."""
    try:
        _check(folder)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), **orbax_options(folder)) as checkpointer:
            tree = checkpointer.metadata(absolute(folder)).item_metadata.tree
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in by_path(tree).items()}
    except Exception as error:  # Orbax and TensorStore raise many types
        raise UserError(
            f"{folder}: not a complete Orbax checkpoint ({_first_line(error)}); convert or copy it again"
        ) from None


def _check(folder: Location) -> None:
    """Raises if the arrays of a folder cannot be listed. Without this check Orbax fails in a thread and writes pages of log."""
    if not (folder / "_METADATA").is_file():
        raise FileNotFoundError("the file _METADATA is missing")
    store = ts.KvStore.open({"driver": "ocdbt", "base": kvstore(folder)}).result()
    headers = [key for key in store.list().result() if key.endswith(b"/.zarray")]
    if not headers:
        raise FileNotFoundError("no arrays are listed; manifest.ocdbt is missing or belongs to another checkpoint")
    for header in [store.read(key) for key in headers]:
        header.result()


class Stored:
    """Reads the arrays of a parameter folder box by box, and caches nothing."""

    def __init__(self, folder: Location):
        """Raises UserError if the folder is not a complete Orbax checkpoint."""
        self.shapes = read_metadata(folder)
        self.folder = absolute(folder)
        self._opened: dict[str, Any] = {}

    def under(self, prefix: str) -> list[str]:
        """The paths that begin with ``prefix``."""
        return [path for path in self.shapes if path.startswith(prefix)]

    def chunk(self, path: str) -> tuple[int, ...]:
        """The boxes in which an array is stored. Each is cheap to read at once."""
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
            arrays = {"driver": "ocdbt", "base": kvstore(self.folder), "path": path.replace("/", ".") + "/"}
            try:
                self._opened[path] = ts.open({"driver": "zarr", "kvstore": arrays}, open=True).result()
            except ValueError as error:
                raise UserError(
                    f"{self.folder}: {path} is damaged ({_first_line(error)}); convert or copy it again"
                ) from None
        return self._opened[path]


class _ArrayReader(ocp.type_handlers.ArrayHandler):
    """A reader that waits for all arrays. Orbax gives up at the first array that cannot be read and closes its event loop while others are still
    being read; Python then prints an error for each of them, besides the one that is raised.
    """

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        except Exception:
            await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
            raise


def read_arrays(folder: Location, abstract: Params) -> Params:
    """Reads the leaves of ``abstract`` as a nested dict of JAX arrays.

    abstract: nested ``jax.ShapeDtypeStruct``s; arrays are cast to their dtypes. A leaf without a sharding goes to the first local device.

    Raises UserError: one error for all leaves that are missing, extra or of another shape; damaged data.
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
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        with ocp.Checkpointer(handler, **orbax_options(folder)) as checkpointer:
            restored = checkpointer.restore(
                absolute(folder),
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

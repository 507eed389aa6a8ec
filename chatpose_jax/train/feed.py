"""Puts batches onto a mesh: which rows each process makes, and how these become one global array."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from chatpose_jax.errors import UserError
from chatpose_jax.models.sharding import RULES, batch_sharding


def row_shards(mesh: Mesh | None) -> int:
    """Number of parts into which the mesh splits the rows of a batch."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES.axes("batch", mesh))


def local_rows(mesh: Mesh | None, batch_size: int, accumulate: int = 1) -> np.ndarray | None:
    """The rows of a global batch that the devices of this process need; None means all. A global batch is ``accumulate`` consecutive micro-batches
    of ``batch_size`` rows.

    Raises UserError if a micro-batch cannot be split evenly.
    """
    if mesh is None:
        return None
    if batch_size % row_shards(mesh):
        raise UserError(
            f"train.batch_size={batch_size} must be a multiple of slices × data × fsdp = {row_shards(mesh)}, the parts into "
            "which train.mesh splits the rows of a batch"
        )
    micro = np.arange(batch_size)
    wanted = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    mine = np.unique(np.concatenate([micro[index] for index in wanted if index is not None]))
    return (np.arange(accumulate)[:, None] * batch_size + mine).reshape(-1)


def put(batch: Mapping[str, Any], mesh: Mesh | None, batch_size: int, accumulate: int = 1) -> dict[str, Any]:
    """The batch for a step: rows are sharded over the mesh, and several micro-batches get a leading axis.

    batch: the ``local_rows`` of a global batch, in their order. A process may have any rows, because devices that are neighbours in a mesh
    need not belong to the same process.
    """
    leading = int(accumulate > 1)
    local: dict[str, Any] = dict(batch)
    if leading:
        local = jax.tree.map(lambda x: x.reshape(accumulate, len(x) // accumulate, *x.shape[1:]), local)
    rows = local_rows(mesh, batch_size)
    if mesh is None or rows is None:
        return local
    sharding = batch_sharding(mesh, stacked=bool(leading))

    def place(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return np.take(x, np.searchsorted(rows, np.arange(batch_size)[index[leading]]), axis=leading)

        return jax.make_array_from_callback((*x.shape[:leading], batch_size, *x.shape[leading + 1 :]), sharding, part)

    return jax.tree.map(place, local)  # type: ignore[no-any-return]

"""Leaves straight onto devices. A process reads each byte that its devices need once, a block at a time, and hands every device
its part; large parameters come together in the devices' memory, never in the host's."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from chatpose_jax.weights.arrays import Params
from chatpose_jax.weights.leaves import Leaf
from chatpose_jax.weights.readers import Index

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

_BLOCK = 16 << 20
"""Bytes read at once. Larger blocks cost twice the system time: the allocator returns them to the kernel each time."""
_READERS = 2
"""Threads that read and transpose the next blocks while one is being handed out."""


def place(leaves: Mapping[str, Leaf], shardings: Shardings) -> Params:
    """Leaves as jax arrays, nested. In a multi-process run every process calls it."""
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        arrays = {path: _array(leaf, shardings(path, leaf.shape), pool) for path, leaf in leaves.items()}
    return unflatten_dict(arrays, sep="/")


def _array(leaf: Leaf, sharding: jax.sharding.Sharding, pool: concurrent.futures.Executor) -> jax.Array:
    shape = sharding.shard_shape(leaf.shape)
    shards = dict.fromkeys(sharding.addressable_devices_indices_map(leaf.shape))
    for parts in handed_out(leaf, sharding, pool):
        for device, start, part in parts:
            if part.shape == shape:
                shards[device] = part
            else:
                held = shards[device]
                shards[device] = _put(_empty(shape, leaf.dtype, device) if held is None else held, part, start)
        jax.block_until_ready([shards[device] for device, _, _ in parts])
    whole = [
        jnp.zeros(shape, leaf.dtype, device=device) if shard is None else _done(shard, leaf.dtype)
        for device, shard in shards.items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, whole, dtype=leaf.dtype)


Part = tuple[jax.Device, tuple[int, ...], jax.Array]


def handed_out(leaf: Leaf, sharding: jax.sharding.Sharding, pool: concurrent.futures.Executor) -> Iterator[list[Part]]:
    """Reads what this process's devices need of a leaf, block after block, and puts on every device its part of each.

    Yields for each block a list of device, place of the part in the device's shard, part. The host holds a few blocks,
    whatever the size of the leaf. What lies between the devices' shards is read with them.
    """
    wanted = {
        device: tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
        if index is not None
    }
    if not wanted:
        return
    span = tuple(
        slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in zip(*wanted.values())
    )
    boxes = [span] if leaf.nbytes <= _BLOCK else list(leaf.blocks(_BLOCK, (1,) * len(leaf.shape), span))
    for box, block in zip(boxes, _ahead(pool, leaf.read, boxes)):
        parts = []
        for device, index in wanted.items():
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(index, box)]
            if all(part.start < part.stop for part in both):
                values = block[tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(both, box))]
                start = tuple(a.start - b.start for a, b in zip(both, index))
                parts.append((device, start, jax.device_put(values, device)))
        jax.block_until_ready([part for _, _, part in parts])
        yield parts


def _ahead(
    pool: concurrent.futures.Executor, read: Callable[[Index], np.ndarray], boxes: list[Index]
) -> Iterator[np.ndarray]:
    """``map(read, boxes)`` by the pool, ``_READERS`` boxes ahead."""
    reading: collections.deque[concurrent.futures.Future[np.ndarray]] = collections.deque()
    for box in boxes:
        reading.append(pool.submit(read, box))
        if len(reading) > _READERS:
            yield reading.popleft().result()
    while reading:
        yield reading.popleft().result()


# A shard is put together as raw words: XLA's CPU backend would take a bfloat16 one through float32, whole, for each part.


def _empty(shape: tuple[int, ...], dtype: np.dtype, device: jax.Device) -> jax.Array:
    return jnp.zeros(shape, f"u{dtype.itemsize}", device=device)


@functools.partial(jax.jit, donate_argnums=0)
def _put(shard: jax.Array, part: jax.Array, start: tuple[int, ...]) -> jax.Array:
    """The shard with ``part`` in it at ``start``, in the same memory."""
    return jax.lax.dynamic_update_slice(shard, jax.lax.bitcast_convert_type(part, shard.dtype), start)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _typed(shard: jax.Array, dtype: np.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(shard, dtype)


def _done(shard: jax.Array, dtype: np.dtype) -> jax.Array:
    return shard if shard.dtype == dtype else _typed(shard, dtype)

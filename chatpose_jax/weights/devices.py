"""Loads leaves directly onto devices.

Each process reads every byte that its devices need once, block by block, and copies to each device its part of the block. Large parameters are
assembled in the memory of the devices, never on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from chatpose_jax.weights.arrays import Params
from chatpose_jax.weights.leaves import BLOCK, Leaf, read_ahead
from chatpose_jax.weights.readers import bounded

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def onto_devices(leaves: Mapping[str, Leaf], shardings: Shardings) -> Params:
    """The leaves as a nested dict of JAX arrays. In a run of several processes, every process calls it."""
    return unflatten_dict({path: _array(leaf, shardings(path, leaf.shape)) for path, leaf in leaves.items()}, sep="/")


def _array(leaf: Leaf, sharding: jax.sharding.Sharding) -> jax.Array:
    shape = sharding.shard_shape(leaf.shape)
    shards = dict.fromkeys(sharding.addressable_devices_indices_map(leaf.shape))
    for parts in device_parts(leaf, sharding):
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


def device_parts(leaf: Leaf, sharding: jax.sharding.Sharding) -> Iterator[list[Part]]:
    """Reads the parts of a leaf that this process's devices need, block by block, and the bytes between them. Yields for each block a list of
    (device, start in the device's shard, part). The host holds only a few blocks.
    """
    wanted = {
        device: bounded(index, leaf.shape)
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
        if index is not None
    }
    if not wanted:
        return
    span = tuple(
        slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in zip(*wanted.values())
    )
    boxes = [span] if leaf.nbytes <= BLOCK else list(leaf.blocks(BLOCK, (1,) * len(leaf.shape), span))
    for box, block in zip(boxes, read_ahead([functools.partial(leaf.read, box) for box in boxes])):
        parts = []
        for device, index in wanted.items():
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(index, box)]
            if all(part.start < part.stop for part in both):
                values = block[tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(both, box))]
                start = tuple(a.start - b.start for a, b in zip(both, index))
                parts.append((device, start, jax.device_put(values, device)))
        jax.block_until_ready([part for _, _, part in parts])
        yield parts


# A shard is assembled as unsigned integers: XLA's CPU backend would convert a bfloat16 shard to float32 and back for each part.


def _empty(shape: tuple[int, ...], dtype: np.dtype, device: jax.Device) -> jax.Array:
    return jnp.zeros(shape, f"uint{jax.dtypes.itemsize_bits(dtype)}", device=device)


@functools.partial(jax.jit, donate_argnums=0)
def _put(shard: jax.Array, part: jax.Array, start: tuple[int, ...]) -> jax.Array:
    """Writes ``part`` into the shard at ``start``, in place."""
    return jax.lax.dynamic_update_slice(shard, jax.lax.bitcast_convert_type(part, shard.dtype), start)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _typed(shard: jax.Array, dtype: np.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(shard, dtype)


def _done(shard: jax.Array, dtype: np.dtype) -> jax.Array:
    return shard if shard.dtype == dtype else _typed(shard, dtype)

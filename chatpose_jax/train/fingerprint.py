"""Hashes of arrays that do not depend on how they are sharded.

A checkpoint of adapters is useless with another base model than its own. The base is too large to store in the checkpoint, so the checkpoint
stores its hashes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

SEEDS = (0x9E3779B9, 0x7F4A7C15)


def fingerprint(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """Path -> 16 hex digits, for arrays of any shape, dtype and sharding; nothing is gathered.

    The bits of each element are mixed with its index, and the results summed modulo 2**32, with two seeds. Integer sums do not depend on
    the order, hence not on the mesh. The hash detects accidents, not forgeries. Every process must call it.
    """
    return {path: "".join(f"{int(word):08x}" for word in words) for path, words in _words(dict(arrays)).items()}


def _words(arrays: dict[str, jax.Array | np.ndarray]) -> dict[str, np.ndarray]:
    # Sums over all devices are replicated.
    return {path: np.asarray(x.addressable_data(0)) for path, x in _hashes(arrays).items()}


@jax.jit
def _hashes(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.stack([_hash(x, seed) for seed in SEEDS]) for path, x in arrays.items()}


def _hash(x: jax.Array, seed: int) -> jax.Array:
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(bits, f"uint{jax.dtypes.itemsize_bits(bits.dtype)}").astype(jnp.uint32)
    place = jnp.uint32(seed)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return _mix(bits ^ _mix(place)).sum(dtype=jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby 2011): every bit of the word changes half of the others."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)

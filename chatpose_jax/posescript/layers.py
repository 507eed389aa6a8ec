"""Layers of PoseScript's networks that behave as PyTorch's: linear and batch norm, with its initialisation, and dropout."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.layers import Linear as _Linear

Key = jax.Array | None
"""Random key of dropout. None means inference: no dropout, and batch norm by the statistics that were kept."""


def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform between ±1/sqrt(fan_in), fan_in being the second last axis: PyTorch's initialisation of linear layers."""
    return jax.random.uniform(key, shape, dtype, -1, 1) * shape[-2] ** -0.5


Linear = functools.partial(_Linear, bias=True, kernel_init=uniform)


def dropout(x: jax.Array, rate: float, key: Key) -> jax.Array:
    """Sets values to 0 with probability ``rate`` and divides the others by 1 - rate. Without a key, x itself."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def split_key(key: Key, count: int) -> list[Key]:
    """``count`` keys, or as many None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class BatchNorm(nnx.Module):
    """Batch norm over the first axis. In training it updates its running statistics as PyTorch does: momentum 0.1, unbiased variance."""

    def __init__(self, width: int):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(B, D) -> (B, D). train: normalise by the batch."""
        mean, var = self.mean[...], self.var[...]
        if train:
            count = x.shape[0]
            mean, var = x.mean(0), x.var(0)
            self.mean[...] += 0.1 * (mean - self.mean[...])
            self.var[...] += 0.1 * (var * count / max(count - 1, 1) - self.var[...])
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * self.scale[...] + self.bias[...]


def normalised(x: jax.Array) -> jax.Array:
    """x / ‖x‖ over the last axis."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

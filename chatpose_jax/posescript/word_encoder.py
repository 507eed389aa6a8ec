"""The text encoder of PoseScript's paper (ECCV 2022): a bidirectional GRU over word vectors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.posescript.layers import Key, Linear


class Gru(nnx.Module):
    """PyTorch's GRU, in one direction. Its gates stand in the order reset, update, new."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -1, 1) * hidden**-0.5

        linear = functools.partial(Linear, kernel_init=init, rngs=rngs)
        self.inputs, self.hidden = linear(inputs, 3 * hidden), linear(hidden, 3 * hidden)

    def __call__(self, x: jax.Array, valid: jax.Array, *, reverse: bool = False) -> jax.Array:
        """The state after the last valid step, or in reverse after the first one.

        x: (B, T, D). valid: (B, T) bool; other steps leave the state as it is. Returns (B, hidden).
        """

        def step(state: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            new, counts = at
            old = self.hidden(state)
            reset, update, fresh = jnp.split(new, 3, -1)
            old_reset, old_update, old_fresh = jnp.split(old, 3, -1)
            update = jax.nn.sigmoid(update + old_update)
            fresh = jnp.tanh(fresh + jax.nn.sigmoid(reset + old_reset) * old_fresh)
            return jnp.where(counts[:, None], (1 - update) * fresh + update * state, state), None

        start = jnp.zeros((len(x), self.hidden.kernel.shape[0]), x.dtype)
        state, _ = jax.lax.scan(step, start, (self.inputs(x).swapaxes(0, 1), valid.T), reverse=reverse)
        return state


class WordEncoder(nnx.Module):
    """Word vectors, a GRU in each direction, and both final states, forward first."""

    def __init__(self, words: int, latent: int = 512, word_width: int = 300, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (words, word_width)))
        self.forward, self.backward = (Gru(word_width, latent // 2, rngs=rngs) for _ in range(2))

    def __call__(self, tokens: jax.Array, lengths: jax.Array, key: Key = None) -> jax.Array:
        """tokens: (B, T) int32, padded at the end. lengths: (B,) tokens that count. Returns (B, latent)."""
        x = self.embedding[...][tokens]
        valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
        return jnp.concatenate([self.forward(x, valid), self.backward(x, valid, reverse=True)], -1)

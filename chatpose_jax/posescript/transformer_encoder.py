"""The text encoder of PoseScript's journal version and of PoseFix: a small transformer over the features of a frozen DistilBERT."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.layers import LayerNorm, make_layers
from chatpose_jax.posescript.distilbert import BASE_UNCASED, DistilBert, DistilBertConfig
from chatpose_jax.posescript.layers import Key, Linear, dropout, split_key
from chatpose_jax.settings import check_types, require


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the layers over DistilBERT, and of DistilBERT."""

    layers: int = 4
    heads: int = 4
    mlp: int = 1024
    dropout: float = 0.1
    distilbert: DistilBertConfig = BASE_UNCASED

    def __post_init__(self) -> None:
        check_types(self, "transformer")
        require(self, "transformer", "at least 1", lambda value: value >= 1, "layers", "heads", "mlp")
        require(self, "transformer", "at least 0 and less than 1", lambda value: 0 <= value < 1, "dropout")


RELEASED = TransformerConfig()


class _Layer(nnx.Module):
    """PyTorch's ``TransformerEncoderLayer`` as it is by default, post-LN, with GELU."""

    def __init__(self, config: TransformerConfig, width: int, *, rngs: nnx.Rngs):
        self.heads, self.rate = config.heads, config.dropout
        self.qkv, self.o = Linear(width, 3 * width, rngs=rngs), Linear(width, width, rngs=rngs)
        self.fc1, self.fc2 = Linear(width, config.mlp, rngs=rngs), Linear(config.mlp, width, rngs=rngs)
        self.norm1, self.norm2 = (LayerNorm(width, eps=1e-5, param_dtype=jnp.float32) for _ in range(2))

    def __call__(self, x: jax.Array, lengths: jax.Array, key: Key) -> jax.Array:
        keys = split_key(key, 4)
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(self.qkv(x), 3, -1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        valid = jnp.arange(x.shape[1]) < lengths[:, None]
        weights = jax.nn.softmax(jnp.where(valid[:, None, None], scores, -jnp.inf), -1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", dropout(weights, self.rate, keys[0]), v).reshape(x.shape)
        x = self.norm1(x + dropout(self.o(mixed), self.rate, keys[1]))
        inner = dropout(jax.nn.gelu(self.fc1(x), approximate=False), self.rate, keys[2])
        return self.norm2(x + dropout(self.fc2(inner), self.rate, keys[3]))


class TransformerEncoder(nnx.Module):
    """DistilBERT, ReLU, a linear, sines of the positions, transformer layers, and the mean over the tokens."""

    def __init__(self, config: TransformerConfig, latent: int = 512, *, rngs: nnx.Rngs):
        self.config = config
        self.distilbert = DistilBert(config.distilbert, rngs=rngs)
        self.projection = Linear(config.distilbert.width, latent, rngs=rngs)
        self.layers = make_layers(lambda rngs: _Layer(config, latent, rngs=rngs), config.layers, scan=True, rngs=rngs)

    def __call__(self, tokens: jax.Array, lengths: jax.Array, key: Key = None) -> jax.Array:
        """tokens: (B, T) int32, padded at the end. lengths: (B,) tokens that count. Returns (B, latent)."""
        features = jax.lax.stop_gradient(self.distilbert(tokens, lengths))
        x = self.projection(jax.nn.relu(features))
        first, *rest = split_key(key, 1 + self.config.layers)
        x = dropout(x + positions(x.shape[1], x.shape[2]), 0.1, first)

        def step(x: jax.Array, layer: tuple[_Layer, jax.Array | None]) -> tuple[jax.Array, None]:
            return layer[0](x, lengths, layer[1]), None

        x, _ = jax.lax.scan(step, x, (self.layers, None if key is None else jnp.stack(rest)))  # type: ignore[arg-type]
        valid = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        return (x * valid).sum(1) / lengths[:, None]


def positions(length: int, width: int) -> jax.Array:
    """(length, width): sine and cosine by turns (Vaswani et al. 2017)."""
    angles = jnp.arange(length)[:, None] * jnp.exp(jnp.arange(0, width, 2) * (-jnp.log(10000.0) / width))
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(length, width)

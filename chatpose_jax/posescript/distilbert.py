"""DistilBERT (Sanh et al. 2019), the text features of PoseScript's later encoders. It is not trained here and has no dropout."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.layers import LayerNorm, make_layers
from chatpose_jax.posescript.layers import Linear
from chatpose_jax.settings import check_types, require


@dataclasses.dataclass(frozen=True)
class DistilBertConfig:
    """Sizes of a DistilBERT; the defaults are those of distilbert-base-uncased."""

    vocabulary: int = 30522
    positions: int = 512
    width: int = 768
    layers: int = 6
    heads: int = 12
    mlp: int = 3072

    def __post_init__(self) -> None:
        check_types(self, "distilbert")
        names = [field.name for field in dataclasses.fields(self)]
        require(self, "distilbert", "at least 1", lambda value: value >= 1, *names)
        require(self, "distilbert", f"a multiple of heads={self.heads}", lambda n: n % self.heads == 0, "width")


BASE_UNCASED = DistilBertConfig()


class _Layer(nnx.Module):
    def __init__(self, config: DistilBertConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (Linear(width, width, rngs=rngs) for _ in range(4))
        self.attention_norm = LayerNorm(width, eps=1e-12, param_dtype=jnp.float32)
        self.fc1, self.fc2 = Linear(width, config.mlp, rngs=rngs), Linear(config.mlp, width, rngs=rngs)
        self.norm = LayerNorm(width, eps=1e-12, param_dtype=jnp.float32)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        q, k, v = (each(x).reshape(*x.shape[:2], self.heads, -1) for each in (self.q, self.k, self.v))
        mixed = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
        x = self.attention_norm(x + self.o(mixed.reshape(x.shape)))
        return self.norm(x + self.fc2(jax.nn.gelu(self.fc1(x), approximate=False)))


class DistilBert(nnx.Module):
    """Embeddings of tokens and positions, and post-LN transformer layers, stacked on a leading axis."""

    def __init__(self, config: DistilBertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.words = nnx.Param(jax.random.normal(rngs.params(), (config.vocabulary, config.width)) * 0.02)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (config.positions, config.width)) * 0.02)
        self.norm = LayerNorm(config.width, eps=1e-12, param_dtype=jnp.float32)
        self.layers = make_layers(lambda rngs: _Layer(config, rngs=rngs), config.layers, scan=True, rngs=rngs)

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """The last hidden states. tokens: (B, T) int32. lengths: (B,) tokens that count, at most ``config.positions``. Returns (B, T, width)."""
        places = jnp.minimum(jnp.arange(tokens.shape[1]), self.config.positions - 1)  # padding may be longer
        x = self.norm(self.words[...][tokens] + self.positions[...][places])
        x, _ = jax.lax.scan(lambda x, layer: (layer(x, lengths), None), x, self.layers)
        return x

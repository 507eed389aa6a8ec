"""The vision tower, a ViT with pre-LN: CLIP (Radford et al. 2021) or SigLIP (Zhai et al. 2023), up to the layer whose output LLaVA uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.attention import attention
from chatpose_jax.models.config import ModelConfig, VisionConfig
from chatpose_jax.models.layers import LayerNorm, Linear, make_layers
from chatpose_jax.models.remat import checkpoint
from chatpose_jax.models.sharding import constrain


class VisionAttention(nnx.Module):
    """Bidirectional multi-head attention with biases."""

    def __init__(self, config: VisionConfig, **kwargs: Any):
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(config.hidden_size, config.hidden_size, bias=True, axes=axes, **kwargs)
            for axes in (*(("embed", "heads"),) * 3, ("heads", "embed"))
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.num_heads, -1)

        k, v = (heads(proj(x)).swapaxes(1, 2) for proj in (self.k_proj, self.v_proj))
        return self.o_proj(attention(heads(self.q_proj(x)), k, v, None))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class VisionMLP(nnx.Module):
    """Linear, the activation of the configuration, Linear."""

    def __init__(self, config: VisionConfig, **kwargs: Any):
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True, **kwargs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True, axes=("mlp", "embed"), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


class VisionLayer(nnx.Module):
    """Pre-LN transformer block."""

    def __init__(self, config: VisionConfig, **kwargs: Any):
        norm = {"eps": config.layer_norm_eps, "param_dtype": kwargs["param_dtype"]}
        self.norm1 = LayerNorm(config.hidden_size, **norm)
        self.attn = VisionAttention(config, **kwargs)
        self.norm2 = LayerNorm(config.hidden_size, **norm)
        self.mlp = VisionMLP(config, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos_2d(side: int, width: int, class_token: bool) -> jax.Array:
    """(N, width) initial position embeddings of a tower that trains from scratch: zeros for a class token, then sines and cosines of row and
    column (Beyer et al. 2022, "Better plain ViT baselines"). CLIP initialises them near zero, which needs far more images to train.
    """
    frequencies = 1.0 / 10000 ** (jnp.arange(width // 4) / max(width // 4 - 1, 1))
    angles = jnp.arange(side)[:, None] * frequencies
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    rows, columns = jnp.repeat(waves, side, axis=0), jnp.tile(waves, (side, 1))
    grid = jnp.concatenate([rows, columns], axis=-1)
    return jnp.pad(grid, ((int(class_token), 0), (0, width - grid.shape[-1])))


class VisionTower(nnx.Module):
    """Images to patch features: the hidden states that ``VisionConfig.select_layer`` selects, without the class token and without the final
    LayerNorm (LLaVA-1.5, LLaVA-OneVision). Later blocks are not built.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.vision is not None
        vision = self.config = config.vision
        self.dtype = jnp.dtype(config.dtype)
        self.scan = config.scan_layers
        kwargs: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        width, param_dtype = vision.hidden_size, jnp.dtype(config.param_dtype)
        self.patch_embed = Linear(
            vision.patch_size**2 * 3, width, bias=vision.patch_bias, axes=(None, None), rngs=rngs, **kwargs
        )
        self.class_embedding = (
            nnx.Param(jax.random.normal(rngs.params(), (width,), param_dtype) * 0.02) if vision.class_token else None
        )
        self.position_embedding = nnx.Param(
            sincos_2d(vision.image_size // vision.patch_size, width, vision.class_token).astype(param_dtype)
        )
        self.pre_norm = (
            LayerNorm(width, eps=vision.layer_norm_eps, param_dtype=param_dtype) if vision.pre_norm else None
        )
        self.layers = make_layers(
            lambda rngs: VisionLayer(vision, rngs=rngs, **kwargs), vision.num_used_layers, scan=self.scan, rngs=rngs
        )

    def __call__(self, pixels: jax.Array, remat: str = "none") -> jax.Array:
        """(B, S, S, 3) normalised pixels -> (B, N, D), N = (S // patch)². remat: see ``models.remat``; matters only where the tower trains."""
        size = self.config.patch_size
        batch, side = pixels.shape[0], self.config.image_size // size
        seen = pixels[:, : side * size, : side * size].astype(self.dtype)
        patches = seen.reshape(batch, side, size, side, size, 3)
        x = self.patch_embed(patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * 3))
        if self.class_embedding is not None:
            cls = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (batch, 1, x.shape[-1]))
            x = jnp.concatenate([cls, x], axis=1)
        x = x + self.position_embedding[...].astype(self.dtype)
        x = constrain(x if self.pre_norm is None else self.pre_norm(x), "batch", None, None)

        def step(layer: VisionLayer, x: jax.Array) -> jax.Array:
            return constrain(layer(x), "batch", None, None)

        run = checkpoint(step, remat, scanned=self.scan)
        if self.scan:
            x, _ = jax.lax.scan(lambda x, layer: (run(layer, x), None), x, self.layers)
        else:
            for layer in self.layers:
                x = run(layer, x)
        return x if self.class_embedding is None else x[:, 1:]

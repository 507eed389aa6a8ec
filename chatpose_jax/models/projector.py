"""LLaVA-1.5's projector from vision features to decoder embeddings (Liu et al. 2023): Linear, GELU (erf), Linear.

LLaVA-1.6 and LLaVA-OneVision end each row of patches of a large image with a learned embedding, the newline. For a single picture at one resolution
they append it once, after the last patch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.layers import Linear


class Projector(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"bias": True, "dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        assert config.vision is not None
        width = config.text.hidden_size
        self.fc1 = Linear(config.vision.hidden_size, width, **kwargs)
        self.fc2 = Linear(width, width, axes=("mlp", "embed"), **kwargs)
        self.newline = (
            nnx.Param((jax.random.normal(rngs.params(), (width,)) * width**-0.5).astype(config.param_dtype))
            if config.image_newline
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, N, D_vision) -> (B, N, D), or (B, N + 1, D) with the newline."""
        x = self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
        if self.newline is None:
            return x
        end = jnp.broadcast_to(self.newline[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        return jnp.concatenate([x, end], axis=1)

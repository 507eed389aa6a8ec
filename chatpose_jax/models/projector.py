"""LLaVA-1.5's projector from vision features to decoder embeddings (Liu et al. 2023): Linear, GELU (erf), Linear."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.layers import Linear


class Projector(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"bias": True, "dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.fc1 = Linear(config.vision.hidden_size, config.text.hidden_size, **kwargs)
        self.fc2 = Linear(config.text.hidden_size, config.text.hidden_size, axes=("mlp", "embed"), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D_vision) -> (..., D)."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))

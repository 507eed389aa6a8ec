"""Initial weights of the parts of the model that no source has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.heads import create_head
from chatpose_jax.models.projector import Projector
from chatpose_jax.models.vision import VisionTower
from chatpose_jax.weights.paths import by_path


def initial(part: str, config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Initial weights of one part, by path, as for training."""
    state = _initialiser(part, config)(jax.random.key(seed))
    return {f"{part}/{path}": np.asarray(leaf) for path, leaf in by_path(state).items()}


@functools.lru_cache(maxsize=8)
def _initialiser(part: str, config: ModelConfig) -> Callable[[jax.Array], dict[str, Any]]:
    makers: dict[str, Callable[[nnx.Rngs], Any]] = {
        "vision": lambda rngs: VisionTower(config, rngs=rngs),
        "projector": lambda rngs: Projector(config, rngs=rngs),
        "pose_head": lambda rngs: create_head(config.head, config.text.hidden_size, rngs=rngs),
    }
    return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(makers[part](nnx.Rngs(key)))))

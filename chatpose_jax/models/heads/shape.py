"""The paper's head with body shape: ten betas beside the rotations, as in HMR (Kanazawa et al. 2018)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.heads.base import Distance, States
from chatpose_jax.models.heads.mlp import MLPHead
from chatpose_jax.models.heads.parts import RotationName, Start, last_linear
from smpl_jax.pose import Pose

BETAS = 10


class ShapeHead(MLPHead):
    """``mlp`` with one more layer on the same features, which starts at the mean body.

    weight: weight of the L1 on betas relative to the pose loss.
    """

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        rotation: RotationName = "6d",
        start: Start = "upright",
        weight: float = 0.1,
    ):
        super().__init__(width, rngs=rngs, rotation=rotation, start=start)
        self.weight = weight
        self.betas = last_linear(width, jnp.zeros(BETAS), rngs=rngs)

    def __call__(self, states: States, key: jax.Array) -> Pose:
        features = self.features(states.token)
        return Pose(self.rotations(features), "camera", betas=self.betas(features))

    def loss(
        self, states: States, target: Pose, mask: jax.Array, key: jax.Array, distance: Distance
    ) -> dict[str, jax.Array]:
        """The distance, and mean |Δβ| over the poses whose betas are known, unless ``distance`` already has a part ``betas``."""
        made = self(states, key)
        parts = distance(made, target, mask)
        if target.betas is None or "betas" in parts:
            return parts
        known = _known(target, mask)
        error = jnp.abs(made.betas - target.betas).mean(axis=-1)
        return {**parts, "betas": self.weight * jnp.where(known, error, 0).sum() / jnp.maximum(known.sum(), 1)}

    def counts(self, target: Pose, mask: jax.Array) -> dict[str, jax.Array]:
        return {} if target.betas is None else {"betas": _known(target, mask).sum()}


def _known(target: Pose, mask: jax.Array) -> jax.Array:
    """(B, P), the poses whose betas are known."""
    return mask if target.has_betas is None else mask & target.has_betas

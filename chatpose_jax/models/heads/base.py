"""What a pose head is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class PoseHead(nnx.Module):
    """Maps the hidden state that predicts a pose token to joint rotations, and says how it is trained.

    A subclass takes ``(width, num_joints, *, rngs, **options)`` and implements ``__call__``; ``loss`` may be replaced.
    """

    def __init__(self, width: int, num_joints: int, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """(..., D) final-norm hidden states -> (..., J, 3, 3) float32 rotation matrices, joint 0 the global orientation."""
        raise NotImplementedError

    def loss(self, hidden: jax.Array, target: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """The paper's pose loss: mean |ΔR| of the body joints plus mean |ΔR| of the root, over the poses that exist.

        Args:
            hidden: (N, D) states that predict pose tokens.
            target: (N, J, 3, 3) rotation matrices.
            mask: (N,) True where row n holds a pose.

        Returns:
            Named float32 scalars; their sum is what λ_θ multiplies. Without any pose all are 0.
        """
        error = jnp.abs(self(hidden) - target).mean(axis=(-2, -1))
        weight = mask.astype(jnp.float32) / jnp.maximum(mask.sum(), 1)
        return {"pose_root": error[:, 0] @ weight, "pose_body": error[:, 1:].mean(axis=-1) @ weight}

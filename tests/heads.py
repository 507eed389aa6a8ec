"""What tests ask of a pose head."""

from __future__ import annotations

import jax

from chatpose_jax.models.chatpose import ChatPoseModel
from chatpose_jax.models.heads.base import States


def matrices(model: ChatPoseModel, hidden: jax.Array) -> jax.Array:
    """(..., D) states that predict pose tokens -> (..., J, 3, 3)."""
    poses = model.poses(States(hidden.reshape(1, -1, hidden.shape[-1])), jax.random.key(0)).rotations
    return poses.reshape(*hidden.shape[:-1], *poses.shape[2:])

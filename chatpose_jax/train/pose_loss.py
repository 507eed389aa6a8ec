"""How far a predicted pose is from its target."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from smpl_jax.pose import Pose


def matrices(predicted: Pose, target: Pose, mask: jax.Array) -> dict[str, jax.Array]:
    """The paper's: mean |ΔR| of the root, and mean |ΔR| of the other joints, over the poses that exist."""
    error = jnp.abs(predicted.rotations - target.rotations).mean(axis=(-2, -1)).reshape(-1, target.num_joints)
    weight = mask.reshape(-1).astype(jnp.float32) / jnp.maximum(mask.sum(), 1)
    return {"pose_root": error[:, 0] @ weight, "pose_body": error[:, 1:].mean(axis=-1) @ weight}

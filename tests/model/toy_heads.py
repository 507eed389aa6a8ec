"""Pose heads of nobody's package: one that reads the whole conversation, one that draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.heads.base import PoseHead, States
from chatpose_jax.models.layers import Linear
from smpl_jax.pose import Pose
from smpl_jax.rotations import rotation_6d_to_matrix


class Looking(PoseHead):
    """Attends from the token's state to all that came before. Its weights are large, so that a wrong state shows in the pose."""

    reads = "conversation"

    def __init__(self, width: int, *, rngs: nnx.Rngs, sharpness: float = 1.0):
        self.sharpness = sharpness
        self.query = Linear(width, width, rngs=rngs)
        self.out = Linear(2 * width, self.num_joints * 6, bias=True, rngs=rngs)

    def __call__(self, states: States, key: jax.Array) -> Pose:
        assert states.conversation is not None and states.before is not None
        seen = states.conversation.astype(jnp.float32)
        scores = self.sharpness * jnp.einsum("bpd,btd->bpt", self.query(states.token), seen) / seen.shape[-1]
        weights = jax.nn.softmax(jnp.where(states.before, scores, -jnp.inf), axis=-1)
        x = self.out(jnp.concatenate([states.token, jnp.einsum("bpt,btd->bpd", weights, seen)], axis=-1))
        return Pose(rotation_6d_to_matrix(x.reshape(*x.shape[:-1], self.num_joints, 6), order="columns"), "camera")


class Drawing(PoseHead):
    """Adds noise to what one layer says; gives a shape and a place too."""

    draws = True

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.out = Linear(width, self.num_joints * 6 + 10 + 3, bias=True, rngs=rngs)

    def __call__(self, states: States, key: jax.Array) -> Pose:
        x = self.out(states.token)
        x = x + 0.1 * jax.random.normal(key, x.shape)
        turns, betas, place = jnp.split(x, [self.num_joints * 6, self.num_joints * 6 + 10], axis=-1)
        rotations = rotation_6d_to_matrix(turns.reshape(*turns.shape[:-1], self.num_joints, 6), order="columns")
        return Pose(rotations, "camera", betas=betas, translation=place)

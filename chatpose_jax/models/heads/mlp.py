"""The paper's pose head: Linear, ReLU, Linear to 6D rotations (Feng et al. 2024, section 3; layer sizes [D, D, 144])."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.heads.base import PoseHead, States
from chatpose_jax.models.layers import Linear
from smpl_jax.pose import Pose
from smpl_jax.rotations import rotation_6d_to_matrix


class MLPHead(PoseHead):
    """6D columns (Zhou et al. 2019 in HMR2's order) through Gram–Schmidt. Starts at the identity, where Gram–Schmidt is well behaved."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, width, bias=True, rngs=rngs)
        self.fc2 = Linear(width, self.num_joints * 6, bias=True, axes=("mlp", "embed"), rngs=rngs)
        self.fc2.kernel[...] = self.fc2.kernel[...] * 0.1
        self.fc2.bias[...] = jnp.tile(jnp.array([1.0, 0, 0, 0, 1, 0]), self.num_joints)  # type: ignore[index]

    def __call__(self, states: States, key: jax.Array) -> Pose:
        x = self.fc2(jax.nn.relu(self.fc1(states.token)))
        return Pose(rotation_6d_to_matrix(x.reshape(*x.shape[:-1], self.num_joints, 6), order="columns"), "camera")

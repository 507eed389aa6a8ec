"""The paper's pose head: Linear, ReLU, Linear to 6D rotations (Feng et al. 2024, section 3; layer sizes [D, D, 144])."""

from __future__ import annotations

import jax
from flax import nnx

from chatpose_jax.models.heads.base import PoseHead, States
from chatpose_jax.models.heads.parts import ROTATIONS, RotationName, Start, last_linear, start_numbers
from chatpose_jax.models.layers import Linear
from smpl_jax.pose import Pose


class MLPHead(PoseHead):
    """rotation: the representation of a joint in the output, a row of ``parts.ROTATIONS``. start: see ``parts.start_numbers``."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, rotation: RotationName = "6d", start: Start = "upright"):
        self.rotation = rotation
        self.fc1 = Linear(width, width, bias=True, rngs=rngs)
        self.fc2 = last_linear(width, start_numbers(rotation, self.num_joints, start), axes=("mlp", "embed"), rngs=rngs)

    def features(self, token: jax.Array) -> jax.Array:
        """(..., D) -> (..., D), the input of the last layer."""
        return jax.nn.relu(self.fc1(token))

    def rotations(self, features: jax.Array) -> jax.Array:
        """(..., D) -> (..., J, 3, 3)."""
        numbers = self.fc2(features).reshape(*features.shape[:-1], self.num_joints, -1)
        return ROTATIONS[self.rotation].to_matrix(numbers)

    def __call__(self, states: States, key: jax.Array) -> Pose:
        return Pose(self.rotations(self.features(states.token)), "camera")

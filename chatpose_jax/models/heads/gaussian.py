"""A mean rotation and a covariance for each joint: a Gaussian in the tangent space at the mean, mapped to rotations by the exponential map
(Barfoot & Furgale 2014; Falorsi et al. 2019, section 4.1)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chatpose_jax.models.heads.base import Distance, PoseHead, States
from chatpose_jax.models.heads.parts import ROTATIONS, last_linear, measured_count, measured_mean, start_numbers
from chatpose_jax.models.layers import Linear
from chatpose_jax.settings import one_line
from smpl_jax.pose import Pose
from smpl_jax.rotations import axis_angle_to_matrix, exponential_volume, matrix_to_axis_angle

LEAST, LARGEST = 0.02, 1.5
"""Bounds of a standard deviation in radians: about 1 and 86 degrees."""
TRIES = 8
"""Attempts of rejection sampling. At the largest deviations one attempt is beyond π with probability 0.22, all of them with probability 6e-6."""

# Lebedev quadrature with 26 points on the sphere, exact to degree 7. One octant is enough for functions that are even in every axis.
_DIRECTIONS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]], np.float32)
_DIRECTIONS /= np.linalg.norm(_DIRECTIONS, axis=1, keepdims=True)
_WEIGHTS = np.array([2 / 21] * 3 + [16 / 105] * 3 + [9 / 35], np.float32)


class Rotations(NamedTuple):
    """Distributions of rotations ``mean · exp(axes · z)``, where z is normal with standard deviations ``deviations``, truncated to |z| < π.

    mean: (..., 3, 3). axes: (..., 3, 3), the principal axes of the covariance as columns, in the joint's own frame. deviations: (..., 3), radians.
    """

    mean: jax.Array
    axes: jax.Array
    deviations: jax.Array

    def __repr__(self) -> str:
        return one_line(self)

    def log_density(self, rotation: jax.Array) -> jax.Array:
        """(..., 3, 3) -> (...), in nats, under the Haar measure of total mass 1: a uniform distribution has 0 everywhere."""
        tangent = matrix_to_axis_angle(_product("...ji,...jk->...ik", self.mean, rotation))
        z = _product("...ji,...j->...i", self.axes, tangent) / self.deviations
        normal = (
            -0.5 * jnp.sum(z * z, axis=-1) - jnp.sum(jnp.log(self.deviations), axis=-1) - 1.5 * math.log(2 * math.pi)
        )
        # The exponential map takes the ball |tangent| < π to all rotations, each once. Their volume is 8 π².
        return normal - jnp.log(self._within()) - jnp.log(exponential_volume(tangent)) + math.log(8 * math.pi**2)

    def sample(self, key: jax.Array) -> jax.Array:
        """One rotation of each distribution, (..., 3, 3)."""
        draws = jax.random.normal(key, (TRIES, *self.deviations.shape)) * self.deviations
        first = jnp.argmax(jnp.sum(draws * draws, axis=-1) < math.pi**2, axis=0)
        z = jnp.take_along_axis(draws, first[None, ..., None], axis=0)[0]
        return _product(
            "...ij,...jk->...ik", self.mean, axis_angle_to_matrix(_product("...ij,...j->...i", self.axes, z))
        )

    def _within(self) -> jax.Array:
        """(...), the normal distribution's mass in the ball: the CDF of a χ distribution (3 degrees of freedom), averaged over all directions."""
        edge = math.pi / jnp.linalg.norm(self.deviations[..., None, :] * _DIRECTIONS, axis=-1)
        mass = jax.lax.erf(edge / math.sqrt(2)) - math.sqrt(2 / math.pi) * edge * jnp.exp(-0.5 * edge**2)
        return jnp.sum(mass * _WEIGHTS, axis=-1)


class GaussianHead(PoseHead):
    """The paper's two layers, with 15 numbers for each joint: mean and principal axes in 6D, and three bounded standard deviations.

    ``__call__`` gives the mean, which is also the most likely pose. ``sample`` draws all samples but the first. Joints are independent of each other.
    """

    draws = True

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, width, bias=True, rngs=rngs)
        mean, axes = (start_numbers("6d", self.num_joints, where) for where in ("upright", "identity"))
        start = jnp.concatenate([mean, axes, jnp.zeros((self.num_joints, 3))], axis=1)
        self.fc2 = last_linear(width, start, axes=("mlp", "embed"), rngs=rngs)

    def distribution(self, token: jax.Array) -> Rotations:
        """(..., D) -> distributions of batch shape (..., J)."""
        numbers = self.fc2(jax.nn.relu(self.fc1(token))).reshape(*token.shape[:-1], self.num_joints, 15)
        mean, axes = (ROTATIONS["6d"].to_matrix(part) for part in (numbers[..., :6], numbers[..., 6:12]))
        return Rotations(mean, axes, LEAST + (LARGEST - LEAST) * jax.nn.sigmoid(numbers[..., 12:]))

    def __call__(self, states: States, key: jax.Array) -> Pose:
        return Pose(self.distribution(states.token).mean, "camera")

    def sample(self, states: States, key: jax.Array, count: int) -> Pose:
        """The first sample is the mean, because the answer shows it; the others are random."""
        distribution = self.distribution(states.token)
        drawn = jax.vmap(distribution.sample)(jax.random.split(key, count))
        return Pose(drawn.at[0].set(distribution.mean), "camera")

    def log_likelihood(self, states: States, pose: Pose) -> jax.Array:
        """(B, P, J) nats for each joint of ``pose``; their sum is that of the pose. The Haar measure of each rotation has total mass 1."""
        return self.distribution(states.token).log_density(pose.rotations)

    def loss(
        self, states: States, target: Pose, mask: jax.Array, key: jax.Array, distance: Distance
    ) -> dict[str, jax.Array]:
        """Mean negative log-likelihood of a measured joint. ``distance`` is not used."""
        return {"pose_nll": -measured_mean(self.log_likelihood(states, target), target, mask)}

    def counts(self, target: Pose, mask: jax.Array) -> dict[str, jax.Array]:
        return {"pose_nll": measured_count(target, mask)}


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)

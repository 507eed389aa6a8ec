"""A rectified flow from noise to the 6D rotations of all joints (Liu, Gong & Liu 2023), conditioned on the token's state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.heads.base import Distance, PoseHead, States
from chatpose_jax.models.heads.parts import ROTATIONS, last_linear, measured_count, measured_mean, sizes, start_numbers
from chatpose_jax.models.layers import Linear, RMSNorm
from smpl_jax.pose import Pose
from smpl_jax.rotations import matrix_to_rotation_6d

FREQUENCIES = 8
"""Frequencies of the time embedding: sines and cosines of π t, 2 π t, 4 π t, …"""


class Block(nnx.Module):
    """A pre-norm residual layer. The condition is added to its input."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(width, eps=1e-6, param_dtype=jnp.float32)
        self.fc1 = Linear(width, 2 * width, bias=True, rngs=rngs)
        self.fc2 = Linear(2 * width, width, bias=True, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        return x + self.fc2(jax.nn.silu(self.fc1(self.norm(x) + condition)))


class FlowHead(PoseHead):
    """x_t = (1 - t) noise + t pose, in the 6 J numbers of all joints together, so that the sampled joints fit each other.

    6D is a vector space, so straight lines make sense, and Gram–Schmidt turns any result into rotations. Axis-angles and quaternions have a
    discontinuity that such lines would cross. The network predicts the end of the line, E[pose | x_t]. The velocity is
    (end - x_t) / (1 - t). So a fresh head starts upright, as the other heads do, and the last step of Euler's method lands on a predicted end.

    steps: Euler steps for each sample. hidden, layers: width and depth of the network.
    """

    draws = True

    def __init__(self, width: int, *, rngs: nnx.Rngs, steps: int = 8, hidden: int = 512, layers: int = 3):
        sizes(steps=steps, hidden=hidden, layers=layers)
        self.steps = steps
        size = 6 * self.num_joints
        self.state = Linear(width, hidden, bias=True, axes=(None, None), rngs=rngs)
        self.time = Linear(2 * FREQUENCIES, hidden, axes=(None, None), rngs=rngs)
        self.numbers = Linear(size, hidden, bias=True, axes=(None, None), rngs=rngs)
        self.layers = nnx.List([Block(hidden, rngs=rngs) for _ in range(layers)])
        self.norm = RMSNorm(hidden, eps=1e-6, param_dtype=jnp.float32)
        self.end = last_linear(hidden, start_numbers("6d", self.num_joints), rngs=rngs)

    def predict(self, token: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Predicts the end of the line through ``x``.

        token (..., D), x (..., 6 J), t (...) in [0, 1) -> (..., 6 J).
        """
        angles = t[..., None] * jnp.pi * 2 ** jnp.arange(FREQUENCIES)
        condition = self.state(token) + self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
        y = self.numbers(x)
        for layer in self.layers:
            y = layer(y, condition)
        return self.end(self.norm(y))

    def __call__(self, states: States, key: jax.Array) -> Pose:
        batch = states.token.shape[:-1]

        def euler(i: jax.Array, x: jax.Array) -> jax.Array:
            t = jnp.full(batch, i / self.steps, jnp.float32)
            return x + (self.predict(states.token, x, t) - x) / (self.steps - i)

        x = jax.random.normal(key, (*batch, 6 * self.num_joints))
        x = jax.lax.fori_loop(0, self.steps, euler, x)
        return Pose(ROTATIONS["6d"].to_matrix(x.reshape(*batch, self.num_joints, 6)), "camera")

    def loss(
        self, states: States, target: Pose, mask: jax.Array, key: jax.Array, distance: Distance
    ) -> dict[str, jax.Array]:
        """Mean squared error of the predicted end, at one t and one noise sample for each pose. ``distance`` is not used."""
        times, noise = jax.random.split(key)
        end = matrix_to_rotation_6d(target.rotations, order="columns")
        t = jax.random.uniform(times, mask.shape)
        start = jax.random.normal(noise, end.shape)
        x = start + t[..., None, None] * (end - start)
        if target.measured is not None:  # filled-in joints must not tell the network anything about the measured ones
            x = jnp.where(target.measured[..., None], x, start)
        found = self.predict(states.token, x.reshape(*mask.shape, -1), t).reshape(end.shape)
        return {"pose_flow": measured_mean(jnp.mean((found - end) ** 2, axis=-1), target, mask)}

    def counts(self, target: Pose, mask: jax.Array) -> dict[str, jax.Array]:
        return {"pose_flow": measured_count(target, mask)}

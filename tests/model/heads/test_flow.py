"""A flow gives every pose that fits; a head with one answer gives what lies between them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.models.heads import create_head
from chatpose_jax.models.heads.base import States
from smpl_jax.pose import Pose
from smpl_jax.rotations import axis_angle_to_matrix, geodesic_distance

from .common import WIDTH, make, states, train

KEY = jax.random.key(0)


def test_learns_two_poses_where_mlp_learns_neither() -> None:
    """The same words, and half of the people lean to one side with all joints, half to the other."""
    sides = axis_angle_to_matrix(jnp.zeros((2, 24, 3)).at[:, :, 0].set(jnp.array([[1.0], [-1.0]])))
    given = States(jnp.ones((16, 1, WIDTH)))
    target = Pose(jnp.repeat(sides, 8, axis=0)[:, None], "camera")

    def distances(rotations: jax.Array) -> np.ndarray:
        """(N, 24, 3, 3) -> (N, 2), mean over joints, from either pose."""
        return np.asarray(geodesic_distance(rotations[:, None], sides).mean(axis=-1))

    flow = train(make("flow"), given, lambda key: target, steps=300, rate=0.005)
    drawn = distances(nnx.jit(lambda head: head.sample(States(given.token[:1]), KEY, 200))(flow).rotations[:, 0, 0])
    near = drawn < 0.3
    assert near.any(axis=1).mean() > 0.95 and near.mean(axis=0).min() > 0.25, near.mean(axis=0)
    mlp = train(make("mlp"), given, lambda key: target, steps=300, rate=0.005)
    assert distances(mlp(States(given.token[:1]), KEY).rotations[:, 0]).min() > 0.7


def test_samples_are_seeded_and_differ() -> None:
    head, given = make("flow"), states()
    draws = nnx.jit(lambda head: head.sample(given, KEY, 4))
    samples = draws(head)
    assert head.draws and samples.shape == (4, 2, 3)
    np.testing.assert_array_equal(samples.rotations, draws(head).rotations)
    assert geodesic_distance(samples.rotations[0], samples.rotations[1]).mean() > 1e-4


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match=r"model.head.options: steps must be a whole number of at least 1"):
        create_head(HeadConfig("flow", (("steps", 0),)), WIDTH, rngs=nnx.Rngs(0))

"""The paper's head is what it was before it had options, and ``shape`` is it with betas."""

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
from chatpose_jax.models.layers import Linear
from smpl_jax.pose import Pose
from smpl_jax.rotations import axis_angle_to_matrix, rotation_6d_to_matrix

from .common import WIDTH, l1, make, states

KEY = jax.random.key(0)


def test_mlp_has_the_parameters_and_numbers_of_the_first_release() -> None:
    """By hand: Linear, ReLU, Linear whose kernel starts at a tenth, with the identity as bias (the first release's start)."""
    rngs = nnx.Rngs(3)
    first = Linear(WIDTH, WIDTH, bias=True, rngs=rngs)
    second = Linear(WIDTH, 144, bias=True, rngs=rngs)
    config = HeadConfig("mlp", (("start", "identity"),))
    params = nnx.to_pure_dict(nnx.state(create_head(config, WIDTH, rngs=nnx.Rngs(3))))
    kernel, bias = second.kernel[...] * 0.1, jnp.tile(jnp.array([1.0, 0, 0, 0, 1, 0]), 24)
    expected = {
        "fc1": {"kernel": first.kernel[...], "bias": jnp.zeros(WIDTH)},
        "fc2": {"kernel": kernel, "bias": bias},
    }
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    token = states().token
    numbers = jax.nn.relu(token @ first.kernel[...]) @ kernel + bias
    found = create_head(config, WIDTH, rngs=nnx.Rngs(3))(states(), KEY).rotations
    np.testing.assert_allclose(found, rotation_6d_to_matrix(numbers.reshape(2, 3, 24, 6)), atol=1e-6)


def test_an_unknown_rotation_is_refused() -> None:
    with pytest.raises(UserError, match=r"the option rotation: expected .*'6d'.*'axis_angle', found '10d'"):
        create_head(HeadConfig("mlp", (("rotation", "10d"),)), WIDTH, rngs=nnx.Rngs(0))


def test_from_the_identity_the_papers_loss_grows_towards_half_a_turn() -> None:
    """Why heads start upright: upside down the L1 on matrices has a local minimum, in every direction."""
    upright = jnp.diag(jnp.array([1.0, -1, -1]))
    directions = jax.random.normal(KEY, (200, 3))
    turns = axis_angle_to_matrix(0.1 * directions / jnp.linalg.norm(directions, axis=1, keepdims=True))
    error = jnp.abs(turns - upright).mean(axis=(1, 2))
    assert (error > jnp.abs(jnp.eye(3) - upright).mean()).all()


def test_start_changes_nothing_but_the_bias() -> None:
    identity, upright = (
        create_head(HeadConfig("mlp", (("start", start),)), WIDTH, rngs=nnx.Rngs(0))
        for start in ("identity", "upright")
    )
    np.testing.assert_array_equal(identity.fc2.kernel[...], upright.fc2.kernel[...])
    resting = upright(States(jnp.zeros((1, 1, WIDTH))), KEY).rotations[0, 0]
    np.testing.assert_array_equal(resting[0], jnp.diag(jnp.array([1.0, -1, -1])))
    np.testing.assert_array_equal(resting[1:], np.broadcast_to(np.eye(3), (23, 3, 3)))
    with pytest.raises(UserError, match="the option start: expected 'upright' or 'identity', found 'upside'"):
        create_head(HeadConfig("mlp", (("start", "upside"),)), WIDTH, rngs=nnx.Rngs(0))


def test_shape_trains_betas_where_there_are_any() -> None:
    head, given = make("shape"), states()
    made = nnx.jit(lambda head: head(given, KEY))(head)
    assert made.betas.shape == (2, 3, 10) and jnp.abs(made.betas).max() < 0.5
    has = jnp.array([[True, False, True], [False, False, True]])
    mask = jnp.array([[True, True, False], [True, True, True]])
    target = Pose(
        made.rotations,
        "camera",
        betas=made.betas + jnp.arange(10) * jnp.where(has & mask, 1, 5)[..., None],
        has_betas=has,
    )
    parts = head.loss(given, target, mask, KEY, l1)
    assert parts["l1"] < 1e-6 and parts["betas"] == pytest.approx(0.1 * 4.5, rel=1e-5)
    nobody = head.loss(given, target, mask & ~has, KEY, l1)
    assert nobody["betas"] == 0

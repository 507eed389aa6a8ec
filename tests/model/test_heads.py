"""The registry of pose heads, and the paper's loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models import heads
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import HeadConfig, preset
from chatpose_jax.models.heads.mlp import MLPHead
from tests.numerics import LOSS


def test_unknown_head_and_refused_option_are_named() -> None:
    with pytest.raises(UserError, match=r"no pose head 'no_such'; the heads are .*mlp"):
        heads.create_head(HeadConfig("no_such"), 8, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"'mlp' refuses its options .*depth.*it knows none"):
        heads.create_head(HeadConfig("mlp", options=(("depth", 3),)), 8, rngs=nnx.Rngs(0))


def test_a_name_taken_twice_is_an_error() -> None:
    assert "mlp" in heads.head_names()
    with pytest.raises(ValueError, match="registered twice"):
        heads.register("mlp")(heads.PoseHead)


def test_a_head_that_makes_no_rotations_is_named_with_both_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Angles(heads.PoseHead):
        def __init__(self, width: int, num_joints: int, *, rngs: nnx.Rngs):
            self.linear = nnx.Linear(width, num_joints * 3, rngs=rngs)

        def __call__(self, hidden: jax.Array) -> jax.Array:
            return self.linear(hidden).reshape(*hidden.shape[:-1], -1, 3)

    monkeypatch.setitem(heads._REGISTRY, "angles", Angles)
    wrong = preset("tiny").replace(head=HeadConfig("angles"))
    with pytest.raises(
        UserError, match=r"'angles' makes float32 \(2, 24, 3\) .*expected rotation matrices, float32 \(2, 24, 3, 3\)"
    ):
        abstract_params(wrong)


@pytest.mark.parametrize("made", [jnp.zeros(()), {"text": jnp.zeros(())}, {"pose": jnp.zeros(2)}], ids=str)
def test_a_loss_that_is_no_dict_of_new_scalars_is_refused(monkeypatch: pytest.MonkeyPatch, made: object) -> None:
    class Odd(MLPHead):
        def loss(self, hidden: jax.Array, target: jax.Array, mask: jax.Array) -> Any:
            return made

    monkeypatch.setitem(heads._REGISTRY, "odd", Odd)
    with pytest.raises(UserError, match=r"the loss of pose head 'odd' is .*expected a dict of scalars"):
        abstract_params(preset("tiny").replace(head=HeadConfig("odd")))


def test_mlp_starts_near_the_identity_and_turns_any_state_into_rotations() -> None:
    head = heads.create_head(HeadConfig("mlp"), 16, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(head(jnp.zeros((1, 16))), np.broadcast_to(np.eye(3), (1, 24, 3, 3)))
    hidden = jax.random.normal(jax.random.key(1), (2, 5, 16)) * 100
    poses = head(hidden)
    assert poses.shape == (2, 5, 24, 3, 3)
    np.testing.assert_allclose(poses @ poses.swapaxes(-1, -2), np.broadcast_to(np.eye(3), poses.shape), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.det(poses), 1, atol=1e-5)


def test_loss_is_the_papers_and_ignores_rows_without_a_pose() -> None:
    head = heads.create_head(HeadConfig("mlp"), 16, rngs=nnx.Rngs(0))
    hidden = jax.random.normal(jax.random.key(1), (3, 16))
    target = jnp.asarray(np.random.default_rng(0).standard_normal((3, 24, 3, 3)), jnp.float32)
    loss = head.loss(hidden, target, jnp.array([True, False, True]))
    error = np.abs(np.asarray(head(hidden)) - np.asarray(target))[[0, 2]]
    assert loss["pose_root"] == pytest.approx(error[:, 0].mean(), rel=LOSS)
    assert loss["pose_body"] == pytest.approx(error[:, 1:].mean(), rel=LOSS)
    assert all(value == 0 for value in head.loss(hidden, target, jnp.zeros(3, bool)).values())

"""The table of pose heads, what a head must be, and the paper's loss."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models import heads
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import HeadConfig, ModelConfig, preset
from chatpose_jax.models.heads.base import PoseHead, States
from chatpose_jax.models.heads.mlp import MLPHead
from chatpose_jax.train.loss import PAPER_LOSS
from smpl_jax.pose import Pose
from tests.numerics import LOSS


def test_unknown_head_and_refused_option_are_named() -> None:
    with pytest.raises(UserError, match=r"no pose head 'no_such'; the heads are .*mlp"):
        heads.create_head(HeadConfig("no_such"), 8, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="pose head 'mlp' has no option 'depth'; its options are rotation, start"):
        heads.create_head(HeadConfig("mlp", options=(("depth", 3),)), 8, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", heads.HEADS)
def test_every_head_of_the_table_fits_every_model(name: str) -> None:
    abstract_params(preset("tiny").replace(head=HeadConfig(name)))


class Rest(PoseHead):
    """Gives the pose that the class says."""

    made: ClassVar[Any] = None

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, states: States, key: jax.Array) -> Any:
        return type(self).made(*states.token.shape[:2])


def eye(*shape: int, **more: Any) -> Pose:
    return Pose(jnp.broadcast_to(jnp.eye(3), (*shape, 3, 3)), **{"frame": "camera", **more})


WRONG = {
    "angles": (
        lambda b, p: jnp.zeros((b, p, 24, 3)),
        r"gives an array float32 \(2, 3, 24, 3\); expected a smpl_jax.pose.Pose",
    ),
    "joints": (lambda b, p: eye(b, p, 22), r"gives rotations float32 \(2, 3, 22, 3, 3\) .*\(2, 3, 24, 3, 3\)"),
    "frame": (lambda b, p: eye(b, p, 24, frame="model"), "gives poses in the frame 'model'; expected 'camera'"),
    "betas": (lambda b, p: eye(b, p, 24, betas=jnp.zeros((b, 10))), r"gives betas float32 \(2, 10\) .*\(2, 3, n\)"),
    "half": (lambda b, p: eye(b, p, 24, translation=jnp.zeros((b, p, 3), jnp.bfloat16)), "gives translation bfloat16"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_head_gives_is_checked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made, message = WRONG[name]
    monkeypatch.setattr(Rest, "made", staticmethod(made))
    monkeypatch.setitem(heads.HEADS, name, f"{__name__}:Rest")
    with pytest.raises(UserError, match=f"pose head '{name}' {message}"):
        abstract_params(preset("tiny").replace(head=HeadConfig(name)))


@pytest.mark.parametrize(("field", "value"), [("reads", "tokens"), ("num_joints", 23)])
def test_what_a_head_says_of_itself_is_checked(monkeypatch: pytest.MonkeyPatch, field: str, value: object) -> None:
    monkeypatch.setattr(Rest, field, value)
    monkeypatch.setitem(heads.HEADS, "rest", f"{__name__}:Rest")
    with pytest.raises(UserError, match=f"{field}={value!r}.*expected 'token' or 'conversation', and one of 22, 24"):
        abstract_params(preset("tiny").replace(head=HeadConfig("rest")))


class Late(MLPHead):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, rngs=rngs)
        self.reads = "conversation"


def test_what_a_head_says_of_itself_stands_in_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads.HEADS, "late", f"{__name__}:Late")
    with pytest.raises(UserError, match="pose head 'late' sets reads or draws in its constructor"):
        abstract_params(preset("tiny").replace(head=HeadConfig("late")))


class Odd(MLPHead):
    found: ClassVar[Any] = None

    def loss(self, *arguments: Any) -> Any:
        return type(self).found


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (jnp.zeros(()), r"is an array float32 \(\); expected a dict of scalars by name"),
        ({"pose": jnp.zeros(()), "text": jnp.zeros(())}, "has a part 'text', the name of another metric; none may be"),
        ({"pose": jnp.zeros(()), "more": jnp.zeros(2)}, r"has the part 'more', which is an array float32 \(2,\)"),
    ],
    ids=str,
)
def test_a_loss_that_is_no_dict_of_new_scalars_is_refused(
    monkeypatch: pytest.MonkeyPatch, made: object, words: str
) -> None:
    monkeypatch.setattr(Odd, "found", made)
    monkeypatch.setitem(heads.HEADS, "odd", f"{__name__}:Odd")
    with pytest.raises(UserError, match=f"the loss of pose head 'odd' {words}"):
        abstract_params(preset("tiny").replace(head=HeadConfig("odd")))


class Sampled(MLPHead):
    change: ClassVar[Any] = None

    def sample(self, states: States, key: jax.Array, count: int) -> Any:
        return type(self).change(super().sample(states, key, count))


SAMPLES = {
    "one": (lambda pose: pose[0], r"rotations float32 \(2, 3, 24, 3, 3\) .*expected float32 \(4, 2, 3, 24, 3, 3\)"),
    "array": (lambda pose: pose.rotations, r"an array float32 \(4, 2, 3, 24, 3, 3\); expected a smpl_jax.pose.Pose"),
    "more": (
        lambda pose: pose.replace(translation=jnp.zeros((*pose.shape, 3))),
        r"translation float32 \(4, 2, 3, 3\); expected nothing, because __call__ gives nothing",
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_what_sample_gives_is_checked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    change, words = SAMPLES[name]
    monkeypatch.setattr(Sampled, "change", staticmethod(change))
    monkeypatch.setitem(heads.HEADS, name, f"{__name__}:Sampled")
    with pytest.raises(UserError, match=rf"pose head '{name}': sample\(states, key, 4\) gives {words}"):
        abstract_params(preset("tiny").replace(head=HeadConfig(name)))


def test_a_number_of_joints_in_json_is_read_where_it_is_24() -> None:
    """Folders, and the states of runs, of before a head said itself how many joints it gives."""
    data = preset("tiny").to_json()
    assert "num_joints" not in data["head"]
    assert ModelConfig.from_json(data | {"head": {**data["head"], "num_joints": 24}}) == preset("tiny")
    with pytest.raises(UserError, match=r"model\.head\.num_joints=52: .*only 24"):
        ModelConfig.from_json(data | {"head": {**data["head"], "num_joints": 52}})


def test_options_that_cannot_be_a_key_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.head\.options: expected rows of \(name, value\)"):
        HeadConfig("mlp", (("sizes", {"first": 1}),))


@pytest.mark.parametrize("options", [("hidden", 64), (("hidden", 64, 3),), {"hidden": 64}, [("hidden", 64)]], ids=str)
def test_options_of_another_form_show_the_right_one(options: Any) -> None:
    with pytest.raises(UserError, match=r'model\.head\.options: expected rows .*such as \(\("hidden", 64\),\)'):
        HeadConfig("mlp", options)


def test_mlp_starts_upright_and_turns_any_state_into_rotations() -> None:
    head, key = heads.create_head(HeadConfig("mlp"), 16, rngs=nnx.Rngs(0)), jax.random.key(0)
    upright = np.broadcast_to(np.eye(3), (1, 1, 24, 3, 3)).copy()
    upright[..., 0, :, :] = np.diag([1, -1, -1])
    np.testing.assert_array_equal(head(States(jnp.zeros((1, 1, 16))), key).rotations, upright)
    poses = head(States(jax.random.normal(jax.random.key(1), (2, 5, 16)) * 100), key).rotations
    assert poses.shape == (2, 5, 24, 3, 3)
    np.testing.assert_allclose(poses @ poses.swapaxes(-1, -2), np.broadcast_to(np.eye(3), poses.shape), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.det(poses), 1, atol=1e-5)


def test_loss_is_the_papers_and_ignores_rows_without_a_pose() -> None:
    head, key = heads.create_head(HeadConfig("mlp"), 16, rngs=nnx.Rngs(0)), jax.random.key(0)
    states = States(jax.random.normal(jax.random.key(1), (3, 1, 16)))
    wanted = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 24, 3, 3)), jnp.float32)
    target = Pose(wanted, "camera")
    loss = head.loss(states, target, jnp.array([[True], [False], [True]]), key, PAPER_LOSS)
    error = np.abs(np.asarray(head(states, key).rotations) - np.asarray(wanted))[[0, 2], 0]
    assert loss["pose_root"] == pytest.approx(error[:, 0].mean(), rel=LOSS)
    assert loss["pose_body"] == pytest.approx(error[:, 1:].mean(), rel=LOSS)
    nothing = head.loss(states, target, jnp.zeros((3, 1), bool), key, PAPER_LOSS)
    assert all(value == 0 for value in nothing.values())

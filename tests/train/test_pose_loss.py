"""The terms of the pose loss: against plain NumPy, what they mask, and the keys of heads that draw."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from chatpose_jax.errors import UserError
from chatpose_jax.models import heads
from chatpose_jax.models.chatpose import bind, fake_batch, init_params
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.models.heads.base import States
from chatpose_jax.models.heads.mlp import MLPHead
from chatpose_jax.models.sharding import batch_sharding, make_mesh
from chatpose_jax.train.config import PoseTerm, TrainConfig
from chatpose_jax.train.pose_loss import TERMS, PoseLoss, demand_fields
from chatpose_jax.train.step import init_state, make_step
from smpl_jax import body as bodies
from smpl_jax import io
from smpl_jax.pose import Pose, complete, placed
from tests.numerics import GRADIENT, LOSS
from tests.train.test_step import CONFIG, SETTINGS, whole_loss

ALL: Any = tuple((term, 1.0) for term in TERMS)
MASK = np.array([[True, True], [True, False]])


def poses(seed: int, joints: int = 24, **more: Any) -> Pose:
    rng = np.random.default_rng(seed)
    rotations = Rotation.random(4 * joints, random_state=rng).as_matrix().reshape(2, 2, joints, 3, 3)
    values = {"betas": rng.normal(size=(2, 2, 10)), "translation": rng.normal(size=(2, 2, 3)), **more}
    return jax.tree.map(lambda x: x if x.dtype == bool else np.float32(x), Pose(rotations, "camera", **values))


def found(rows: Any, predicted: Pose, target: Pose, mask: np.ndarray = MASK) -> dict[str, float]:
    return {name: float(value) for name, value in jax.jit(PoseLoss(rows))(predicted, target, mask).items()}


def test_the_table_has_the_terms_of_the_settings() -> None:
    assert set(TERMS) == set(get_args(PoseTerm))


def test_terms_are_what_their_names_say() -> None:
    a, b = poses(0), complete(poses(1))
    x, y = (pose.rotations[MASK].astype(float) for pose in (a, b))
    angles = (Rotation.from_matrix(x.reshape(-1, 3, 3)).inv() * Rotation.from_matrix(y.reshape(-1, 3, 3))).magnitude()
    angles = angles.reshape(-1, 24)
    body = io.load_body()
    ours, theirs = (np.asarray(bodies.joints(body, pose.rotations[MASK], pose.betas[MASK])) for pose in (a, b))
    apart = np.linalg.norm((ours - ours[:, :1] - theirs + theirs[:, :1])[:, 1:], axis=-1)
    expected = {
        "pose_root": np.abs(x - y)[:, 0].mean(),
        "pose_body": np.abs(x - y)[:, 1:].mean(),
        "geodesic_root": angles[:, 0].mean(),
        "geodesic_body": angles[:, 1:].mean(),
        "joints": apart.mean(),
        "betas": np.abs(a.betas - b.betas)[MASK].mean(),
        "translation": np.abs(a.translation - b.translation)[MASK].mean(),
    }
    assert found(ALL, a, b) == pytest.approx(expected, rel=100 * LOSS)
    double = found(tuple((term, 2.0) for term, _ in ALL), a, b)
    assert double == pytest.approx({name: 2 * value for name, value in expected.items()}, rel=100 * LOSS)
    assert set(found((("matrices", 1.0),), a, b)) == {"pose_root", "pose_body"}


def test_what_was_not_measured_counts_in_no_mean_and_has_no_gradient() -> None:
    measured = np.random.default_rng(3).random((2, 2, 24)) < 0.7
    measured[..., 0] = [[False, True], [True, True]]
    has = np.array([[True, False], [True, True]])
    target = complete(poses(1, measured=measured, has_betas=has, has_translation=~has))
    predicted = jax.tree.map(jnp.asarray, poses(0))
    error = np.abs(np.asarray(predicted.rotations) - target.rotations).mean((-1, -2))
    counts = measured & MASK[..., None]
    values = found(ALL, predicted, target)
    assert values["pose_root"] == pytest.approx(error[..., 0][counts[..., 0]].mean(), rel=LOSS)
    assert values["pose_body"] == pytest.approx(error[..., 1:][counts[..., 1:]].mean(), rel=LOSS)
    apart = np.abs(np.asarray(predicted.betas) - target.betas)
    assert values["betas"] == pytest.approx(apart[has & MASK].mean(), rel=LOSS)
    apart = np.abs(np.asarray(predicted.translation) - target.translation)
    assert values["translation"] == pytest.approx(apart[~has & MASK].mean(), rel=LOSS)

    slopes = jax.grad(lambda p: sum(PoseLoss(ALL)(p, target, MASK).values()))(predicted)
    assert (np.asarray(slopes.rotations)[~counts] == 0).all()
    assert (np.abs(np.asarray(slopes.rotations)).max((-1, -2))[counts] > 0).all()
    assert (np.asarray(slopes.translation)[~(~has & MASK)] == 0).all()
    alone = jax.grad(lambda p: PoseLoss((("betas", 1.0),))(p, target, MASK)["betas"])(predicted)
    assert (np.asarray(alone.betas)[~(has & MASK)] == 0).all()

    parents = io.load_body().parents
    shown = np.asarray(placed(measured, parents))[..., 1:] & MASK[..., None]
    for joint, b, p in ((9, 0, 0), (20, 0, 1)):  # the position of a joint counts where everything above it was measured
        above, at = [], parents[joint]
        while at >= 0:
            above.append(at)
            at = parents[at]
        assert shown[b, p, joint - 1] == measured[b, p, above].all()


def test_nothing_measured_is_nothing() -> None:
    target = complete(poses(1, measured=np.zeros((2, 2, 24), bool)).replace(betas=None, translation=None))
    value, slopes = jax.value_and_grad(lambda p: sum(PoseLoss(ALL)(p, target, MASK).values()))(
        jax.tree.map(jnp.asarray, poses(0))
    )
    assert value == 0
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(slopes))
    equal = jax.grad(lambda p: sum(PoseLoss(ALL)(p, p, MASK).values()))(
        jax.tree.map(jnp.asarray, complete(poses(0)).replace(measured=None, has_betas=None, has_translation=None))
    )
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(equal))


@pytest.mark.parametrize("joints", [22, 52, 55])
def test_joints_of_other_families_go_by_what_they_share_with_smpl(joints: int) -> None:
    a, b = poses(0, joints), complete(poses(1, joints))
    full = [np.tile(np.eye(3, dtype=np.float32), (2, 2, 24, 1, 1)) for _ in range(2)]
    for out, pose in zip(full, (a, b)):
        out[..., :22, :, :] = pose.rotations[..., :22, :, :]
    betas = [None if joints == 55 else pose.betas for pose in (a, b)]  # SMPL-X's mean another shape for SMPL's body
    same = [Pose(x, "camera", betas=y) for x, y in zip(full, betas)]
    expected = found((("joints", 1.0),), same[0], complete(same[1]))
    assert found((("joints", 1.0),), a, b) == pytest.approx(expected, rel=100 * LOSS)


def test_the_joints_of_a_head_without_betas_use_the_targets() -> None:
    target = complete(poses(1))
    bare = poses(0).replace(betas=None)
    given = found((("joints", 1.0),), bare.replace(betas=target.betas), target)
    assert found((("joints", 1.0),), bare, target) == given


def test_the_step_holds_no_mesh() -> None:
    assert sum(np.size(x) for x in jax.tree.leaves(PoseLoss(ALL).body)) < 1000
    assert PoseLoss().body is None


@pytest.mark.parametrize("rows", [(), (("matrices", 0.0),), (("matrices", 1.0), ("matrices", 2.0)), (("angles", 1.0),)])
def test_wrong_terms_are_named(rows: Any) -> None:
    with pytest.raises(UserError, match=r"train\.pose_loss: expected"):
        TrainConfig(pose_loss=rows)


def test_terms_that_the_head_cannot_have_are_refused_before_anything_is_read() -> None:
    with pytest.raises(UserError, match="the term 'betas' needs a pose head that gives betas; 'mlp' does not"):
        demand_fields((("betas", 1.0),), HeadConfig("mlp"))
    demand_fields((("joints", 1.0), ("geodesic", 1.0)), HeadConfig("mlp"))
    demand_fields((("matrices", 1.0), ("betas", 0.1)), HeadConfig("shape"))


@pytest.mark.parametrize("name", ["flow", "gaussian"])
def test_terms_that_a_head_would_not_follow_are_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=f"train.pose_loss: the pose head '{name}' has its own loss, which uses no terms"
    ):
        demand_fields((("geodesic", 1.0),), HeadConfig(name))
    demand_fields(TrainConfig().pose_loss, HeadConfig(name))


# ------------------------------------------------------------------------------------------------------- in the step


class Noisy(MLPHead):
    """Draws in its loss, as a generative head does."""

    draws = True

    def loss(self, states: States, target: Pose, mask: jax.Array, key: jax.Array, distance: Any) -> Any:
        noise = jax.random.normal(key, states.token.shape)
        return distance(self(dataclasses.replace(states, token=states.token + noise), key), target, mask)


class Reader(MLPHead):
    """Adds the mean of what it may see of the conversation."""

    reads = "conversation"

    def __call__(self, states: States, key: jax.Array) -> Pose:
        assert states.conversation is not None and states.before is not None
        weight = states.before / states.before.sum(-1, keepdims=True)
        seen = jnp.einsum("bpt,btd->bpd", weight, states.conversation.astype(jnp.float32))
        return super().__call__(dataclasses.replace(states, token=states.token + seen), key)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    out = {}
    for kind in (Noisy, Reader):
        monkeypatch.setitem(heads.HEADS, kind.__name__, f"{__name__}:{kind.__name__}")
        lora = dataclasses.replace(CONFIG.lora, dropout=0.0)
        out[kind.__name__] = CONFIG.replace(head=HeadConfig(kind.__name__), lora=lora)
    return out


def run(config: Any, settings: TrainConfig, batches: Any, params: Any = None, steps: int = 1) -> tuple[Any, list[Any]]:
    params = init_params(config, jax.random.key(0)) if params is None else params
    state, frozen = init_state(settings, jax.tree.map(jnp.array, params))
    step, metrics = make_step(config, settings, params), []
    for batch in batches:
        state, values = step(state, frozen, batch)
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def test_a_head_that_draws_repeats_by_seed_and_step(toys: dict[str, Any]) -> None:
    config, batch = toys["Noisy"], fake_batch(CONFIG, batch=4, length=16)
    still = dataclasses.replace(SETTINGS, learning_rate=1e-12)
    first, again, other = (run(config, dataclasses.replace(still, seed=seed), [batch] * 2)[1] for seed in (0, 0, 1))
    assert first == again
    assert first[0]["pose_body"] != other[0]["pose_body"]
    assert first[0]["pose_body"] != first[1]["pose_body"], "each step draws anew"
    stacked = jax.tree.map(lambda x: np.stack([x, x]), jax.tree.map(lambda x: x[:2], batch))
    halves = run(config, dataclasses.replace(still, batch_size=2, accumulate=2), [stacked])[1]
    assert halves == run(config, dataclasses.replace(still, batch_size=2, accumulate=2), [stacked])[1]


def test_micro_batches_of_ragged_measurements_make_the_update_of_the_whole() -> None:
    """In all terms, and in the betas of the head's own loss."""
    config = CONFIG.replace(lora=dataclasses.replace(CONFIG.lora, dropout=0.0), head=HeadConfig("shape"))
    settings = dataclasses.replace(
        SETTINGS, batch_size=2, grad_clip=1e9, pose_loss=(("matrices", 1.0), ("geodesic", 0.5), ("joints", 2.0))
    )
    halves = [fake_batch(config, batch=2, length=16, seed=i) for i in range(2)]
    for seed, half in enumerate(halves):
        half["poses"].rotations[:] = poses(seed).rotations[:, :1]
        betas = np.random.default_rng(seed).standard_normal((2, 1, 10), np.float32)
        half["poses"] = half["poses"].replace(betas=betas, has_betas=np.ones((2, 1), bool))
    halves[0]["poses"].measured[:, :, 10:] = False
    halves[1]["poses"].measured[0, 0, :3] = False
    halves[1]["pose_mask"][1] = False
    halves[0]["poses"].has_betas[0] = False
    results = []
    for accumulate, join in ((1, np.concatenate), (2, np.stack)):
        batch = jax.tree.map(lambda *parts, join=join: join(parts), *halves)
        results.append(run(config, dataclasses.replace(settings, accumulate=accumulate), [batch]))
    (one, (whole,)), (two, (parts,)) = results
    assert parts == pytest.approx(whole, rel=GRADIENT) and parts["betas"] > 0
    for value, expected in zip(jax.tree.leaves(two.opt_state), jax.tree.leaves(one.opt_state), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=GRADIENT * np.abs(expected).max(initial=1e-8))


def test_in_packed_rows_a_pose_sees_its_own_conversation_up_to_it(toys: dict[str, Any]) -> None:
    config = toys["Reader"]
    apart = fake_batch(config, batch=2, length=9, images=1)
    length = apart["input_ids"].shape[1]
    segments = np.repeat([[1, 2, 0]], [length, length, 5], axis=1).astype(np.int32)
    index = apart["pose_index"] + np.array([[0], [length]], np.int32)
    params = init_params(config, jax.random.key(0))
    model = bind(config, params)
    hidden = model(apart["input_ids"], pixel_values=apart["pixel_values"]).hidden
    packed = jnp.concatenate([hidden.reshape(1, 2 * length, -1), jnp.ones((1, 5, hidden.shape[-1]))], axis=1)
    key = jax.random.key(0)
    expected = model.poses(model.states(hidden, apart["pose_index"]), key).rotations
    states = model.states(packed, index.reshape(1, 2), segments)
    np.testing.assert_allclose(model.poses(states, key).rotations[0], expected[:, 0], rtol=0, atol=1e-5)
    assert states.before is not None
    seen = [np.flatnonzero(row).tolist() for row in np.asarray(states.before[0])]
    assert seen == [list(range(index[0, 0] + 1)), list(range(length, index[1, 0] + 1))]

    # And through the loss.
    whole = {
        "input_ids": np.concatenate([*apart["input_ids"], np.zeros(5, np.int32)])[None],
        "labels": np.full((1, 2 * length + 5), -100, np.int32),
        "segment_ids": segments,
        "pixel_values": apart["pixel_values"].reshape(1, 2, *apart["pixel_values"].shape[2:]),
        "pose_index": index.reshape(1, 2),
        "poses": jax.tree.map(lambda x: x.reshape(1, 2, *x.shape[2:]), apart["poses"]),
        "pose_mask": apart["pose_mask"].reshape(1, 2),
    }
    apart["labels"][:] = -100
    values = [
        jax.jit(lambda params, batch: whole_loss(bind(config, params), batch, lambda_text=1.0, lambda_pose=1.0))(
            params, batch
        )[0]
        for batch in (apart, whole)
    ]
    assert float(values[1]) == pytest.approx(float(values[0]), rel=10 * LOSS)


def test_a_mesh_takes_the_step_of_one_device(toys: dict[str, Any]) -> None:
    """All terms that a head without betas can have, ragged measurements, a head that reads the conversation."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    config = toys["Reader"]
    settings = dataclasses.replace(
        SETTINGS, batch_size=8, pose_loss=(("matrices", 1.0), ("geodesic", 1.0), ("joints", 1.0))
    )
    batch = fake_batch(config, batch=8, length=16)
    batch["poses"].measured[3:, :, 5:] = False
    alone = run(config, settings, [batch])[1][0]
    mesh = make_mesh(2, 2, 2)
    params = init_params(config, jax.random.key(0), mesh)
    state, frozen = init_state(settings, params, mesh)
    placed_batch = jax.device_put(batch, batch_sharding(mesh))
    _, metrics = make_step(config, settings, params, mesh)(state, frozen, placed_batch)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(alone, rel=GRADIENT)

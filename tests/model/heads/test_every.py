"""What holds of every head in the box: where it starts, finite gradients, joints that were not measured, one real step."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from chatpose_jax.models.chatpose import abstract_params, fake_batch, init_params
from chatpose_jax.models.config import HeadConfig, preset
from chatpose_jax.models.sharding import partition_specs
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.step import init_state, make_step
from chatpose_jax.train.trainable import PAPER, assign, describe_trainable, flatten, unflatten
from smpl_jax.pose import Pose
from smpl_jax.rotations import axis_angle_to_matrix, geodesic_distance

from .. import small
from .common import HEADS, l1, make, states, train

KEY = jax.random.key(2)
UPRIGHT = jnp.broadcast_to(jnp.eye(3), (24, 3, 3)).at[0].set(jnp.diag(jnp.array([1.0, -1, -1])))


def poses(key: jax.Array, *shape: int) -> Pose:
    """Any poses, with betas, each joint measured or not."""
    turn, measured, betas = jax.random.split(key, 3)
    rotations = axis_angle_to_matrix(2 * jax.random.normal(turn, (*shape, 24, 3)))
    which = jax.random.bernoulli(measured, shape=(*shape, 24))
    has = jnp.ones(shape, bool)
    return Pose(rotations, "camera", betas=jax.random.normal(betas, (*shape, 10)), measured=which, has_betas=has)


@pytest.mark.parametrize("name", HEADS)
def test_starts_upright_with_finite_gradients_and_without_what_was_not_measured(name: str) -> None:
    graph, params = nnx.split(make(name))
    given, mask = states(), jnp.array([[True, True, False], [True, False, False]])

    @jax.jit
    def run(params: Any, target: Pose, mask: jax.Array) -> Any:
        def total(params: Any) -> Any:
            return sum(nnx.merge(graph, params).loss(given, target, mask, KEY, l1).values())

        return jax.value_and_grad(total)(params)

    made = jax.jit(lambda params: nnx.merge(graph, params)(given, KEY))(params)
    assert made.shape == (2, 3) and made.num_joints == 24 and made.frame == "camera"
    np.testing.assert_allclose(
        made.rotations @ made.rotations.mT, np.broadcast_to(np.eye(3), (2, 3, 24, 3, 3)), atol=1e-5
    )
    assert geodesic_distance(made.rotations, UPRIGHT).mean() < 0.5

    target = poses(KEY, 2, 3)
    half_a_turn = axis_angle_to_matrix(jnp.array([jnp.pi, 0, 0]))
    same = Pose(made.rotations, "camera", betas=target.betas, measured=target.measured, has_betas=target.has_betas)
    for wanted in (target, same, target.replace(rotations=made.rotations @ half_a_turn)):
        value, gradient = run(params, wanted, mask)
        assert jnp.isfinite(value) and all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))

    value, gradient = run(params, target, mask)
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(gradient)) > 0
    counts = (mask[..., None] & target.measured)[..., None, None]
    other = target.replace(
        rotations=jnp.where(counts, target.rotations, jnp.eye(3)), betas=jnp.where(mask[..., None], target.betas, 7)
    )
    for found, expected in zip(jax.tree.leaves(run(params, other, mask)), jax.tree.leaves((value, gradient))):
        np.testing.assert_array_equal(found, expected)
    nothing = target.replace(measured=jnp.zeros((2, 3, 24), bool), has_betas=jnp.zeros((2, 3), bool))
    assert all((x == 0).all() for x in jax.tree.leaves(run(params, nothing, mask)))
    assert all((x == 0).all() for x in jax.tree.leaves(run(params, target, jnp.zeros((2, 3), bool))))


@pytest.mark.parametrize("name", ["shape", "flow", "gaussian"])
def test_its_own_loss_is_a_mean_over_what_it_counts(name: str) -> None:
    """Ragged rows, each alone and all together. The flow draws other numbers for other batches, so only its counts compare."""
    graph, params = nnx.split(make(name))
    given, target = states(), poses(KEY, 2, 3)
    mask = jnp.array([[True, True, False], [True, False, False]])
    target = target.replace(has_betas=mask.at[0, 0].set(False))

    @jax.jit
    def run(given: Any, target: Pose, mask: jax.Array) -> Any:
        head = nnx.merge(graph, params)
        parts, counts = head.loss(given, target, mask, KEY, l1), head.counts(target, mask)
        return {part: parts[part] for part in counts}, counts

    everything = given, target, mask
    means, sizes = run(*everything)
    rows = [run(*jax.tree.map(lambda x, row=row: x[row : row + 1], everything)) for row in range(2)]
    measured = (mask[..., None] & target.measured).sum()
    assert sizes == {"betas": 2} if name == "shape" else list(sizes.values()) == [measured]
    assert all(sizes[part] == sum(row[1][part] for row in rows) for part in means)
    if name != "flow":
        for part, mean in means.items():
            assert mean * sizes[part] == pytest.approx(
                float(sum(row[0][part] * row[1][part] for row in rows)), rel=1e-5
            )


@pytest.mark.parametrize("name", ["mlp", "svd9d", "quaternion", "axis_angle", "queries", "gaussian"])
def test_learns_a_pose(name: str) -> None:
    """One pose, whatever is asked, of a person who does not quite face the camera."""
    rotations = UPRIGHT @ axis_angle_to_matrix(0.7 * jax.random.normal(KEY, (24, 3)))
    target = Pose(jnp.broadcast_to(rotations, (2, 3, 24, 3, 3)), "camera")
    given = states()
    head = train(make(name), given, lambda key: target, steps=400, rate=0.01)
    distance = geodesic_distance(nnx.jit(lambda head: head(given, KEY))(head).rotations, target.rotations)
    assert distance.max() < 0.2, distance.max(axis=(0, 1))


@pytest.mark.parametrize("name", ["mlp", "svd9d", "shape", "queries", "flow", "gaussian"])
def test_large_parameters_are_split_at_13b(name: str) -> None:
    on = AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    options = dict(HEADS[name].options) if HEADS[name].name == "mlp" else {}
    config = preset("chatpose_13b").replace(head=HeadConfig(HEADS[name].name, tuple(options.items())))
    params = flatten(abstract_params(config)["pose_head"], "pose_head/")
    specs = flatten(partition_specs(unflatten(params), on))
    whole = [path for path, x in params.items() if math.prod(x.shape) > 5e6 and not any(specs[path])]
    assert not whole


@pytest.mark.parametrize("name", ["mlp", "shape", "queries", "flow", "gaussian"])
def test_a_step_of_the_whole_model_trains_it(name: str) -> None:
    config = small.config(lora=None).replace(head=HEADS[name])
    settings = TrainConfig(trainable=PAPER[1:], accumulate=1)
    params = init_params(config, jax.random.key(0))
    state, frozen = init_state(settings, params)
    before = jax.tree.map(np.asarray, state.trainable)
    batch = fake_batch(config, length=8)
    state, metrics = make_step(config, settings, params)(state, frozen, batch)
    assert metrics["skipped"] == 0 and jnp.isfinite(metrics["loss"])
    heads = [path for path in before if path.startswith("pose_head/")]
    moved = {path for path in heads if (before[path] != state.trainable[path]).any()}
    assert len(heads) >= 4 and len(moved) > len(heads) / 2


@pytest.mark.parametrize("name", HEADS)
def test_all_of_it_is_in_the_table_of_what_trains(name: str) -> None:
    params = abstract_params(small.config(lora=None).replace(head=HEADS[name]))
    rows = assign(params, PAPER[1:])
    heads = [path for path in flatten(params) if path.startswith("pose_head/")]
    assert heads and all(rows[path] == PAPER[1] for path in heads)
    assert f"pose_head/.*{'':36} {len(heads):7d}" in describe_trainable(params, PAPER[1:])

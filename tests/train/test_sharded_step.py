"""The step over meshes of eight fake devices: what one device computes, and nothing whole where it should be split."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params, fake_batch, init_params
from chatpose_jax.models.config import LoRAConfig, preset
from chatpose_jax.models.sharding import batch_sharding, make_mesh
from chatpose_jax.planning import collectives
from chatpose_jax.train import trainable as table
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.step import abstract_state, init_state, make_step
from tests.numerics import GRADIENT, TRAINED

TINY = preset("tiny")
CONFIG = TINY.replace(
    vision=dataclasses.replace(TINY.vision, image_size=32, hidden_size=32, intermediate_size=64, num_layers=3),
    text=dataclasses.replace(
        TINY.text, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=8
    ),
    lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.1),
)
SETTINGS = TrainConfig(steps=10, batch_size=8, accumulate=1, warmup_steps=1, learning_rate=1e-2, remat="save_qkv")


SLOW = pytest.mark.slow
MESHES = [
    (1, 8, 1),
    (1, 4, 2),
    (1, 4, 1, 2),
    *(pytest.param(sizes, marks=SLOW) for sizes in [(1, 2, 2, 2), (1, 1, 1), (1, 1, 8)]),
]


def train(sizes, settings=SETTINGS, config=CONFIG, steps=1):
    if sizes is not None and jax.device_count() < np.prod(sizes):
        pytest.skip(f"needs {np.prod(sizes)} devices")
    mesh = None if sizes is None else make_mesh(*sizes)
    params = init_params(config, jax.random.key(0), mesh)
    state, frozen = init_state(settings, params, mesh)
    step = make_step(config, settings, abstract_params(config), mesh)
    metrics = []
    for seed in range(steps):
        batch = fake_batch(config, batch=8, length=20, seed=seed)
        if settings.accumulate > 1:
            batch = jax.tree.map(lambda x: x.reshape(settings.accumulate, -1, *x.shape[1:]), batch)
        if mesh is not None:
            batch = jax.device_put(batch, batch_sharding(mesh, stacked=settings.accumulate > 1))
        state, values = step(state, frozen, batch)
        metrics.append({name: float(value) for name, value in values.items()})
    return state, frozen, metrics


@pytest.fixture(scope="module")
def alone():
    return train(None)


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_takes_the_same_steps(alone, sizes):
    state, frozen, metrics = train(sizes)
    for ours, expected in zip(metrics, alone[2], strict=True):
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, rel=TRAINED, abs=1e-6), name
    # The first moments are the gradients, averaged: equal ones mean equal gradients, which Adam's updates would hide.
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(state.opt_state), jax.tree.leaves(alone[0].opt_state), strict=True
    ):
        expected = np.asarray(expected)
        largest = GRADIENT * max(np.abs(expected).max(), 1e-8)
        np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=largest, err_msg=str(path))
    for path, value in frozen.items():
        np.testing.assert_array_equal(value, alone[1][path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_slices_of_four_are_one_of_eight(accumulate):
    """Several steps, dropout included."""
    settings = dataclasses.replace(SETTINGS, batch_size=8 // accumulate, accumulate=accumulate)
    fsdp = 8 // accumulate
    one, two = (train(sizes, settings, steps=4) for sizes in ((1, fsdp, accumulate), (1, fsdp // 2, accumulate, 2)))
    for ours, expected in zip(two[2], one[2], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=TRAINED)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_slices_hold_the_same_and_exchange_only_sums_of_gradients():
    """Each slice holds every array. What crosses is the gradients, each chip its part, and numbers such as the loss."""
    mesh, params = make_mesh(1, 4, 1, 2), abstract_params(CONFIG)
    state, frozen = abstract_state(SETTINGS, params, mesh)
    for place in jax.tree.leaves(jax.tree.map(lambda x: x.sharding, (state, frozen))):
        assert "slice" not in jax.tree.leaves(tuple(place.spec))
    batch = fake_batch(CONFIG, batch=8, length=20)
    rows = batch_sharding(mesh)
    assert rows.spec[0] == ("slice", "data", "fsdp")
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    text = make_step(CONFIG, SETTINGS, params, mesh).lower(state, frozen, batch).compile().as_text()
    sent = collectives.across(text, 4)
    gradients = sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in state.trainable.values())
    assert set(sent) == {"all-reduce"}
    assert 0.5 * gradients < sent["all-reduce"] < 1.5 * gradients, (sent, gradients)


def test_state_and_moments_lie_split():
    state, frozen, _ = train((1, 4, 2), steps=0)
    assert frozen["decoder/layers/mlp/up_proj/kernel"].addressable_shards[0].data.shape == (2, 64 // 4, 128 // 2)
    path = "decoder/layers/attn/q_proj/lora_a"
    assert state.trainable[path].addressable_shards[0].data.shape == (2, 64 // 4, 4)
    moments = [leaf for key, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state) if path in str(key)]
    assert len(moments) == 2
    assert all(leaf.sharding.is_equivalent_to(state.trainable[path].sharding, 3) for leaf in moments)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_over_a_mesh(optimizer):
    rules = table.EVERYTHING if optimizer == "muon" else table.PAPER
    settings = dataclasses.replace(SETTINGS, batch_size=4, accumulate=2, optimizer=optimizer, trainable=rules)
    config = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, dropout=0.0))
    one, many = (train(sizes, settings, config) for sizes in (None, (2, 2, 2)))
    for ours, expected in zip(many[2], one[2], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=GRADIENT)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scale", "part"), [("int8", "kernel_scale", (2, 64)), ("int4", "group_scale", (2, 1, 16))]
)
def test_quantised_kernels_are_split_with_their_scales(kind, scale, part):
    config = CONFIG.replace(quantize=kind)
    one, many = train(None, config=config), train((1, 4, 2), config=config)
    assert many[2][0]["loss"] == pytest.approx(one[2][0]["loss"], rel=TRAINED)
    frozen = many[1]
    assert frozen[f"decoder/layers/mlp/up_proj/{scale}"].addressable_shards[0].data.shape == part


def test_the_abstract_state_is_that_of_the_real_one():
    mesh = make_mesh(1, 1, 1)
    real = train((1, 1, 1), steps=0)[:2]
    abstract = abstract_state(SETTINGS, abstract_params(CONFIG), mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for found, expected in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_sizes_that_do_not_fit_the_devices_are_one_clear_error():
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(3, -1, 1, devices=jax.devices()[:1] * 8)
    with pytest.raises(UserError, match="does not fit"):
        make_mesh(1, jax.device_count() + 1, 1)

"""Layers stacked or unrolled: the same steps, the same checkpoints, and one layout on disk."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from chatpose_jax.models.chatpose import abstract_params, bind, fake_batch, init_params, stack_layers, unstack_layers
from chatpose_jax.models.sharding import batch_sharding, make_mesh, shardings
from chatpose_jax.train import trainable as table
from chatpose_jax.train.checkpoints import Checkpoints
from chatpose_jax.train.fingerprint import fingerprint
from chatpose_jax.train.layout import at_run_time, lay_out, stacked
from chatpose_jax.train.step import init_state, make_step
from chatpose_jax.train.trainer import Interrupted, identity, train
from tests.numerics import GRADIENT, TRAINED
from tests.train.test_step import CONFIG, SETTINGS
from tests.train.test_trainer import Batches

UNROLLED = CONFIG.replace(scan_layers=False)


def fresh(config=CONFIG, mesh=None):
    """Adapters that do something, and are not all alike."""
    flat = table.flatten(init_params(config, jax.random.key(0), mesh))
    return table.unflatten({p: x + 0.1 if p.endswith("lora_b") else x for p, x in flat.items()})


def steps(config, settings, count=2, mesh=None):
    """The state and the metrics after some steps, and the frozen arrays stacked again."""
    stack = config.replace(scan_layers=True)
    state, frozen = init_state(settings, fresh(stack, mesh), mesh)
    frozen = lay_out(frozen, config, consume=True)
    step = make_step(config, settings, abstract_params(stack), mesh)
    metrics = []
    for seed in range(count):
        batch = fake_batch(config, batch=8, length=16, seed=seed)
        if settings.accumulate > 1:
            batch = jax.tree.map(lambda x: x.reshape(settings.accumulate, -1, *x.shape[1:]), batch)
        if mesh is not None:
            batch = jax.device_put(batch, batch_sharding(mesh, stacked=settings.accumulate > 1))
        state, values = step(state, frozen, batch)
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics, stacked(frozen, config, consume=True)


PLAIN = dataclasses.replace(SETTINGS, batch_size=8)
LAST = CONFIG.replace(
    text=dataclasses.replace(CONFIG.text, num_layers=3), lora=dataclasses.replace(CONFIG.lora, last_layers=1)
)
BEHIND = tuple(rule for rule in table.PAPER if "embed_tokens" not in rule.pattern)
CASES = {
    "adapters": (CONFIG, PLAIN),
    "everything, by Muon": (CONFIG, dataclasses.replace(PLAIN, optimizer="muon", trainable=table.EVERYTHING)),
    "accumulated, full remat": (CONFIG, dataclasses.replace(PLAIN, batch_size=4, accumulate=2, remat="full")),
    "int8": (CONFIG.replace(quantize="int8"), PLAIN),
    "int4": (CONFIG.replace(quantize="int4"), PLAIN),
    "some layers' parts, with decay": (
        CONFIG,
        dataclasses.replace(
            PLAIN,
            grad_clip=0.01,
            trainable=(
                table.Rule("decoder/layers/attn/q_proj/lora_a", 0.5, 0.1),
                table.Rule("vision/layers/.*/kernel", 2.0),
                table.Rule(".*", None),
            ),
        ),
    ),
    "only the head": (CONFIG, dataclasses.replace(PLAIN, trainable=table.HEAD)),
    "adapters on the last layer": (LAST, dataclasses.replace(PLAIN, trainable=BEHIND)),
    "adapters on the last layer, and what is before": (LAST, dataclasses.replace(PLAIN, remat="save_qkv")),
    "adapters on the last layer, and everything": (LAST, dataclasses.replace(PLAIN, trainable=table.EVERYTHING)),
}


def agree(found, expected, largest=GRADIENT):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=largest * max(np.abs(b).max(), 1e-5), err_msg=str(path))


@pytest.mark.parametrize("case", CASES)
def test_both_layouts_take_the_same_steps(case):
    config, settings = CASES[case]
    scanned, unrolled = (steps(config.replace(scan_layers=scan), settings) for scan in (True, False))
    for ours, expected in zip(unrolled[1], scanned[1], strict=True):
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, rel=TRAINED, abs=1e-6), name
    assert jax.tree.structure(unrolled[0]) == jax.tree.structure(scanned[0])
    # The first moments tell more than the weights, whose first steps are the signs of gradients.
    agree(unrolled[0].opt_state, scanned[0].opt_state, TRAINED)
    assert unrolled[2].keys() == scanned[2].keys()
    for path, value in unrolled[2].items():
        np.testing.assert_array_equal(value, scanned[2][path], err_msg=path)


@pytest.mark.parametrize("sizes", [(1, 4, 2), pytest.param((2, 1, 4), marks=pytest.mark.slow)])
def test_unrolled_over_a_mesh(sizes):
    """Each layer's arrays lie split as the stack did."""
    mesh, settings = make_mesh(*sizes), PLAIN
    alone, spread = (steps(UNROLLED, settings, count=1, mesh=where) for where in (None, mesh))
    for name, value in alone[1][0].items():
        assert spread[1][0][name] == pytest.approx(value, rel=TRAINED, abs=1e-6), name
    for path, value in alone[2].items():
        np.testing.assert_array_equal(value, spread[2][path], err_msg=path)
    whole = init_params(CONFIG, jax.random.key(0), mesh)
    apart = table.flatten(unstack_layers(whole))
    for path, place in shardings(apart, mesh).items():
        assert apart[path].sharding.is_equivalent_to(place, apart[path].ndim), path
    again = table.flatten(stack_layers(table.unflatten(apart)))
    for path, value in table.flatten(whole).items():
        assert again[path].sharding.is_equivalent_to(value.sharding, value.ndim), path


def test_a_part_of_a_model_is_unrolled_in_its_place():
    params = fresh()
    trainable, frozen = table.split(params, table.PAPER)
    both = {**lay_out(trainable, UNROLLED), **lay_out(frozen, UNROLLED)}
    assert {path: x.shape for path, x in both.items()} == {
        path: x.shape for path, x in table.flatten(abstract_params(UNROLLED)).items()
    }
    ids = fake_batch(CONFIG, images=0)["input_ids"]
    once, twice = (
        jax.jit(lambda p, c=c: bind(c, p)(ids).hidden)(p)
        for c, p in ((CONFIG, params), (UNROLLED, table.unflatten(both)))
    )
    np.testing.assert_allclose(once, twice, atol=1e-5)
    assert stacked(both, UNROLLED).keys() == table.flatten(params).keys()
    assert not any(x.is_deleted() for x in frozen.values())
    lay_out(frozen, UNROLLED, consume=True)
    assert all(x.is_deleted() == ("/layers/" in path) for path, x in frozen.items())


@pytest.mark.parametrize("scan", [True, False])
def test_leading_layers_have_no_adapters(scan):
    """They are absent, not zero; the model is that of adapters that are zero there."""
    params = fresh(LAST)
    shapes = {path: x.shape for path, x in table.flatten(params).items() if "lora" in path}
    assert {shape[0] for shape in shapes.values()} == {1} and len(shapes) == 4
    config = LAST.replace(scan_layers=scan)
    laid = lay_out(table.flatten(params), config)
    assert not scan or laid.keys() == table.flatten(abstract_params(config)).keys()
    assert scan or {path.split("/")[2] for path in laid if "lora" in path} == {"2"}
    everywhere = LAST.replace(lora=dataclasses.replace(LAST.lora, last_layers=None))
    wide = {p: np.pad(x, ((2, 0), (0, 0), (0, 0))) if "lora" in p else x for p, x in table.flatten(params).items()}
    batch = fake_batch(LAST)

    def hidden(config, flat):
        def run(flat):
            model = bind(config, table.unflatten(flat))
            return model(batch["input_ids"], pixel_values=batch["pixel_values"], dropout_key=jax.random.key(1)).hidden

        return np.asarray(jax.jit(run)(flat))

    found, expected = hidden(config, laid), hidden(everywhere, wide)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    bare = {path: x for path, x in table.flatten(params).items() if "lora" not in path}
    assert np.abs(expected - hidden(LAST.replace(lora=None), bare)).max() > 1e-2


@pytest.mark.parametrize("scan", [True, False])
def test_leading_layers_save_nothing_for_a_backward_pass(scan):
    """Six layers save the activations that three do, and no copy of weights."""

    def saved(layers):
        text = dataclasses.replace(CONFIG.text, num_layers=layers)
        config = LAST.replace(text=text, scan_layers=scan)
        trainable, frozen = table.split(init_params(config.replace(scan_layers=True), jax.random.key(0)), BEHIND)
        frozen, batch = lay_out(frozen, config), fake_batch(config, batch=5, length=7, images=0)

        def run(trainable):
            model = bind(config, table.merge(lay_out(trainable, config), frozen))
            return model(batch["input_ids"]).hidden

        kept = [x for x in jax.tree.leaves(jax.vjp(run, trainable)[1]) if hasattr(x, "shape")]
        assert not any(x.shape == (1, 24, 32) for x in kept), "a layer of the stack of up_proj"
        return sum(x.size for x in kept if {5, 7} <= set(x.shape))

    assert saved(6) == saved(3) > 0


def test_only_a_cpu_unrolls_by_itself():
    for layers, scanned in {"auto": False, "scanned": True, "unrolled": False}.items():
        assert at_run_time(CONFIG, dataclasses.replace(SETTINGS, layers=layers)).scan_layers == scanned


def test_a_run_computes_in_the_dtype_of_the_setting_or_of_the_processor(monkeypatch):
    half = CONFIG.replace(dtype="bfloat16", param_dtype="bfloat16")
    monkeypatch.setattr("chatpose_jax.models.arithmetic._multiplies_bfloat16", lambda cpuinfo: False)
    for dtype, expected in {"auto": "float32", "bfloat16": "bfloat16"}.items():
        found = at_run_time(half, dataclasses.replace(SETTINGS, dtype=dtype))
        assert (found.dtype, found.param_dtype) == (expected, "bfloat16")
        assert identity(found, SETTINGS) == identity(half, SETTINGS), "so that it resumes on another machine"


@pytest.mark.parametrize("first", ["scanned", "unrolled"])
def test_a_run_resumes_in_the_other_layout(tmp_path, first):
    """Bit for bit what was saved, and to rounding where the uninterrupted run arrives."""
    settings = dataclasses.replace(SETTINGS, steps=8, save_every=4, log_every=1)
    run = functools.partial(train, progress=False)
    one, other = (CONFIG, UNROLLED) if first == "scanned" else (UNROLLED, CONFIG)
    whole = run(one, settings, fresh(), Batches(), tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 4"):
        run(one, settings, fresh(), Batches(at=4), tmp_path / "parts")
    state, frozen = init_state(settings, fresh())
    held = [
        Checkpoints(
            tmp_path / name / "checkpoints",
            keep=3,
            identity=identity(other, settings),
            frozen=fingerprint(frozen),
            result=tmp_path,
        ).restore(state, 4)[0]
        for name in ("whole", "parts")
    ]
    jax.tree.map(np.testing.assert_array_equal, *held)
    again = run(other, settings, fresh(), Batches(), tmp_path / "parts")
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    agree(again, whole, TRAINED)

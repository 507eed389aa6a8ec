"""Loss and step: against plain numpy and optax, frozen parameters, accumulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chatpose_jax.models.chatpose import bind, fake_batch, init_params
from chatpose_jax.models.config import LoRAConfig, TextConfig, VisionConfig, preset
from chatpose_jax.train import loss as losses
from chatpose_jax.train import trainable as table
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.optimizer import is_matrix, learning_rate, scale_by_muon
from chatpose_jax.train.step import init_state, make_step
from tests.heads import matrices
from tests.numerics import GRADIENT, LOSS, agree, rounded

CONFIG = preset("tiny").replace(
    vision=VisionConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_layers=3, num_heads=2),
    text=TextConfig(
        vocab_size=66,
        base_vocab_size=64,
        hidden_size=24,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=12,
    ),
    lora=LoRAConfig(rank=2, alpha=4.0, dropout=0.5),
    pose_token_id=64,
    image_token_id=65,
)
SETTINGS = TrainConfig(steps=10, batch_size=4, accumulate=1, warmup_steps=2, learning_rate=1e-2, remat="none")


@pytest.fixture(scope="module")
def params():
    fresh = init_params(CONFIG, jax.random.key(0))
    # B = 0 would hide everything behind the adapters.
    flat = {p: x + 0.1 if p.endswith("lora_b") else x for p, x in table.flatten(fresh).items()}
    return table.unflatten(flat)


def run(settings, params, batches):
    state, frozen = init_state(settings, jax.tree.map(jnp.array, params))
    step = make_step(CONFIG, settings, params)
    metrics = []
    for batch in batches:
        state, values = step(state, frozen, batch)
        metrics.append({name: float(value) for name, value in values.items()})
    return state, frozen, metrics


def whole_loss(model, batch, **weights):
    return losses.loss(model, losses.final_states(model, batch), batch, **weights)


def run_model(params, batch):
    return jax.jit(lambda params: bind(CONFIG, params)(batch["input_ids"], pixel_values=batch["pixel_values"]).hidden)(
        params
    )


def test_cross_entropy_is_the_mean_over_answers(params):
    batch = fake_batch(CONFIG, batch=3, length=20)
    model, hidden = bind(CONFIG, params), run_model(params, batch)
    logits = np.asarray(model.logits(hidden), np.float64)[:, :-1]
    labels = batch["labels"][:, 1:]
    expected, right = [], []
    for b, t in zip(*np.nonzero(labels >= 0)):
        row = logits[b, t]
        expected.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[labels[b, t]])
        right.append(row.argmax() == labels[b, t])
    value, accuracy = losses.cross_entropy(model, hidden, jnp.asarray(batch["labels"]))
    np.testing.assert_allclose(value, np.mean(expected), rtol=LOSS)
    np.testing.assert_allclose(accuracy, np.mean(right), rtol=1e-6)


def test_chunks_change_nothing(params, monkeypatch):
    batch = fake_batch(CONFIG, batch=2, length=21)
    model, hidden = bind(CONFIG, params), run_model(params, batch)

    def value_and_grad():
        return jax.jit(jax.value_and_grad(lambda h: losses.cross_entropy(model, h, jnp.asarray(batch["labels"]))[0]))

    whole = rounded(value_and_grad(), hidden)
    monkeypatch.setattr(losses, "CHUNK", 7)
    jax.tree.map(agree, whole, value_and_grad()(hidden))


def test_pose_loss_is_the_papers(params):
    """Mean |ΔR| of the root plus mean |ΔR| of the body, over poses that exist, read at the position before the pose token."""
    batch = fake_batch(CONFIG, batch=3, length=12)
    batch["pose_mask"][1] = False
    model, hidden = bind(CONFIG, params), np.asarray(run_model(params, batch))
    position = np.flatnonzero(batch["input_ids"][0] == CONFIG.pose_token_id)[-1]
    assert batch["pose_index"][0, 0] == position - 1
    errors = np.abs(np.asarray(matrices(model, hidden[[0, 2], position - 1])) - np.eye(3))
    total, parts = jax.jit(lambda params: whole_loss(bind(CONFIG, params), batch, lambda_text=2.0, lambda_pose=0.1))(
        params
    )
    np.testing.assert_allclose(parts["pose_root"], errors[:, 0].mean(), rtol=LOSS)
    np.testing.assert_allclose(parts["pose_body"], errors[:, 1:].mean(), rtol=LOSS)
    np.testing.assert_allclose(total, 2 * parts["text"] + 0.1 * (parts["pose_root"] + parts["pose_body"]), rtol=1e-6)


def test_a_batch_without_answers_or_poses_weighs_nothing(params):
    batch = fake_batch(CONFIG, batch=2, length=12)
    batch["labels"][:] = -100
    batch["pose_mask"][:] = False
    total, _ = jax.jit(lambda params: whole_loss(bind(CONFIG, params), batch, lambda_text=1.0, lambda_pose=1.0))(params)
    assert float(total) == 0


def test_frozen_parameters_stay_and_every_trainable_one_moves(params):
    batches = [fake_batch(CONFIG, batch=4, length=16, seed=i) for i in range(3)]
    state, frozen, metrics = run(SETTINGS, params, batches)
    before = table.flatten(params)
    for path, value in frozen.items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    for path, value in state.trainable.items():
        assert np.any(np.asarray(value) != np.asarray(before[path])), path
    assert not any("vision" in path for path in state.trainable)
    assert metrics[0]["learning_rate"] == pytest.approx(0.5e-2)


def test_of_added_tokens_the_pose_tokens_rows_alone_train(params):
    """A padded vocabulary: whatever decays or is added elsewhere, the paddings' rows keep every bit, the sign of a zero too."""
    text = dataclasses.replace(CONFIG.text, vocab_size=70)
    config, place = CONFIG.replace(text=text, pose_token_id=66), 66 - 64
    rules = tuple(r._replace(weight_decay=0.1) if r.tokens == "pose" else r for r in table.PAPER)
    settings = dataclasses.replace(SETTINGS, trainable=rules)
    flat = table.flatten(init_params(config, jax.random.key(0)))
    flat["decoder/embed_tokens/added"] = flat["decoder/embed_tokens/added"].at[5].set(-0.0)
    axes = table.TOKEN_AXIS
    before = {path: np.moveaxis(np.array(flat[path]), axis, 0) for path, axis in axes.items()}
    state, frozen = init_state(settings, table.unflatten(flat))
    step = make_step(config, settings, table.unflatten(flat))
    for seed in range(3):
        state, metrics = step(state, frozen, fake_batch(config, batch=4, length=16, seed=seed))
    assert np.isfinite(metrics["loss"])
    for path, axis in axes.items():
        after = np.moveaxis(np.asarray(state.trainable[path]), axis, 0)
        for row in range(6):
            assert (after[row].tobytes() == before[path][row].tobytes()) == (row != place), (path, row)
    moments = [m for m in jax.tree.leaves(state.opt_state) if m.shape == (6, text.hidden_size)]
    assert len(moments) == 2
    assert all(np.array_equal(np.flatnonzero(np.any(m != 0, axis=1)), [place]) for m in moments)


def test_dropout_repeats_by_seed_and_step(params):
    batches = [fake_batch(CONFIG, batch=4, length=16)] * 2
    first, second, other = (run(dataclasses.replace(SETTINGS, seed=seed), params, batches)[2] for seed in (0, 0, 1))
    assert first == second
    assert first[0]["loss"] != other[0]["loss"]


def test_micro_batches_weigh_what_they_hold_of_tokens_and_poses(params):
    """Ragged halves: one has few labels and a single pose. The plain mean of two means would be another loss."""
    settings = dataclasses.replace(SETTINGS, batch_size=2, grad_clip=1e9)
    config = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, dropout=0.0))
    halves = [fake_batch(config, batch=2, length=16, seed=i) for i in range(2)]
    halves[1]["labels"][:, :-2] = -100
    halves[1]["pose_mask"][0] = False
    results = []
    for accumulate, join in ((1, np.concatenate), (2, np.stack)):
        chosen = dataclasses.replace(settings, accumulate=accumulate)
        state, frozen = init_state(chosen, jax.tree.map(jnp.array, params))
        batch = jax.tree.map(lambda *parts, join=join: join(parts), *halves)
        results.append(make_step(config, chosen, params)(state, frozen, batch))
    (one, whole), (two, parts) = results
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=GRADIENT, err_msg=name)
    # The moments are the gradients: Adam's first step is their sign, which for a gradient of 0 is that of rounding.
    for value, expected in zip(jax.tree.leaves(two.opt_state), jax.tree.leaves(one.opt_state), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=GRADIENT * np.abs(expected).max(initial=1e-8))


def test_an_update_that_is_not_finite_is_dropped_and_counted(params):
    good, bad = (fake_batch(CONFIG, batch=4, length=16, seed=i) for i in range(2))
    bad["pixel_values"] = np.full_like(bad["pixel_values"], np.inf)
    state, frozen = init_state(SETTINGS, jax.tree.map(jnp.array, params))
    step, counts = make_step(CONFIG, SETTINGS, params), []
    for batch in (good, bad, bad, good):
        before = jax.tree.map(np.asarray, (state.trainable, state.opt_state))
        state, metrics = step(state, frozen, batch)
        counts.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
        same = jax.tree.map(
            lambda one, two: bool(np.all(one == np.asarray(two))), before, (state.trainable, state.opt_state)
        )
        # What is dropped leaves nothing behind: not in weights, moments or the schedule.
        assert all(jax.tree.leaves(same)) == (batch is bad)
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0)]
    assert int(state.step) == 4
    assert metrics["learning_rate"] == pytest.approx(1e-2)


def test_a_packed_row_has_the_loss_of_its_conversations(params):
    """Two conversations in one row, padding behind them: text, poses and gradients of the same two as rows of their own."""
    config = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, dropout=0.0))
    apart = fake_batch(config, batch=2, length=9, images=1)
    apart["labels"][:, 0] = -100
    length = apart["input_ids"].shape[1]

    def join(name, fill):
        return np.concatenate([*apart[name], np.full(5, fill, np.int32)])[None]

    packed = {
        "input_ids": join("input_ids", 0),
        "labels": join("labels", -100),
        "attention_mask": join("attention_mask", 0),
        "segment_ids": np.repeat([[1, 2, 0]], [length, length, 5], axis=1).astype(np.int32),
        "pixel_values": apart["pixel_values"].reshape(1, 2, *apart["pixel_values"].shape[2:]),
        "pose_index": (apart["pose_index"] + np.array([[0], [length]], np.int32)).reshape(1, 2),
        "poses": jax.tree.map(lambda x: x.reshape(1, 2, *x.shape[2:]), apart["poses"]),
        "pose_mask": apart["pose_mask"].reshape(1, 2),
    }

    def value_and_grad(batch):
        def objective(flat):
            return whole_loss(bind(config, table.unflatten(flat)), batch, lambda_text=1.0, lambda_pose=1.0)

        return jax.jit(jax.value_and_grad(objective, has_aux=True))

    flat = table.flatten(params)
    jax.tree.map(agree, rounded(value_and_grad(apart), flat), value_and_grad(packed)(flat))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("table_of", ["frozen", "trained"])
def test_cross_entropy_and_its_gradients_are_those_of_jax(params, table_of, tied, monkeypatch):
    """The gradient that is taken beside the loss, against automatic differentiation of all logits at once."""
    monkeypatch.setattr(losses, "CHUNK", 7)
    batch = fake_batch(CONFIG, batch=2, length=20)
    batch["labels"][0, 12:15] = 64, 65, -100
    hidden = jax.random.normal(jax.random.key(1), (*batch["labels"].shape, CONFIG.text.hidden_size))
    config = CONFIG.replace(text=dataclasses.replace(CONFIG.text, tied=tied))
    decoder = {name: part for name, part in params["decoder"].items() if not (tied and name == "lm_head")}
    name, weights = ("embed_tokens", ("embedding", "added")) if tied else ("lm_head", ("kernel", "added"))
    head = decoder[name]
    predicted = np.asarray(losses.targets(jnp.asarray(batch["labels"])))

    def ours(hidden, head):
        changed = params | {"decoder": decoder | {name: head}}
        return 3 * losses.cross_entropy(bind(config, changed), hidden, jnp.asarray(batch["labels"]))[0]

    def plain(hidden, head):
        base, added = (head[weight].T if tied else head[weight] for weight in weights)
        logits = hidden @ jnp.concatenate([base, added], axis=1)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(predicted, 0))
        return 3 * jnp.where(predicted >= 0, nll, 0).sum() / (predicted >= 0).sum()

    wanted = 0 if table_of == "frozen" else (0, 1)
    found, expected = (jax.jit(jax.value_and_grad(f, argnums=wanted)) for f in (ours, plain))
    jax.tree.map(agree, rounded(lambda both: expected(*both), (hidden, head)), found(hidden, head))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_base_trains_its_adapters_and_keeps_its_kernels(kind, params):
    config = dataclasses.replace(CONFIG, quantize=kind)
    fresh = init_params(config, jax.random.key(0))
    before = {path: hash(np.asarray(x).tobytes()) for path, x in table.flatten(fresh).items()}
    state, frozen = init_state(SETTINGS, fresh)
    step = make_step(config, SETTINGS, fresh)
    state, metrics = step(state, frozen, fake_batch(config, batch=4, length=16))
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    after = {path: hash(np.asarray(x).tobytes()) for path, x in frozen.items()}
    assert after == {path: before[path] for path in frozen}
    assert frozen["decoder/layers/attn/q_proj/kernel"].dtype == kind


def test_rows_scale_rate_and_decay_as_adamw(params):
    """One row with rate 1 and decay d is optax.adamw."""
    settings = dataclasses.replace(SETTINGS, grad_clip=1e9, trainable=(table.Rule(".*", 1.0, 0.1),))
    config = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, dropout=0.0))
    batch = fake_batch(config, batch=2, length=16)
    state, frozen = init_state(settings, jax.tree.map(jnp.array, params))
    after, _ = make_step(config, settings, params)(state, frozen, batch)

    flat = table.flatten(params)
    tx = optax.adamw(learning_rate(settings), weight_decay=0.1)

    @jax.jit
    def plain(flat):
        grads = jax.grad(
            lambda p: whole_loss(bind(config, table.unflatten(p)), batch, lambda_text=1.0, lambda_pose=0.1)[0]
        )(flat)
        return grads, tx.update(grads, tx.init(flat), flat)[0]

    grads, updates = plain(flat)
    for path, value in optax.apply_updates(flat, updates).items():
        # Adam's first step is the sign of the gradient: where that is rounding noise, nothing can be compared.
        clear = np.abs(grads[path]) > 1e-4
        np.testing.assert_allclose(
            np.asarray(after.trainable[path])[clear], np.asarray(value)[clear], atol=3e-5, err_msg=path
        )


def test_schedules():
    linear = learning_rate(dataclasses.replace(SETTINGS, steps=100, warmup_steps=10))
    cosine = learning_rate(
        dataclasses.replace(SETTINGS, steps=100, warmup_steps=10, schedule="cosine", final_lr_ratio=0.1)
    )
    assert float(linear(0)) == pytest.approx(1e-3)
    assert float(linear(9)) == float(linear(10)) == pytest.approx(1e-2)
    assert float(linear(55)) == pytest.approx(0.5e-2)
    assert float(linear(100)) == pytest.approx(0)
    assert float(cosine(100)) == pytest.approx(1e-3)


def test_muon_orthogonalises_each_stacked_layer():
    grads = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 12)), jnp.float32)
    tx = scale_by_muon()
    updates, _ = tx.update({"w": grads}, tx.init({"w": grads}), {"w": grads})
    singular = np.linalg.svd(np.asarray(updates["w"]), compute_uv=False) / (0.2 * 12**0.5)
    assert ((singular > 0.6) & (singular < 1.3)).all()
    alone, _ = tx.update({"w": grads[1:2]}, tx.init({"w": grads[1:2]}), {"w": grads[1:2]})
    np.testing.assert_allclose(alone["w"][0], updates["w"][1], atol=1e-5)
    small, _ = tx.update({"w": 1e-7 * grads}, tx.init({"w": grads}), {"w": grads})
    np.testing.assert_allclose(small["w"], updates["w"], atol=1e-5)


def test_muon_trains_kernels_but_not_the_vocabularys(params):
    found = {path for path, x in table.flatten(params).items() if is_matrix(path, x.ndim)}
    assert {path.split("/")[0] for path in found} == {"vision", "projector", "decoder", "pose_head"}
    assert {"vision/patch_embed/kernel", "pose_head/fc1/kernel", "decoder/layers/mlp/up_proj/kernel"} <= found
    assert all(path.endswith("kernel") and "lm_head" not in path for path in found)
    assert not is_matrix("pose_head/conv/kernel", 3)


def test_muon_trains(params):
    settings = dataclasses.replace(SETTINGS, optimizer="muon", trainable=table.EVERYTHING)
    metrics = run(settings, params, [fake_batch(CONFIG, batch=4, length=16)] * 6)[2]
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]

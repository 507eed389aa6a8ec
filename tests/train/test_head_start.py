"""The pose head learns alone before the run, from states that are computed once; nothing else changes."""

import dataclasses

import jax
import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import bind, fake_batch, init_params
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.train.config import HeadStart
from chatpose_jax.train.head_start import head_start
from chatpose_jax.train.loss import final_states, loss
from chatpose_jax.train.step import init_state
from chatpose_jax.train.trainable import PAPER, flatten, merge
from chatpose_jax.train.trainer import train
from tests.train.test_step import CONFIG, SETTINGS
from tests.train.test_trainer import Batches

MODEL = CONFIG.replace(head=HeadConfig("queries", (("layers", 1), ("heads", 2), ("hidden", 16), ("standardise", True))))
SETTINGS = dataclasses.replace(
    SETTINGS, steps=1, learning_rate=1e-2, warmup_steps=0, head_start=HeadStart(batches=4, steps=60)
)


@pytest.fixture(scope="module")
def params():
    start = jax.device_get(init_params(MODEL, jax.random.key(0)))
    return lambda: jax.tree.map(jax.numpy.array, start)


def pose_loss(params):
    batch = fake_batch(MODEL, batch=4, length=16, seed=1)
    model = bind(MODEL, params)
    parts = loss(model, final_states(model, batch), batch, lambda_text=0.0, lambda_pose=1.0)[1]
    return float(parts["pose_body"])


def test_only_the_head_changes_and_it_learns(params):
    state, frozen = init_state(SETTINGS, params(), None)
    before = jax.device_get(state.trainable)
    after = head_start(MODEL, SETTINGS, state.trainable, frozen, Batches(), progress=False)
    assert set(after) == set(before)
    for path, value in before.items():
        assert np.array_equal(value, after[path]) == (not path.startswith("pose_head/")), path
    assert pose_loss(merge(after, frozen)) < 0.7 * pose_loss(params())


def test_shift_and_scale_are_those_of_the_tokens(params):
    state, frozen = init_state(SETTINGS, params(), None)
    still = dataclasses.replace(SETTINGS, head_start=HeadStart(batches=2, steps=1, rate=1e-9))
    after = head_start(MODEL, still, state.trainable, frozen, Batches(), progress=False)
    tokens = []
    for seed in (1, 2):
        batch = fake_batch(MODEL, batch=4, length=16, seed=seed)
        hidden = final_states(bind(MODEL, params()), batch)
        tokens.append(np.asarray(hidden, np.float32)[np.asarray(batch["attention_mask"]) > 0])
    tokens = np.concatenate(tokens)
    np.testing.assert_allclose(after["pose_head/shift"], -tokens.mean(0), atol=1e-5)
    np.testing.assert_allclose(after["pose_head/scale"], 1 / tokens.std(0), rtol=1e-3)


def test_a_run_begins_with_it_and_a_resumed_one_does_not_repeat_it(tmp_path, params, monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return head_start(*arguments, **options)

    monkeypatch.setattr("chatpose_jax.train.trainer.head_start", counted)
    batches = Batches()
    first = train(MODEL, SETTINGS, params(), batches, tmp_path, progress=False)
    assert len(calls) == 1 and batches.step == 1, "the run's first batch is the first of all"
    train(MODEL, dataclasses.replace(SETTINGS, steps=2), params(), Batches(), tmp_path, progress=False)
    assert len(calls) == 1
    assert pose_loss(first) < 0.7 * pose_loss(params())


def test_a_frozen_head_and_batches_without_poses_are_errors(params):
    frozen_head = dataclasses.replace(SETTINGS, trainable=(PAPER[0], PAPER[-1]))
    state, frozen = init_state(frozen_head, params(), None)
    with pytest.raises(UserError, match="frozen"):
        head_start(MODEL, frozen_head, state.trainable, frozen, Batches(), progress=False)
    state, frozen = init_state(SETTINGS, params(), None)
    batch = fake_batch(MODEL, batch=4, length=16)
    batch["pose_mask"] = np.zeros_like(batch["pose_mask"])
    with pytest.raises(UserError, match="no pose"):
        head_start(MODEL, SETTINGS, state.trainable, frozen, [batch] * 9, progress=False)


def test_paths_of_the_head_are_those_that_the_head_start_sets():
    assert {"pose_head/shift", "pose_head/scale"} <= set(flatten(init_params(MODEL, jax.random.key(0))))

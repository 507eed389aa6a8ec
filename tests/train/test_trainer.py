"""The loop: resume is exact, interruption saves, other settings are refused."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import create, fake_batch
from chatpose_jax.train.trainer import Interrupted, train
from tests.train.test_step import CONFIG, SETTINGS

SETTINGS = dataclasses.replace(SETTINGS, steps=6, save_every=2, log_every=1)


class Batches:
    """An endless stream that can stop itself: ``at`` sends a signal before that batch."""

    def __init__(self, at=None, spoil=None):
        self.step, self.at, self.spoil = 0, at, spoil

    def __iter__(self):
        while True:
            self.step += 1
            if self.step == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            batch = fake_batch(CONFIG, batch=4, length=16, seed=self.step)
            if self.step == self.spoil:
                batch["pixel_values"][:] = np.nan
            yield batch

    def state(self):
        return {"step": self.step}

    def restore(self, state):
        self.step = state["step"]


@pytest.fixture
def params():
    """Callable, since training consumes what it starts from."""
    start = jax.device_get(create(CONFIG, jax.random.key(0)))
    return lambda: jax.tree.map(jnp.array, start)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, params):
    whole = train(CONFIG, SETTINGS, params(), Batches(), tmp_path / "whole", progress=False)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        train(CONFIG, SETTINGS, params(), Batches(at=3), tmp_path / "parts", progress=False)
    again = train(CONFIG, SETTINGS, params(), Batches(), tmp_path / "parts", progress=False)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again)):
        np.testing.assert_array_equal(a, b)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "whole")) == 6


def test_lines_of_lost_steps_and_cut_off_lines_are_dropped(tmp_path, params):
    with pytest.raises(Interrupted):
        train(CONFIG, SETTINGS, params(), Batches(at=3), tmp_path, progress=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    train(CONFIG, SETTINGS, params(), Batches(), tmp_path, progress=False)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_finished_run_returns_its_parameters_again(tmp_path, params):
    first = train(CONFIG, SETTINGS, params(), Batches(), tmp_path, progress=False)
    second = train(CONFIG, SETTINGS, params(), Batches(), tmp_path, progress=False)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, params):
    train(CONFIG, dataclasses.replace(SETTINGS, steps=2), params(), Batches(), tmp_path, progress=False)
    wider = CONFIG.replace(lora=dataclasses.replace(CONFIG.lora, alpha=8.0))
    with pytest.raises(UserError, match=r"other settings of model\.lora"):
        train(wider, SETTINGS, params(), Batches(), tmp_path, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, params):
    with pytest.raises(UserError, match="the loss is nan at step 3; the last checkpoint is step 2"):
        train(CONFIG, SETTINGS, params(), Batches(spoil=3), tmp_path, progress=False)


def test_tensorboard_holds_the_scalars(tmp_path, params):
    train(CONFIG, dataclasses.replace(SETTINGS, steps=2), params(), Batches(), tmp_path, progress=False)
    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 1
    assert b"pose_body" in files[0].read_bytes()


def test_a_signal_in_any_moment_of_a_step_saves(tmp_path, params):
    """Here while it evaluates, after the step has decided whether it is the last."""

    def evaluate(_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    settings = dataclasses.replace(SETTINGS, save_every=100, eval_every=3)
    with pytest.raises(Interrupted, match="stopped at step 4"):
        train(CONFIG, settings, params(), Batches(), tmp_path, evaluate=evaluate, progress=False)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_a_spoilt_state_is_never_saved(tmp_path, params):
    settings = dataclasses.replace(SETTINGS, save_every=1, log_every=4)
    with pytest.raises(UserError, match="at step 3; the last checkpoint is step 2"):
        train(CONFIG, settings, params(), Batches(spoil=3), tmp_path, progress=False)
    after = train(CONFIG, settings, params(), Batches(), tmp_path, progress=False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_a_run_longer_than_asked_for_is_not_passed_off_as_short(tmp_path, params):
    train(CONFIG, SETTINGS, params(), Batches(), tmp_path, progress=False)
    with pytest.raises(UserError, match=r"beyond train\.steps=2"):
        train(CONFIG, dataclasses.replace(SETTINGS, steps=2), params(), Batches(), tmp_path, progress=False)

"""The loop: resume is exact, interruption saves, other settings are refused."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.proto.event_pb2 import Event

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import fake_batch, init_params
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.train.hosts import Fault
from chatpose_jax.train.log import Log
from chatpose_jax.train.trainable import PAPER, PROJECTOR, rates
from chatpose_jax.train.trainer import Interrupted, best_metric, demand_same_run, shortest, train
from tests.numerics import TRAINED
from tests.train.test_step import CONFIG, SETTINGS

SETTINGS = dataclasses.replace(SETTINGS, steps=6, save_every=2, log_every=1)


class Batches:
    """An endless stream that can stop itself: ``at`` sends a signal before that batch."""

    def __init__(self, at=None, spoil=()):
        self.step, self.at, self.spoil = 0, at, spoil

    def __iter__(self):
        while True:
            self.step += 1
            if self.step == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            batch = fake_batch(CONFIG, batch=4, length=16, seed=self.step)
            if self.step in self.spoil:
                batch["pixel_values"][:] = np.nan
            yield batch

    def state(self):
        return {"step": self.step}

    def restore(self, state):
        self.step = state["step"]


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """Runs of equal settings share one compilation."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def params():
    """Callable, since training consumes what it starts from."""
    start = jax.device_get(init_params(CONFIG, jax.random.key(0)))
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


@pytest.mark.parametrize(
    "garbage", [b"\0\0\0\0\n", b"loss 3\n", b"[5]\n", b'{"loss": 1.0}\n', b'{"step": "two"}\n', b"\xff\n"]
)
@pytest.mark.parametrize("place", [0, 1, 9])
def test_a_log_that_is_none_is_kept_aside_and_told(tmp_path, capsys, garbage, place):
    """Whatever it is, nobody can make it again; a line of a lost step, or cut off by a kill, is no such thing."""
    lines = [b'{"step": %d, "loss": 1.5}\n' % step for step in range(1, 6)]
    lines.insert(place, garbage)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines) + b'{"step": 6, "lo')
    Log(tmp_path, 3).close()
    kept = [line for line in lines[:place] if line in lines[:3]]
    assert path.read_bytes() == b"".join(kept)
    copy = tmp_path / "metrics.jsonl.damaged-1"
    assert copy.read_bytes() == b"".join(lines) + b'{"step": 6, "lo'
    assert f"line {min(place, 5) + 1} is not a valid line; a copy is kept as {copy}" in capsys.readouterr().out
    Log(tmp_path, 3).close()
    assert sorted(tmp_path.iterdir()) == [path, copy]


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
    slower = dataclasses.replace(SETTINGS, learning_rate=0.5 * SETTINGS.learning_rate)
    with pytest.raises(UserError) as raised:
        train(CONFIG, slower, params(), Batches(), tmp_path, progress=False)
    assert "other settings of train.learning_rate: go back" in str(raised.value)
    assert f"with chatpose train --init {tmp_path / 'model'} --out NEW" in str(raised.value)
    assert "the old settings with --set train.steps=2 write it" in str(raised.value)


def test_a_refusal_names_the_folder_that_the_model_goes_to_and_needs_no_data(tmp_path, params):
    two = dataclasses.replace(SETTINGS, steps=2)
    demand_same_run(tmp_path / "run", CONFIG, two, tmp_path / "there")
    assert list(tmp_path.iterdir()) == []
    train(CONFIG, two, params(), Batches(), tmp_path / "run", progress=False)
    demand_same_run(tmp_path / "run", CONFIG, SETTINGS, tmp_path / "there")
    slower = dataclasses.replace(SETTINGS, learning_rate=0.5 * SETTINGS.learning_rate)
    words = f"train.learning_rate: go back .*chatpose train --init {tmp_path / 'there'} --out NEW"
    with pytest.raises(UserError, match=words):
        demand_same_run(tmp_path / "run", CONFIG, slower, tmp_path / "there")
    with pytest.raises(UserError, match=words):
        train(CONFIG, slower, params(), Batches(), tmp_path / "run", progress=False, result=tmp_path / "there")


def test_spoilt_updates_are_dropped_counted_and_too_many_stop_the_run(tmp_path, params):
    settings = dataclasses.replace(SETTINGS, max_skipped=2)
    train(CONFIG, settings, params(), Batches(spoil=(3, 4)), tmp_path / "some", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "some" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2]
    with pytest.raises(
        UserError, match=r"the loss is nan at step 5, and 3 updates in a row .*last checkpoint is step 4"
    ):
        train(CONFIG, settings, params(), Batches(spoil=(3, 4, 5)), tmp_path / "many", progress=False)
    after = train(CONFIG, settings, params(), Batches(), tmp_path / "many", progress=False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_every_step_has_a_line_whatever_is_charted(tmp_path, params):
    train(CONFIG, SETTINGS, params(), Batches(), tmp_path / "one", progress=False)
    train(CONFIG, dataclasses.replace(SETTINGS, log_every=4), params(), Batches(), tmp_path / "four", progress=False)
    one, four = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "four")
    )
    assert [line["step"] for line in four] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in one] == [line["loss"] for line in four]
    assert all(np.float32(line["loss"]) == line["loss"] or len(repr(line["loss"])) < 12 for line in four)
    assert [("step_p50" in line) for line in four] == [False, False, False, True, False, True]
    assert four[3]["samples_per_second"] > 0
    assert four[3]["step_p90"] >= four[3]["step_p50"] > 0


def test_a_float32_survives_its_line():
    values = np.random.default_rng(0).normal(size=500).astype(np.float32) * np.float32(10) ** np.arange(-20, 30, 0.1)
    for value in np.float32(values):
        assert np.float32(json.loads(json.dumps(shortest(value)))) == value
    assert shortest(np.int32(7)) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [((4, 1, 1), (2, 2, 2)), ((1, 4, 2), (1, 2, 2, 2)), ((1, 2, 2, 2), (1, 4, 1))],
    ids=["meshes", "to two slices", "a slice is lost"],
)
def test_a_mesh_trains_to_the_same_losses_and_resumes_on_another(tmp_path, params, first, second):
    train(CONFIG, SETTINGS, params(), Batches(), tmp_path / "one", progress=False)
    for at, sizes in ((4, first), (None, second)):
        mesh = make_mesh(*sizes)
        there = init_params(CONFIG, jax.random.key(0), mesh)
        with contextlib.suppress(Interrupted):
            train(CONFIG, SETTINGS, there, Batches(at=at), tmp_path / "meshes", mesh=mesh, progress=False)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "meshes"), rtol=TRAINED)


def test_drawings_and_the_best_are_kept(tmp_path, params):
    errors = iter((3.0, 1.0, 2.0))

    def evaluate(_):
        return {"val_text_pa_mpjpe": next(errors), "val_text_poses": np.zeros((8, 8, 3), np.uint8)}

    settings = dataclasses.replace(SETTINGS, eval_every=2, keep=1)
    last = train(CONFIG, settings, params(), Batches(), tmp_path, evaluate=evaluate, progress=False)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    assert b"val_text_poses" in next((tmp_path / "tensorboard").iterdir()).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_text_pa_mpjpe"] for line in lines if "loss" not in line] == [3.0, 1.0, 2.0]
    best = train(CONFIG, dataclasses.replace(settings, result="best"), params(), Batches(), tmp_path, progress=False)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(best), strict=True))


def test_a_best_result_that_nothing_measured_is_not_passed_over(tmp_path, params, capsys):
    settings = dataclasses.replace(SETTINGS, steps=1, eval_every=0, result="best")
    train(CONFIG, settings, params(), Batches(), tmp_path / "none", progress=False)
    assert capsys.readouterr().out.count("needs validation, but train.eval_every=0") == 1
    settings = dataclasses.replace(SETTINGS, steps=2, eval_every=2, result="best", best="mpjre")
    told = (
        r"train.best='mpjre': no evaluator gives it; did you mean mpjpe\?; they give mpjpe; '' keeps no best checkpoint"
    )
    with pytest.raises(UserError, match=told):
        train(
            CONFIG, settings, params(), Batches(), tmp_path, evaluate=lambda _: {"val_text_mpjpe": 1.0}, progress=False
        )
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["2"], "nothing was lost"
    settings = dataclasses.replace(settings, best="mpjpe")
    train(CONFIG, settings, params(), Batches(), tmp_path, evaluate=lambda _: {"val_text_mpjpe": 1.0}, progress=False)
    assert capsys.readouterr().out.count("gave val_…_mpjpe") == 1


def test_each_row_has_its_rate_and_the_console_both_shares_of_the_peak(tmp_path, params, capsys):
    settings = dataclasses.replace(SETTINGS, steps=2, trainable=PROJECTOR)
    counts = {"mfu": 1e9, "mfu_6n": 1.5e9}
    train(CONFIG, settings, params(), Batches(), tmp_path, flops=lambda _: counts, peak=1e12)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        rows = {name: value for name, value in values.items() if name.startswith("learning_rate_")}
        assert list(rows) == [f"learning_rate_{name}" for name in rates(PROJECTOR)]
        assert rows["learning_rate_1_pose_head"] == values["learning_rate"]
        assert rows["learning_rate_3_projector"] == pytest.approx(0.1 * values["learning_rate"])
        assert values["mfu_6n"] == pytest.approx(1.5 * values["mfu"])
    assert {"mfu", "mfu_6n"} <= set(re.findall(r"(\w+)=[\d.]+%", capsys.readouterr().err))
    assert rates(PAPER) == {}


def test_the_mean_over_kinds_decides_what_is_best():
    values = {"val_text_pa_mpjpe": 1.0, "val_image_pa_mpjpe": 3.0, "val_text_mpjpe": 50.0, "loss": 1.0}
    assert best_metric(values, "pa_mpjpe") == 2.0
    assert best_metric(values, "mpjpe") == 50.0
    assert best_metric(values, "mpjre") is None
    assert best_metric(values, "text_pa_mpjpe") == 1.0, "a value by its whole name"
    assert best_metric({"val_hands": 4.0, "val_text_hands": 2.0}, "hands") == 4.0


@pytest.mark.parametrize(
    ("profile", "words"), [(2, "a profile of 2 steps"), (4, "a profile of 4 steps"), (50, "a profile of 4 steps")]
)
def test_a_profile_is_written_in_a_shorter_run_too(tmp_path, params, capsys, profile, words):
    train(CONFIG, SETTINGS, params(), Batches(), tmp_path, profile=profile, progress=False)
    assert any(file.stat().st_size for file in (tmp_path / "profile").rglob("*.xplane.pb"))
    assert capsys.readouterr().out.count(words) == 1


def test_a_run_too_short_for_a_profile_says_so(tmp_path, params, capsys):
    settings = dataclasses.replace(SETTINGS, steps=2)
    train(CONFIG, settings, params(), Batches(), tmp_path, profile=2, progress=False)
    assert "no profile: it begins with step 3" in capsys.readouterr().out


def test_tensorboard_holds_the_scalars(tmp_path, params):
    """And a run that goes on hides the steps that were lost."""
    train(CONFIG, dataclasses.replace(SETTINGS, steps=2), params(), Batches(), tmp_path, progress=False)
    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 1
    assert b"pose_body" in files[0].read_bytes()
    files[0].rename(tmp_path / "first")
    train(CONFIG, dataclasses.replace(SETTINGS, steps=3), params(), Batches(), tmp_path, progress=False)
    (again,) = (tmp_path / "tensorboard").iterdir()
    events, data = [], again.read_bytes()
    while data:  # each: length, checksum, event, checksum
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert [event.step for event in events if event.HasField("session_log")] == [3]
    assert {event.step for event in events if event.HasField("summary")} == {3}


def test_a_signal_in_any_moment_of_a_step_saves(tmp_path, params):
    """Here while it evaluates, after the step has decided whether it is the last."""

    def evaluate(_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    settings = dataclasses.replace(SETTINGS, save_every=100, eval_every=3)
    with pytest.raises(Interrupted, match="stopped at step 4"):
        train(CONFIG, settings, params(), Batches(), tmp_path, evaluate=evaluate, progress=False)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_a_run_longer_than_asked_for_is_not_passed_off_as_short(tmp_path, params):
    train(CONFIG, SETTINGS, params(), Batches(), tmp_path, progress=False)
    with pytest.raises(UserError, match=r"beyond train\.steps=2"):
        train(CONFIG, dataclasses.replace(SETTINGS, steps=2), params(), Batches(), tmp_path, progress=False)


@pytest.mark.parametrize("files", ["metrics.jsonl", "tensorboard/*"])
def test_a_full_disk_ends_a_run_so_that_it_is_started_again(files, tmp_path, params, monkeypatch):
    written = os.fsync

    def full(file):
        if any(os.path.samestat(os.fstat(file), path.stat()) for path in tmp_path.glob(files)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Fault, match="No space left on device"):
        train(CONFIG, SETTINGS, params(), Batches(), tmp_path, progress=False)

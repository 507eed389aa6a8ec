"""``chatpose train``: what it refuses before anything is read, and what it says at its end."""

import dataclasses
import errno
import os
import socket
import sys
import types

import jax
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.locks import only_writer
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.train import run as train_run
from chatpose_jax.train.checkpoints import Checkpoints
from chatpose_jax.train.run_config import load_config
from chatpose_jax.train.step import TrainState
from chatpose_jax.train.trainer import identity
from smpl_jax.pose import unmeasured
from tests.train.rows import Rows


@pytest.mark.parametrize(
    ("out", "words"),
    [("", "expected a file or folder"), ("hdfs://host/run", "hdfs://…: not an address that this program knows")],
)
def test_a_run_folder_is_a_folder(out, words, tmp_path, monkeypatch, capsys):
    """Neither the current one, for a variable that is not set, nor one called hdfs: below it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", out])
    assert stop.value.code == 2 and f"argument --out: {words}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 1), (errno.EACCES, 2)])
def test_a_full_disk_is_no_bad_input(tmp_path, monkeypatch, capsys, number, status):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number), "rows.npz")

    monkeypatch.setattr(train_run, "examples", refused)
    assert main(["train", "--out", str(tmp_path / "run")]) == status
    assert capsys.readouterr().err.startswith(f"error: rows.npz: {os.strerror(number)}")


@pytest.mark.parametrize("command", ["train", "demo"])
def test_two_runs_in_one_folder(tmp_path, monkeypatch, capsys, command):
    """The second is told who the first is, before it reads anything, by a status that means: later, perhaps."""
    monkeypatch.setattr(train_run, "examples", lambda *_: pytest.fail("data were read"))
    monkeypatch.setattr("chatpose_jax.cli.demo.examples", lambda *_: pytest.fail("data were made"))
    with only_writer(tmp_path, tmp_path / ".lock"):
        before = sorted(tmp_path.rglob("*"))
        assert main([command, "--out", str(tmp_path)]) == 1
        assert sorted(tmp_path.rglob("*")) == before
    assert f"process {os.getpid()} on {socket.gethostname()}, since 2" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_run, "examples", lambda *_: pytest.fail("data were read"))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    assert main(["train", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {out}: cannot be written (Not a directory)\n"


@pytest.mark.parametrize(
    ("refusal", "status", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/poses/val.jsonl"), 2, "/poses/val.jsonl: No such file"),
        (UserError("the split 'val' has no rows"), 2, "the split 'val' has no rows"),
        (OSError(errno.ESTALE, "Stale file handle", "/poses/val.jsonl"), 1, "/poses/val.jsonl: Stale file handle"),
    ],
)  # fmt: skip
def test_missing_held_out_rows_say_what_wants_them(tmp_path, monkeypatch, capsys, refusal, status, said):
    def rows(config, split, size):
        if split == "val":
            raise refusal
        return Rows(9, lambda index: pytest.fail("the training rows were read first"))

    monkeypatch.setattr(train_run, "examples", rows)
    assert main(["train", "--out", str(tmp_path / "run"), "--set", "train.eval_every=7"]) == status
    error = capsys.readouterr().err
    assert said in error
    if status == 2:
        assert "held-out rows are read for train.eval_every=7; if the training rows are without this error" in error


@pytest.mark.parametrize(
    ("source", "said", "advised"),
    [
        ("no_such_module:rows", "cannot be imported", False),
        ("chatpose_jax.cli.train:nothing", "has no function or class 'nothing'", False),
        ("chatpose_jax.data.sources:SOURCES.get", "has no function", False),
        (
            "chatpose_jax.train.run:row_sizes",
            "a source takes the split, and its options by keyword: write def",
            False,
        ),
        (
            "a_source_for_tests:held_out",
            "data.sources[0] 'a_source_for_tests:held_out', split 'train': no training rows",
            False,
        ),
        ("a_source_for_tests:both", "raised for split 'train': KeyError: 'rows'", False),
        ("a_source_for_tests:val", "raised for split 'val': KeyError: 'rows'", True),
        (
            "a_source_for_tests:bad_row",
            "row 3 of data.sources[0] 'a_source_for_tests:bad_row', split 'val': KeyError: 'pose'",
            True,
        ),
        (
            "a_source_for_tests:lone",
            "row 0 of data.sources[0] 'a_source_for_tests:lone', split 'val': poses: expected a Pose of batch",
            True,
        ),
        (
            "a_source_for_tests:lone_too",
            "row 0 of data.sources[0] 'a_source_for_tests:lone_too', split 'train': poses: expected",
            False,
        ),
    ],
)
def test_advice_to_train_without_held_out_rows_needs_training_rows(
    tmp_path, monkeypatch, capsys, source, said, advised
):
    module = types.ModuleType("a_source_for_tests")
    good = Rows(9, lambda index: "text")
    module.both = lambda split: {}["rows"]
    module.val = lambda split: good if split == "train" else {}["rows"]
    bad = Rows(9, lambda index: {}["pose"] if index == 3 else "text")
    lone = [Example("x", "text", [{"role": "user", "content": "Who?"}], unmeasured(()))]
    module.held_out = lambda split: () if split == "train" else lone
    module.lone = lambda split: good if split == "train" else lone
    module.lone_too = lambda split: lone
    module.bad_row = lambda split: good if split == "train" else bad
    monkeypatch.setitem(sys.modules, module.__name__, module)
    settings = ["--set", f"data.sources={source}", "--set", "train.eval_every=7"]
    assert main(["train", "--out", str(tmp_path / "run"), *settings]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert ("--set train.eval_every=0 trains on them" in error) == advised


def test_a_demo_of_other_settings_is_refused_before_its_data_are_made(tmp_path, monkeypatch, capsys):
    kept = load_config("tiny", ["train.steps=2"])
    count = jax.numpy.int32(2)
    state = TrainState(count, {"x": jax.numpy.zeros(2)}, {}, jax.numpy.stack([count, count]))
    held = Checkpoints(
        tmp_path / "run" / "checkpoints", keep=1, identity=identity(kept.model, kept.train), frozen={}, result=tmp_path
    )
    held.save(state, {})
    held.wait()
    held.close()
    monkeypatch.setattr("chatpose_jax.cli.demo.examples", lambda *_: pytest.fail("data were made"))
    assert main(["demo", "--out", str(tmp_path), "--set", "train.learning_rate=1e-2"]) == 2
    error = capsys.readouterr().err
    assert "other settings of train.learning_rate" in error and f"--init {tmp_path / 'model'} --out NEW" in error


@pytest.mark.parametrize(("name", "flag"), [("mlp", ""), ("my.heads:Deep", "--head my.heads:Deep ")])
def test_the_last_line_says_how_to_ask_the_model(tmp_path, monkeypatch, capsys, name, flag):
    config = load_config("tiny")
    config = dataclasses.replace(config, model=config.model.replace(head=HeadConfig(name)))
    monkeypatch.setattr("chatpose_jax.cli.train.load_config", lambda *_: config)
    monkeypatch.setattr("chatpose_jax.cli.train.run_training", lambda *_, **__: tmp_path / "model")
    assert main(["train", "--out", str(tmp_path)]) == 0
    assert f"\nask it: chatpose chat {tmp_path / 'model'} {flag}--prompt " in capsys.readouterr().out


def test_a_traceback_of_held_out_rows_says_what_wants_them(tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_run, "examples", lambda config, split, size: {"train": Rows(9, lambda index: "text")}[split]
    )
    with pytest.raises(KeyError, match="val") as raised:
        main(["train", "--out", str(tmp_path / "run"), "--set", "train.eval_every=7"])
    assert "train.eval_every=0 trains on them" in raised.value.__notes__[0]

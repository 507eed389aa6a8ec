"""What ``chatpose train`` starts from, what it knows of chips, and how it counts."""

import dataclasses
import errno
import hashlib
import os
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.locks import only_writer
from chatpose_jax.models.chatpose import abstract_params, init_params
from chatpose_jax.models.config import HeadConfig, preset
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.train import run as train_run
from chatpose_jax.train.checkpoints import Checkpoints
from chatpose_jax.train.chips import peak_flops
from chatpose_jax.train.flops import utilisation
from chatpose_jax.train.run import (
    demand_table,
    run_training,
    training_mesh,
)
from chatpose_jax.train.run_config import load_config
from chatpose_jax.train.start import adopt, initial_params
from chatpose_jax.train.step import TrainState
from chatpose_jax.train.trainable import PAPER, assign, flatten
from chatpose_jax.train.trainer import identity
from chatpose_jax.weights import folder as model_folder
from smpl_jax.pose import unmeasured
from tests.train.rows import Rows


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_chips_are_known_by_the_names_that_jax_gives_them(kind, peak):
    assert peak_flops(kind) == peak


def test_lora_takes_two_thirds_of_what_training_everything_would():
    config = load_config("chatpose_13b")
    batch = {"input_ids": np.zeros((16, 1024), np.int32), "pixel_values": np.zeros((16, 1, 336, 336, 3), np.float32)}
    found = utilisation(config.model, config.train)(batch)
    assert 1.4 < found["mfu_6n"] / found["mfu"] < 1.5
    parameters, tokens = 13.0e9, 16 * 1024
    assert 4 * parameters * tokens < found["mfu"] < 4.4 * parameters * tokens


@pytest.mark.parametrize("out", ["", "gs://bucket/run"])
def test_a_run_folder_is_a_folder(out, tmp_path, monkeypatch, capsys):
    """Neither the current one, for a variable that is not set, nor one called gs: below it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", out])
    assert stop.value.code == 2 and "argument --out: expected a folder of a file system" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_device_needs_no_mesh():
    assert training_mesh(load_config("tiny").train) is None
    mesh = training_mesh(load_config("tiny", ["train.mesh.data=-1"]).train)
    assert mesh is not None
    assert dict(mesh.shape) == {"data": mesh.size, "fsdp": 1, "tensor": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model folder to start from, without adapters."""
    model = preset("tiny").replace(lora=None, text=dataclasses.replace(preset("tiny").text, num_layers=1))
    folder = tmp_path_factory.mktemp("base") / "model"
    params = init_params(model, jax.random.key(1))
    return model_folder.save_folder(folder, model, params, processor=tiny_processor(model, "plain"))


LORA = (
    "model.lora={'rank':2,'alpha':4.0,'dropout':0.0,'targets':('q_proj','v_proj')}", "train.steps=2", "train.batch_size=2",
    "data.sources.synthetic.train_size=8", "train.eval_every=0", "data.buckets=1", "data.sources.synthetic.tasks={'image': 1}",
)  # fmt: skip


def lora(*settings):
    return load_config("tiny", LORA + settings)


@pytest.mark.parametrize("sizes", [None, (1, 2, 2)])
def test_int8_is_no_idle_word_beside_init(base, sizes):
    config = lora("model.quantize=int8")
    config = adopt(config, base)
    mesh = None if sizes is None else make_mesh(*sizes)
    before = flatten(initial_params(adopt(lora(), base), base, mesh))
    after = flatten(initial_params(config, base, mesh))
    assert {path: leaf.dtype for path, leaf in after.items()} == {
        path: leaf.dtype for path, leaf in flatten(abstract_params(config.model)).items()
    }
    for path, leaf in after.items():
        if leaf.dtype == np.int8:
            values = leaf * after[f"{path}_scale"][..., None, :]
            assert np.abs(values - before[path]).max() <= np.abs(before[path]).max() / 250
        elif path in before:
            np.testing.assert_array_equal(leaf, before[path])


def test_int8_kernels_do_not_train_beside_init_either(base):
    with pytest.raises(UserError, match=r"is int8 and cannot train"):
        demand_table(adopt(load_config("tiny", ["model.quantize=int8"]), base))


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


def test_rows_given_in_python_are_checked_too(tmp_path):
    """Held-out rows with a single pose have no length."""
    asked = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<POSE>"}]
    good, lone = (Example("x", "text", asked, unmeasured(shape)) for shape in ((1,), ()))
    config = load_config("tiny", ["train.eval_every=7"])
    with pytest.raises(UserError, match=r"^row 0 of data\['val'\]: poses: expected a Pose of batch shape"):
        run_training(config, tmp_path / "run", data={"train": [good], "val": [lone]})


@pytest.mark.parametrize(("name", "flag"), [("mlp", ""), ("my.heads:Deep", "--head my.heads:Deep ")])
def test_the_last_line_says_how_to_ask_the_model(tmp_path, monkeypatch, capsys, name, flag):
    config = load_config("tiny")
    config = dataclasses.replace(config, model=config.model.replace(head=HeadConfig(name)))
    monkeypatch.setattr("chatpose_jax.cli.train.load_config", lambda *_: config)
    monkeypatch.setattr("chatpose_jax.cli.train.run_training", lambda *_, **__: tmp_path / "model")
    assert main(["train", "--out", str(tmp_path)]) == 0
    assert f"\nask it: chatpose chat {tmp_path / 'model'} {flag}--prompt " in capsys.readouterr().out


def test_a_traceback_of_held_out_rows_says_what_wants_them(tmp_path, monkeypatch):
    monkeypatch.setattr(train_run, "examples", lambda config, split, size: {"train": []}[split])
    with pytest.raises(KeyError, match="val") as raised:
        main(["train", "--out", str(tmp_path / "run"), "--set", "train.eval_every=7"])
    assert "train.eval_every=0 trains on them" in raised.value.__notes__[0]


MEASURING = """
import sys
import numpy as np
from chatpose_jax.train.run import row_sizes
from chatpose_jax.data.sizes import measure
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.models.config import HeadConfig, preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.train import hosts

address, rank = sys.argv[1], int(sys.argv[2])
hosts.connect(hosts.find_processes(address, 2, rank))


class Rows(list):
    taken = ()

    def __getitem__(self, index):
        self.taken += (index,)
        return super().__getitem__(index)


processor = tiny_processor(preset("tiny"))
rows = Rows(SyntheticDataset("val", 13, tasks={"text": 1, "text_turns": 1})[:])
sizes = row_sizes(rows, processor, 1024)
assert rows.taken == tuple(range(rank, 13, 2)), rows.taken
np.testing.assert_array_equal(sizes, measure(rows, processor, 1024))
for wrong in (rows[: 12 + rank], [*rows[:4], None, *rows[5:]]):
    try:
        row_sizes(wrong, processor, 1024)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_each_process_measures_its_share_and_errors_reach_all():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURING, address, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for out, _ in said:
        assert "UserError the processes read different data: 12 rows and 13" in out
    assert "AttributeError" in said[0][0]  # row 4 is of process 0
    assert "UserError process 0 of 2 failed, so all end" in said[1][0]


def digests(params):
    return {path: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in flatten(params).items()}


def stored(folder):
    return model_folder.load_params(folder, abstract_params(model_folder.load_model_config(folder)))


def test_a_lora_run_leaves_the_frozen_base_to_the_bit(base, tmp_path):
    table = f"train.trainable={[list(row) for row in PAPER]}"
    config = lora(table, "train.learning_rate=0.01", "train.warmup_steps=0")
    result = stored(run_training(config, tmp_path, init=base))
    before, start, after = map(digests, (stored(base), initial_params(adopt(config, base), base), result))
    trains = {path for path, row in assign(result, PAPER).items() if row.lr is not None}
    assert {path: digest for path, digest in after.items() if path not in trains} == {
        path: digest for path, digest in before.items() if path not in trains
    }
    adapters = {path for path in after if "/lora_" in path}
    assert len(adapters) == 4
    assert adapters <= {path for path in trains if after[path] != start[path]}

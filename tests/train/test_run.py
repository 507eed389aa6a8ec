"""A whole run as a library call: what a notebook does, from docs/training.md."""

import hashlib
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import chatpose_jax
from chatpose_jax.data.example import Example
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.train import run as train_run
from chatpose_jax.train.run import (
    demand_table,
    run_training,
    training_mesh,
)
from chatpose_jax.train.run_config import load_config
from chatpose_jax.train.start import adopt, initial_params
from chatpose_jax.train.trainable import PAPER, assign, flatten
from chatpose_jax.weights import folder as model_folder
from smpl_jax.pose import unmeasured
from tests.train.settings import lora

DOCS = Path(__file__).resolve().parents[2] / "docs" / "training.md"
SMALL = [
    "train.steps=5", "train.log_every=1", "train.batch_size=2", "train.eval_every=0",
    "data.sources.synthetic.train_size=8", "data.sources.synthetic.tasks={'text_short': 1}", "data.buckets=1",
]  # fmt: skip


def stored(folder):
    return flatten(model_folder.load_params(folder, abstract_params(model_folder.load_model_config(folder))))


def trained_on(folder):
    return model_folder.read_folder(folder)["provenance"]["trained"]["data"]


def test_rows_given_in_python_are_what_the_model_folder_names(tmp_path, monkeypatch):
    """Not the configured sources, which were not read."""
    monkeypatch.setattr(train_run, "train", lambda model, settings, params, *_, **__: params)
    rows = SyntheticDataset("train", 3, tasks={"text_short": 1})
    assert trained_on(run_training(load_config("tiny", SMALL), tmp_path, data=rows)) == (
        "3 rows given in Python: data['train']"
    )


def test_the_notebook_of_the_docs_stops_and_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    section = DOCS.read_text().split("## From Python")[1]
    code = re.search(r"```python\n(.*?)```", section, flags=re.S)[1]
    code = code.replace('["train.steps=500", "train.log_every=5"]', "SMALL").replace("== 20", "== 3")
    monkeypatch.chdir(tmp_path)
    names = {"SMALL": SMALL}
    exec(compile(code, str(DOCS), "exec"), names)
    said = capsys.readouterr().out
    assert "stopped at step 4" in said and "resuming from step 4" in said
    assert names["folder"] == Path("out/notebook/model")
    assert isinstance(names["model"], chatpose_jax.chat.ChatPose)
    lines = [json.loads(line) for line in Path("out/notebook/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert list(names["losses"].items()) == [(line["step"], line["loss"]) for line in lines[:4]]

    section = DOCS.read_text().split("## Evaluators")[1]
    Path("mychecks.py").write_text(re.search(r"```python\n(.*?)```", section, flags=re.S)[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    told = []
    validated = [
        "train.eval_every=3", "train.best=knees", "data.sources.synthetic.val_size=8",
        "train.evaluators=(('validation', {'rows': 4, 'drawings': 1}), ('mychecks:knees', {'rows': 3}))",
    ]  # fmt: skip
    config = load_config("tiny", [*SMALL, *validated])
    whole = run_training(config, tmp_path / "whole", progress=False, say=told.append)
    assert capsys.readouterr().out == ""
    assert any("measuring 8 rows" in line for line in told)
    assert "validation on 4 of kind text (8 of the 8 rows of 'val' were read)" in told
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "loss" not in line}
    assert list(found) == [3, 5]
    for line in found.values():
        assert 0 < line["val_knees"] < 180 and line["val_text_pa_mpjpe"] > 0 and line["val_text_pose_root"] > 0
    assert trained_on(names["folder"]) == [["synthetic", 1.0, {"train_size": 8, "tasks": {"text_short": 1}}]]
    once, twice = stored(whole), stored(names["folder"])
    assert once.keys() == twice.keys()
    for path, leaf in once.items():
        np.testing.assert_array_equal(leaf, twice[path], err_msg=path)


def test_one_device_needs_no_mesh():
    assert training_mesh(load_config("tiny").train) is None
    mesh = training_mesh(load_config("tiny", ["train.mesh.data=-1"]).train)
    assert mesh is not None
    assert dict(mesh.shape) == {"slice": 1, "data": mesh.size, "fsdp": 1, "tensor": 1}


def test_int8_kernels_do_not_train_beside_init_either(base):
    with pytest.raises(UserError, match=r"is int8 and cannot train"):
        demand_table(adopt(load_config("tiny", ["model.quantize=int8"]), base))


def test_rows_given_in_python_are_checked_too(tmp_path):
    """Held-out rows with a single pose have no length."""
    asked = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<POSE>"}]
    good, lone = (Example("x", "text", asked, unmeasured(shape)) for shape in ((1,), ()))
    config = load_config("tiny", ["train.eval_every=7"])
    with pytest.raises(UserError, match=r"^row 0 of data\['val'\]: poses: expected a Pose of batch shape"):
        run_training(config, tmp_path / "run", data={"train": [good], "val": [lone]})


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
half, other = Rows(rows), Rows(rows)
half.sizes = lambda *_: np.where(np.arange(13)[:, None] < 6, sizes, -1)
np.testing.assert_array_equal(row_sizes(half, processor, 1024), sizes)
assert half.taken == tuple(range(6 + rank, 13, 2)), half.taken
other.sizes = lambda *_: sizes + [[rank, 0, 0]]
for wrong in (rows[: 12 + rank], other, [*rows[:4], None, *rows[5:]]):
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
        assert "UserError the processes read different data: their rows have different sizes" in out
    assert "AttributeError" in said[0][0]  # row 4 is of process 0
    assert "UserError process 0 of 2 failed, so all end" in said[1][0]


def digests(params):
    return {path: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in flatten(params).items()}


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

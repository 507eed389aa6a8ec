"""A whole run as a library call: what a notebook does, from docs/training.md."""

import json
import re
from pathlib import Path

import numpy as np

import chatpose_jax
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.train import run as train_run
from chatpose_jax.train.run import run_training
from chatpose_jax.train.run_config import load_config
from chatpose_jax.train.trainable import flatten
from chatpose_jax.weights import folder as model_folder

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
        "train.evaluators=(('validation', {'rows': 4, 'pictures': 1}), ('mychecks:knees', {'rows': 3}))",
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

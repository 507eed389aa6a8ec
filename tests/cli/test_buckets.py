"""All commands in a row, in one bucket: weights are converted, trained, asked, exported and compared there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from chatpose_jax.cli.main import main
from chatpose_jax.storage import Location, location, tree, write_bytes
from chatpose_jax.train.log import read_metrics
from tests.weights.sources import make_llava_transformers

CONFIG = """
from chatpose_jax.train.run_config import run_config

def get_config():
    config = run_config(model="tiny")
    config.data.sources = (("synthetic", 1.0, {"train_size": 24, "tasks": {"text": 1}}),)
    config.train.accumulate, config.train.batch_size, config.train.max_length = 1, 8, 320
    config.train.save_every = 2
    return config
"""


@pytest.mark.slow
def test_from_weights_to_answers(bucket: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def chatpose(*words: object) -> str:
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    make_llava_transformers(tmp_path / "llava")
    (tmp_path / "config.py").write_text(CONFIG)
    chatpose("convert", tmp_path / "llava", bucket / "base", "--quiet")

    def train(steps: int) -> str:
        words = ["--config", tmp_path / "config.py", "--init", bucket / "base", "--out", bucket / "run"]
        return chatpose("train", *words, "--set", f"train.steps={steps}")

    said = train(3)
    assert f"starting from {bucket}/base; new: decoder/layers/attn/q_proj/lora_a" in said
    assert f"model folder: {bucket}/run/model" in said
    assert f"resuming from step 3 in {bucket}/run" in train(5)
    assert [line["step"] for line in read_metrics(bucket / "run") if "loss" in line] == [1, 2, 3, 4, 5]

    words = ["--prompt", "Kneel.", "--force-pose", "--max-new-tokens", 8, "--json"]
    answers = [json.loads(chatpose("chat", bucket / name, *words)) for name in ("run", "run/model")]
    assert answers[0] == answers[1] and len(answers[0]["poses"]) == 1
    shown = chatpose("inspect", bucket / "run/model")
    assert f"{bucket}/run/model" in shown and "lora_a" in shown

    for format in ("chatpose", "peft"):
        chatpose("export", bucket / "run/model", bucket / format, "--format", format, "--quiet")
    assert {"config.json", "model.safetensors"} <= {
        name.replace("-00001-of-00001", "") for name in tree(bucket / "chatpose")
    }
    assert "adapter_config.json" in tree(bucket / "peft")
    assert "equal: " in chatpose("verify", tmp_path / "llava", bucket / "base")

    folders = {name.split("/")[0] for name in tree(bucket)}
    assert folders == {"base", "run", "chatpose", "peft"}, "nothing else is left"
    assert not [name for name in tree(bucket) if name.endswith((".lock", ".unfinished"))]


def test_a_wrong_address_is_one_clear_line(
    bucket: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return error

    nowhere = location(str(bucket.parent) + "-which-is-not-there") / "x"
    assert fails("inspect", bucket / "x").startswith(f"error: {bucket}/x: no such folder; expected a model folder")
    assert fails("inspect", nowhere).startswith(f"error: {nowhere}: no such folder")
    assert fails("chat", nowhere, "--prompt", "Hi").startswith(f"error: {nowhere}: no such folder")
    refused = fails("train", "--config", "tiny", "--out", nowhere)
    assert refused.startswith(f"error: {nowhere}: cannot be written (") and "is there such a bucket?" in refused
    write_bytes(bucket / "exported" / "model.safetensors", b"")
    assert f"{bucket}/exported: a PyTorch checkpoint, not a model folder; copy it" in fails(
        "inspect", bucket / "exported"
    )
    write_bytes(bucket / "run" / "checkpoints" / "3" / "_CHECKPOINT_METADATA", b"{}")
    assert f"{bucket}/run: not a model folder, but a training run that has not ended" in fails("chat", bucket / "run")

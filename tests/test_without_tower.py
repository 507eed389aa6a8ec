"""A model without images through the program: no parameters and no arrays of a tower, and one clear error for an image, before anything runs."""

import jax
import numpy as np
import pytest

import chatpose_jax
from chatpose_jax.chat import ChatPose
from chatpose_jax.cli.main import main
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params, fake_batch, init_params
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.train.run import run_training
from chatpose_jax.train.run_config import load_config
from chatpose_jax.train.trainable import flatten
from chatpose_jax.weights.arrays import read_metadata
from chatpose_jax.weights.folder import PARAMS, load_model_config

BLIND = preset("tiny").replace(vision=None)
SMALL = [
    "model.vision=none", "train.steps=2", "train.log_every=1", "train.batch_size=2", "train.eval_every=2", "data.buckets=1",
    "data.sources.synthetic.train_size=8", "data.sources.synthetic.val_size=4", "data.sources.synthetic.kind=text",
    "train.evaluators=(('validation', {'rows': 2, 'drawings': 0}),)",
]  # fmt: skip
GREY = np.full((40, 60, 3), 128, np.uint8)
SHOWN = [{"role": "user", "content": [{"type": "image", "image": GREY}, {"type": "text", "text": "Who is it?"}]}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run_training(load_config("tiny", SMALL), tmp_path_factory.mktemp("run"), progress=False)


def test_there_are_no_arrays_of_a_tower(trained):
    """In the tree, in memory, in a batch, and in the folder."""
    paths = set(flatten(abstract_params(BLIND)))
    assert {path.split("/")[0] for path in paths} == {"decoder", "pose_head"}
    assert paths == set(flatten(init_params(BLIND, jax.random.key(0))))
    assert paths == {path for path in flatten(abstract_params(preset("tiny"))) if path.startswith(("decoder", "pose"))}
    config = load_model_config(trained)
    assert config.vision is None and set(read_metadata(trained / PARAMS)) == set(flatten(abstract_params(config)))
    batch = fake_batch(BLIND, batch=2, length=24, images=3)
    assert "pixel_values" not in batch and batch["input_ids"].shape == (2, 24)


def test_a_trained_one_answers_words_and_refuses_images(trained, tmp_path, capsys):
    model = chatpose_jax.load(trained)
    assert len(model.chat([{"role": "user", "content": "Someone kneels."}], max_new_tokens=4).ids) <= 4
    before = model.engine._state
    with pytest.raises(UserError, match=r"messages\[0\]\.content\[0\]: this model has no vision tower"):
        model.chat(SHOWN)
    assert model.engine._state is before  # nothing ran
    with pytest.raises(UserError, match="no vision tower"):
        model.stream(SHOWN)
    from PIL import Image

    Image.fromarray(GREY).save(tmp_path / "grey.png")
    assert main(["chat", str(trained), "--prompt", "Who is it?", "--image", str(tmp_path / "grey.png")]) != 0
    assert "no vision tower" in capsys.readouterr().err


def test_typed_images_are_refused_at_once(trained, tmp_path, capsys, monkeypatch):
    from PIL import Image

    Image.fromarray(GREY).save(tmp_path / "grey.png")
    lines = iter([f"/image {tmp_path / 'grey.png'}", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", str(trained)]) == 0
    assert "error: /image: this model has no vision tower" in capsys.readouterr().out


def test_training_rows_with_images_are_refused_by_name(tmp_path):
    settings = [line for line in SMALL if "kind=text" not in line]
    with pytest.raises(UserError) as caught:
        run_training(load_config("tiny", [*settings, "train.eval_every=0"]), tmp_path / "run", progress=False)
    words = str(caught.value)
    assert "of data.sources[0] 'synthetic', split 'train' has an image, as " in words and "of the 8 rows have" in words
    assert "leave this source out of data.sources" in words
    assert not (tmp_path / "run" / "checkpoints").exists()
    held_out = SyntheticDataset("val", 4, tasks={"image": 1})
    rows = SyntheticDataset("train", 4, tasks={"text": 1})
    with pytest.raises(UserError, match=r"row \d of data\['val'\] has an image.*train\.eval_every"):
        run_training(load_config("tiny", SMALL), tmp_path / "other", data={"train": rows, "val": held_out})


def test_evaluation_refuses_questions_with_images_before_the_first(trained, tmp_path, capsys):
    data = "synthetic,kind=image,test_size=3"
    assert main(["eval", "estimation", str(trained), "--data", data, "--out", str(tmp_path / "eval"), "--quiet"]) != 0
    assert "no vision tower" in capsys.readouterr().err
    assert not list((tmp_path / "eval").rglob("*.jsonl"))


def test_plan_and_inspect_know_it(trained, capsys):
    assert main(
        [
            "plan",
            "--config",
            "tiny",
            "--set",
            "model.vision=none",
            "--target",
            "cpu:1",
            "--batch",
            "2",
            "--length",
            "64",
        ]
    ) in (0, 1)
    assert "training step of 2 rows × 64 tokens" in capsys.readouterr().out
    assert main(["inspect", str(trained)]) == 0
    assert "  vision      none" in capsys.readouterr().out


def test_images_beside_the_processor_are_refused_too():
    model = ChatPose(BLIND, init_params(BLIND, jax.random.key(0)), tiny_processor(BLIND))
    from chatpose_jax.generate import generate

    with pytest.raises(UserError, match="prompt 0 has 1 images, and this model has no vision tower"):
        generate(BLIND, model.params, [np.array([1, 5, 6], np.int32)], [[np.zeros((64, 64, 3), np.float32)]])

"""Models and functions as systems."""

import json

import jax
import numpy as np
import pytest

from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.spec import Spec, make_system
from chatpose_jax.evaluation.system import Answer, Question
from chatpose_jax.evaluation.systems.chatpose import FORCED
from chatpose_jax.models.chatpose import init_params
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.weights.save import save_folder

HERE = "tests.evaluation.given_systems"
CONFIG = preset("tiny").replace(lora=None)


def folder(path, key=0):
    save_folder(path, CONFIG, init_params(CONFIG, jax.random.key(key)), processor=tiny_processor(CONFIG))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("run") / "model")


def questions(count=5):
    rows = SyntheticDataset("test", count, image_size=64, tasks={"text": 1, "image": 1, "words": 1})
    return [Question.of(row) for row in rows]


def test_each_answer_depends_on_its_batch_alone(model):
    """Poses are forced where they are wanted; words are not. An earlier question changes nothing, not a bit."""
    system = make_system(Spec.parse(f"chatpose,model={model},batch_size=3,max_new_tokens=24"))
    assert system.name == model.parent.name and system.batch_size == 3
    asked = questions(3)
    assert {question.wants for question in asked} == {"pose", "words"}
    first = [answer.to_json() for answer in system.answer(asked)]
    system.answer(questions(5)[3:])
    assert [answer.to_json() for answer in system.answer(asked)] == first
    for question, answer in zip(asked, first, strict=True):
        assert question.wants == "words" or "pose" in answer
        assert answer.get("notes", {}) in ({}, {FORCED: True})
        assert question.wants == "pose" or not answer.get("notes")
    assert any("notes" in answer for answer in first), "random weights offer no pose"


def test_settings_know_the_weights_and_not_the_place(model, tmp_path):
    made = {
        name: make_system(Spec.parse(f"chatpose,model={path}"))
        for name, path in (("a", model), ("b", folder(tmp_path / "b")))
    }
    assert made["a"].settings == made["b"].settings and made["a"].name != made["b"].name
    other = make_system(Spec.parse(f"chatpose,model={folder(tmp_path / 'c', 1)},name=c"))
    assert other.settings["weights"] != made["a"].settings["weights"]
    assert {**other.settings, "weights": made["a"].settings["weights"]} == made["a"].settings
    settings = json.loads((tmp_path / "b/tokenizer/processor.json").read_text())
    settings["images"]["fit"] = "pad"
    (tmp_path / "b/tokenizer/processor.json").write_text(json.dumps(settings))
    padded = make_system(Spec.parse(f"chatpose,model={tmp_path / 'b'}"))
    assert padded.settings["images"] != made["b"].settings["images"]
    half = make_system(Spec.parse(f"chatpose,model={model},dtype=bfloat16"))
    assert half.settings["config"] != made["a"].settings["config"]


@pytest.mark.slow
def test_on_a_mesh_in_bfloat16_with_images(model):
    """The mesh is no setting: it may change between a kill and going on."""
    asked = [question for question in questions(12) if question.kind == "image"][:2]
    system, spread = (
        make_system(Spec.parse(f"chatpose,model={model},batch_size=4,dtype=bfloat16{mesh}"))
        for mesh in ("", ",mesh=2x2x1")
    )
    assert spread.settings == system.settings
    for one, other in zip(system.answer(asked), spread.answer(asked), strict=True):
        one, other = (Answer.from_json(answer.to_json()) for answer in (one, other))
        assert np.abs(np.asarray(one.pose.rotations) - np.asarray(other.pose.rotations)).max() < 0.1
    with pytest.raises(UserError, match=r"mesh=4x4x1: expected sizes of at least 1, for the \d+ devices"):
        make_system(Spec.parse(f"chatpose,model={model},mesh=4x4x1"))


def test_functions_of_messages():
    asked = sorted(questions(6), key=lambda question: question.kind != "text")[:2]
    words = make_system(Spec.parse(f"function,call={HERE}:counts_words"))
    assert words.name == "counts_words" and len(words.settings["source"]) == 32
    assert words.answer(asked[:1])[0].text.endswith(" words")
    pose = make_system(Spec.parse(f"function,call={HERE}:upright,name=mine"))
    assert pose.name == "mine" and [answer.pose.shape for answer in pose.answer(asked)] == [(), ()]
    with pytest.raises(UserError, match=r"question '.*': expected a str, .* found int"):
        make_system(Spec.parse(f"function,call={HERE}:speechless")).answer(asked)
    with_image = next(question for question in questions(12) if question.kind == "image")
    with pytest.raises(
        UserError, match=r"question '.*' \(\w+\.py:\d+\): AttributeError: 'list' object has no attribute 'split'"
    ):
        words.answer([with_image])

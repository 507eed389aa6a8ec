"""The source "keypoints": images of other sources, answered with keypoints in words."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import DataConfig
from chatpose_jax.data.example import NO_POSES, Example
from chatpose_jax.data.keypoint_rows import keypoints_of
from chatpose_jax.data.keypoint_text import KeypointText
from chatpose_jax.data.sources import check_sources, examples
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.data.synthetic.scene import backdrop
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.train.run_config import load_config
from smpl_jax.keypoints import keypoint_set


def source(of="synthetic", split="train", size=64, **options):
    return examples(DataConfig(sources=(("keypoints", 1.0, {"of": of, **options}),)), split, size)


def test_images_are_answered_with_the_keypoints_that_they_show():
    rows = source(train_size=12, tasks={"image": 1, "image_turns": 1}, scale=100)
    plain = SyntheticDataset("train", 12, 0, 64, {"image": 1, "image_turns": 1}, keypoints="coco17")
    text = KeypointText(scale=100)
    assert len(rows) == 12
    for row, shown in zip(rows, plain):
        assert row.id == f"{shown.id}:keypoints" and row.kind == "instruction" and len(row.poses) == 0
        user, assistant = row.messages
        image, question = user["content"]
        np.testing.assert_array_equal(image["image"], shown.messages[0]["content"][0]["image"])
        assert question["text"] == text.question()
        read = text.read(assistant["content"], (64, 64))
        given = shown.extras["keypoints_2d"]
        assert read.unread == 0 and read.points[:, 2].all() and given.shape == (17, 3)
        assert np.abs(read.points - given).max() <= 0.501 * 64 / 100


def test_generated_keypoints_lie_on_the_body_in_the_image():
    """Points are on pixels that the body covers, and the left side of people who face the camera is to the right in the image."""
    rows = SyntheticDataset("val", 8, 0, 128, {"image": 1}, keypoints="smpl24")
    for i, row in enumerate(rows):
        image = np.asarray(row.messages[0]["content"][0]["image"]).astype(int)
        scene = rows.shown(i).scene
        body = np.abs(image - backdrop(scene, 128)).sum(-1) > 6
        x, y = row.extras["keypoints_2d"][:22, :2].astype(int).T  # without the hands, which are small
        assert body[y, x].mean() > 0.9
    faces = SyntheticDataset("val", 8, 0, 128, {"image": 1}, max_yaw=0.0, keypoints="coco17")
    points = np.stack([row.extras["keypoints_2d"] for row in faces])
    assert (points[:, 5, 0] > points[:, 6, 0]).all()  # shoulders


def test_the_rows_of_a_set_of_any_size_are_the_same():
    few, many = (source(train_size=size)[1].messages[1] for size in (3, 300))
    assert few == many


def test_a_batch_of_them_has_no_poses():
    config = DataConfig(sources=(("keypoints", 1.0, {"of": "synthetic", "train_size": 8, "scale": 100}),), buckets=1)
    processor = tiny_processor(preset("tiny"))
    batch = BatchLoader(examples(config, "train", 64), processor, 4, max_length=256).batch(0)
    assert batch["pixel_values"].shape[0] == 4 and not batch["pose_mask"].any()
    assert (batch["labels"] >= 0).sum() > 4 * 100


@pytest.mark.parametrize("name", ["tiny_keypoints", "chatpose_13b_keypoints"])
def test_its_configurations_are_valid(name):
    config = load_config(name)
    check_sources(config.data)
    assert "keypoints" in [row.name for row in config.data.sources]


def test_answers_fit_into_the_configurations():
    config = load_config("tiny_keypoints", ["data.sources.keypoints.train_size=100"])
    processor = tiny_processor(config.model)
    rows = examples(config.data, "train", config.model.vision.image_size)
    lengths = [len(encode_example(processor, row, 1000)["input_ids"]) for row in rows[:20]]
    assert max(lengths) <= config.train.max_length


def test_answers_of_the_paper_s_size_fit(shared_data):
    from chatpose_jax.processing.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.read(shared_data / "tokenizer")
    text = KeypointText()
    answer = text.write(np.full((17, 3), 333.0), (336, 336))
    config = load_config("chatpose_13b_keypoints")
    words = len(tokenizer.encode(answer)) + len(tokenizer.encode(text.question())) + 100  # with the template
    assert config.model.vision.num_patches + words <= config.train.max_length


def own(monkeypatch, rows):
    module = types.ModuleType("keypoint_rows_of_tests")
    module.make = lambda split, *, folder="": rows
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return f"{module.__name__}:make"


def row(id="a", image=None, **extras):
    image = np.zeros((100, 200, 3), np.uint8) if image is None else image
    content = [{"type": "image", "image": image}, {"type": "text", "text": "The pose?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}]
    return Example(id, "image", messages, NO_POSES, extras)


def test_detected_keypoints_of_real_rows(monkeypatch):
    found = np.zeros((18, 3))
    names = [point.name for point in keypoint_set("coco18")]
    for i, name in enumerate(("nose", "left_hip", "right_knee", "left_wrist")):
        found[names.index(name)] = 20 * i + 10, 50, 0.5
    found[names.index("left_ear")] = 300, 50, 0.5  # outside the image
    full = {"poses2d": found, "description": "The man in red."}
    rows = source(own(monkeypatch, [row("bare"), row("full", **full), row("empty", poses2d=np.zeros((18, 3)))]))
    assert [each.id for each in rows] == ["full:keypoints"] * 3  # the next that has keypoints
    assert rows[0].messages[1]["content"] == "nose 50 500, left wrist 350 500, left hip 150 500, right knee 250 500"
    assert rows[0].messages[0]["content"][1]["text"].startswith("The man in red. Where are")
    with pytest.raises(UserError, match=r"none of 2 rows from here on has an image and 4 keypoints .* poses2d"):
        source(own(monkeypatch, [row(), row()]))


def test_annotated_points_stand_in_for_those_that_were_not_detected():
    names = [point.name for point in keypoint_set("humans44")]
    given = np.zeros((44, 3))
    given[names.index("lsp_left_knee")] = 1, 2, 1
    given[names.index("right_knee")], given[names.index("lsp_right_knee")] = (3, 4, 0.5), (9, 9, 1)
    found = keypoints_of({"keypoints_2d": given}, "coco17")
    coco = [point.name for point in keypoint_set("coco17")]
    expected = np.zeros((17, 3))
    expected[coco.index("left_knee")], expected[coco.index("right_knee")] = (1, 2, 1), (3, 4, 0.5)
    np.testing.assert_array_equal(found, expected)
    assert keypoints_of({"keypoints_2d": np.ones((13, 3))}, "coco17") is None and keypoints_of({}, "coco17") is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_size_of_an_upright_photograph(monkeypatch, tmp_path, kind):
    image, exif = Image.new("RGB", (200, 100)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned", kind, exif=exif)
    points = np.zeros((18, 3))
    points[:5] = 50, 100, 1
    for given in (tmp_path / "turned", str(tmp_path / "turned"), (tmp_path / "turned").read_bytes()):
        rows = source(own(monkeypatch, [row(image=given, poses2d=points)]))
        assert rows[0].messages[1]["content"].startswith("nose 500 500,")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "data.sources[0] 'keypoints' needs the option 'of'"),
        ({"of": "synthetic", "points": "coco"}, "'keypoints' raised for split 'train': the set of keypoints must be one of"),
        ({"of": "synthetic", "trian_size": 3}, "its source 'synthetic' has no option 'trian_size'; did you mean train_size?"),
        ({"of": "coco"}, "data.sources[0] 'keypoints': its source 'coco': the prepared folder"),
        ({"of": "coc"}, "its source 'coc': expected 'synthetic' or"),
        ({"of": "synthetic", "tasks": {"text": 1}}, "weights must not be negative, nor all 0"),
    ],
)  # fmt: skip
def test_errors_name_the_source_within(options, words):
    with pytest.raises(UserError) as raised:
        examples(DataConfig(sources=(("keypoints", 1.0, options),)), "train", 64)
    assert words in str(raised.value) and "\n" not in str(raised.value)

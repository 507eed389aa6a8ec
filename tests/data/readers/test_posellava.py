import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.posellava import PoseLlava
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax.pose import check

FINGERS = [0.11167871206998825, 0.042892176657915115, -0.41644182801246643]
FINGERS += [0.10881132632493973, -0.06598567962646484, -0.7562199831008911]
ADJUST = "<pose> Please read this. Bend the left knee. Given the initial human pose, refine it into a SMPL pose."


def pose(seed: int, feet: bool = False, fingers: bool = True) -> list[float]:
    """72 numbers as in the files: upright in the camera frame, mostly with zero feet and two fingers of SMPL-H as hands."""
    values = np.random.default_rng(seed).normal(0, 0.4, (24, 3))
    values[0] = 3.1, 0.01, -0.05
    if not feet:
        values[10:12] = 0
    flat = values.reshape(-1).astype(np.float32).astype(float).tolist()
    return flat[:66] + (FINGERS if fingers else flat[66:])


def turns(question: str, answer: str = "Sure, it is <POSE>.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


GENERATE = {
    "id": "6257",
    "conversations": turns("There is a person: sitting. The SMPL pose is?"),
    "target_pose": pose(1),
}
ADJUST_POSE = {"id": 135000, "input_pose": pose(2), "target_pose": pose(3, feet=True), "conversations": turns(ADJUST)}
ADJUST_IMAGE = {
    "id": 19242,
    "image": "19242.png",
    "conversations": turns("<image> Lower the left leg. Adjust the SMPL pose."),
    "target_pose": pose(4),
}
ESTIMATE = {
    "id": 300000,
    "image": "S8_WalkDog_1.55011271_000026.jpg",
    "conversations": turns("<image> Can you predict the SMPL pose?", "It is <POSE>."),
    "target_pose": pose(5, feet=True, fingers=False),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The layout of the repository's folder ds_config."""
    tests = tmp_path / "test_dataset"
    files: dict[str, list[Any]] = {
        "pose_generation_task/posescript_100_samples.json": [GENERATE],
        "pose_adjustment_task/input_pose/posepart_test.json": [ADJUST_POSE],
        "pose_adjustment_task/input_images/posefix_6k_human_test.json": [ADJUST_IMAGE],
        "pose_estimation_task/human36_test.json": [ESTIMATE],
    }
    for name, rows in files.items():
        (tests / name).parent.mkdir(parents=True)
        (tests / name).write_text(json.dumps(rows))
    for name in (
        "pose_adjustment_task/input_images/images/19242.png",
        f"pose_estimation_task/images/{ESTIMATE['image']}",
    ):
        (tests / name).parent.mkdir()
        Image.new("RGB", (20, 30), "green").save(tests / name)
    (tmp_path / "eval_ds.json").write_text(json.dumps({"pose_generation": {"root": " ", "annotation": "x.json"}}))
    (tmp_path / "posepart_train.jsonl").write_text(f"{json.dumps(ADJUST_POSE)}\n{json.dumps(GENERATE)}\n")
    return tmp_path


def read(reader: PoseLlava, split: Split = "test") -> list[Record | Skipped]:
    return [item for part in reader.parts(split) for item in reader.read(split, part)]


def by_task(reader: PoseLlava, split: Split = "test") -> dict[str, Record]:
    found = {}
    for item in read(reader, split):
        assert isinstance(item, Record), item
        found[f"{item.extras['task']} {item.kind}"] = item
    return found


def one(folder: Path, row: Any) -> Record | Skipped:
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps([row]))
    [item] = read(PoseLlava(folder), "train")
    return item


def test_every_task(source: Path) -> None:
    found = by_task(PoseLlava(source))
    assert set(found) == {"generation text", "adjustment text", "adjustment image", "estimation image"}
    assert found["estimation image"].group == "S8_WalkDog_1" and found["generation text"].group == ""
    for item in found.values():
        check(item.poses)
        encoded = encode_example(tiny_processor(preset("tiny")), from_bytes(to_bytes(item)).example(), 512)
        assert len(encoded["images"]) == len(item.images) and item.poses.frame == "camera"
        assert len(encoded["pose_positions"]) == 1 + item.extras["input_pose"]
        assert not any("<pose>" in str(message) for message in item.conversations[0])
    content = found["adjustment image"].conversations[0][0]["content"]
    assert content == [{"type": "image"}, {"type": "text", "text": "Lower the left leg. Adjust the SMPL pose."}]
    rotations = Rotation.from_rotvec(np.reshape(GENERATE["target_pose"], (24, 3))).as_matrix()
    np.testing.assert_allclose(found["generation text"].poses.rotations[0, :22], rotations[:22], atol=1e-6)


def test_what_is_not_measured(source: Path) -> None:
    found = by_task(PoseLlava(source))
    for name, missing in {"generation text": [10, 11, 22, 23], "estimation image": [22, 23]}.items():
        item = found[name]
        assert np.flatnonzero(~item.poses.measured[0]).tolist() == missing
        assert (item.poses.rotations[0, 22:] == np.eye(3)).all()
    adjusted = found["adjustment text"].poses.measured
    assert (~adjusted).sum(-1).tolist() == [4, 2]


def test_an_input_pose_is_put_into_words(source: Path) -> None:
    item = by_task(PoseLlava(source))["adjustment text"]
    assert [message["role"] for message in item.conversations[0]] == ["user", "assistant"] * 2
    first, answer, change, second = (message["content"] for message in item.conversations[0])
    assert len(first.split()) > 8 and "<POSE>" in answer and second == "Sure, it is <POSE>."
    assert change == ADJUST.removeprefix("<pose> ")
    for place, name in enumerate(("input_pose", "target_pose")):
        expected = Rotation.from_rotvec(np.reshape(ADJUST_POSE[name], (24, 3))[:22]).as_matrix()
        np.testing.assert_allclose(item.poses.rotations[place, :22], expected, atol=1e-6)
    assert by_task(PoseLlava(source))["adjustment text"].conversations == item.conversations


def test_splits_and_layouts(source: Path) -> None:
    assert set(by_task(PoseLlava(source), "train")) == {"adjustment text", "generation text"}
    assert not PoseLlava(source).parts("val") and len(read(PoseLlava(source, split="val"), "val")) == 6
    folder = source / "test_dataset" / "pose_estimation_task"
    assert not read(PoseLlava(folder / ".." / "pose_estimation_task", split="train"))
    assert len(by_task(PoseLlava(folder, images=str(folder / "images")))) == 1
    with pytest.raises(UserError, match=r"\*\.json not found.*PosePart|PosePart.*\*\.json not found"):
        PoseLlava(folder / "images")


def test_faults(source: Path, tmp_path: Path) -> None:
    cases = {
        "71": (GENERATE | {"target_pose": pose(1)[:71]}, "expected 72 numbers"),
        "nan": (GENERATE | {"target_pose": [float("nan"), *pose(1)[1:]]}, "finite"),
        "none": (
            {name: value for name, value in GENERATE.items() if name != "target_pose"},
            "1 <POSE>, and target_pose 0",
        ),
        "two": (GENERATE | {"conversations": turns("Which?", "<POSE> <POSE>")}, "2 <POSE>, and target_pose 1"),
        "outside": (ADJUST_IMAGE | {"image": "../a.png"}, "inside"),
        "no input": (GENERATE | {"conversations": turns(ADJUST)}, "holds <pose>, and there is no input_pose"),
        "zeros": (GENERATE | {"target_pose": [0.0] * 66 + FINGERS}, "target_pose: all numbers of a pose are zero"),
    }
    for name, (row, words) in cases.items():
        item = one(tmp_path / f"x{name}", row)
        assert isinstance(item, Skipped) and item.broken and words in item.detail, name
    item = one(tmp_path / "absent", ADJUST_IMAGE)
    assert isinstance(item, Skipped) and not item.broken and item.reason == "an image is not there"

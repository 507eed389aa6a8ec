from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.posefix import PoseFix
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax.pose import check

from .amass_files import motion, upright, without_yaw, write_json, write_smplh, write_v2

RUB, EYES = "BioMotionLab_NTroje/rub055/0027_jump_poses.npz", "Eyes_Japan_Dataset/aita/walk-01_poses.npz"
PLACES = {str(n): ["AMASS", RUB if n < 10 else EYES, n] for n in range(20)}
PAIRS = [[0, 1], [2, 13], [4, 5], [6, 17], [99, 1], [3, 4]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    names = [f"{split}_{kind}_sequence_pair_ids.json" for split in ("train", "val", "test") for kind in ("in", "out")]
    lists: dict[str, Any] = {name: [] for name in names}
    write_json(
        tmp_path / "posefix_release",
        lists
        | {
            "ids_2_dataset_sequence_and_frame_index_100k.json": PLACES,
            "pair_id_2_pose_ids.json": PAIRS,
            "posefix_human_6157.json": {"0": ["Raise your arm"]},
            "posefix_paraphrases_4284.json": {"0": ["Lift the arm."]},
            "posefix_auto_135305.json": {str(n): [f"Automatic {v} of {n}." for v in "abc"] for n in range(5)},
            "train_in_sequence_pair_ids.json": [0, 5],
            "train_out_sequence_pair_ids.json": [1, 4],
            "test_in_sequence_pair_ids.json": [2],
            "test_out_sequence_pair_ids.json": [3],
        },
    )
    write_smplh(tmp_path / "AMASS" / "BMLrub" / "rub055" / "0027_jump_poses.npz", motion(20))
    write_smplh(tmp_path / "AMASS" / "EyesJapanDataset" / "aita" / "walk-01_poses.npz", motion(20, 1), b"female")
    return tmp_path


def read(reader: PoseFix, split: Split = "train") -> dict[str, Record | Skipped]:
    return {item.key: item for part in reader.parts(split) for item in reader.read(split, part)}


def record(reader: PoseFix, key: str, split: Split = "train") -> Record:
    item = read(reader, split)[key]
    assert isinstance(item, Record)
    return item


def words(item: Record, n: int = 0) -> list[str]:
    return [str(message["content"]) for message in item.conversations[n]]


def test_the_second_answer_is_the_changed_pose(source: Path) -> None:
    reader = PoseFix(source)
    item = record(reader, "0")
    assert [message["role"] for message in item.conversations[0]] == ["user", "assistant"] * 2
    first, answer, change, second = words(item)
    assert "<POSE>" in answer and "<POSE>" in second and "Raise your arm." in change and "Raise" not in first
    assert check(item.poses).rotations.shape == (2, 52, 3, 3) and item.poses.frame == "camera"
    encoded = encode_example(tiny_processor(preset("tiny")), item.example(), 512)
    assert len(encoded["pose_positions"]) == 2 and encoded["poses"].measured.sum(-1).tolist() == [20, 20]
    assert item.extras["in_sequence"] is True and item.extras["pose_ids"].tolist() == [0, 1]
    assert item.group == item.extras["first_group"] == "BMLrub/rub055/0027_jump_poses.npz"


def test_pairs_of_one_file_share_the_yaw(source: Path) -> None:
    same, apart = record(PoseFix(source), "0"), record(PoseFix(source), "1")
    poses, other = motion(20)[:, :3], motion(20, 1)[:, :3]
    np.testing.assert_allclose(same.poses.rotations[0, 0], without_yaw(poses[0]), atol=1e-6)
    np.testing.assert_allclose(same.poses.rotations[1, 0], without_yaw(poses[1], poses[0]), atol=1e-6)
    np.testing.assert_allclose(apart.poses.rotations[:, 0], [without_yaw(poses[2]), without_yaw(other[13])], atol=1e-6)
    assert apart.extras["in_sequence"] is False
    assert (apart.group, apart.extras["first_group"]) == (
        "EyesJapanDataset/aita/walk-01_poses.npz",
        "BMLrub/rub055/0027_jump_poses.npz",
    )


def test_a_turn_of_the_body_stays(source: Path) -> None:
    roots = np.stack([upright(0.5 + n * np.pi / 2) for n in range(20)])  # each a quarter turn to the left of the last
    write_smplh(source / "AMASS" / "BMLrub" / "rub055" / "0027_jump_poses.npz", motion(20, roots=roots))
    found = record(PoseFix(source), "0").poses.rotations[:, 0]
    np.testing.assert_allclose(found[0], np.diag([1, -1, -1]), atol=1e-6)
    # facing the camera (-z), then where its own left was: the camera's right (+x)
    np.testing.assert_allclose(found[1] @ [0, 0, 1], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(Rotation.from_matrix(found[1]).apply([0, 1, 0]), [0, -1, 0], atol=1e-6)


def test_pairs_and_texts_by_option(source: Path) -> None:
    assert set(read(PoseFix(source))) == {"0", "1", "4", "5"}
    assert set(read(PoseFix(source, pairs="in"))) == {"0", "5"} and set(read(PoseFix(source, pairs="out"))) == {
        "1",
        "4",
    }
    assert "Automatic" in words(record(PoseFix(source), "1"))[2]
    assert "Automatic" in words(record(PoseFix(source, captions="automatic"), "0"))[2]
    both = record(PoseFix(source, captions="human-or-paraphrase", variants=200), "0")
    drawn = sum("Lift" in words(both, n)[2] for n in range(200))
    assert 70 < drawn < 130
    human = read(PoseFix(source, captions="human"))
    left_out = human["1"]
    assert isinstance(human["0"], Record)
    assert isinstance(left_out, Skipped) and left_out.reason == "no text of the chosen kind" and not left_out.broken


def test_first_poses_are_described(source: Path, tmp_path: Path) -> None:
    assert len(words(record(PoseFix(source), "0"))[0].split()) > 8  # by the rules of this package
    write_v2(tmp_path / "ps", PLACES, {"2": ["Person two."]}, {})
    reader = PoseFix(source, posescript=str(tmp_path / "ps"))
    assert "Automatic N" in words(record(reader, "0"))[0] and "Person two." in words(record(reader, "1"))[0]
    write_json(tmp_path / "ps", {"posescript_auto_100k.json": {}})
    bare = read(PoseFix(source, posescript=str(tmp_path / "ps")))["0"]
    assert isinstance(bare, Skipped) and bare.reason == "PoseScript has no caption of the first pose"


def test_evaluation_rows_carry_all_texts(source: Path) -> None:
    found = read(PoseFix(source, variants=4), "test")
    assert set(found) == {"2", "3"} and not read(PoseFix(source), "val")
    item = found["2"]
    assert isinstance(item, Record) and len(item.conversations) == 1
    extras = from_bytes(to_bytes(item)).extras
    assert extras["pair_id"] == 2 and extras["human"] == () and len(extras["automatic"]) == 3


def test_faults_are_reported(source: Path) -> None:
    fault = read(PoseFix(source))["4"]
    assert isinstance(fault, Skipped) and fault.broken and "no pose 99" in fault.detail
    write_json(source / "posefix_release", {"pair_id_2_pose_ids.json": [[0], [1, "x"], [2, 3]]})
    found = read(PoseFix(source))
    assert [(item.key, item.broken) for item in found.values() if isinstance(item, Skipped)] == [
        (key, True) for key in ("0", "5", "1", "4")
    ]
    (source / "posefix_release" / "posefix_auto_135305.json").unlink()
    with pytest.raises(UserError, match=r"posefix_auto_135305\.json not found"):
        PoseFix(source)

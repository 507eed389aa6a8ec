import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.cotpose import CotPose
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax.pose import check

from .amass_files import motion, upright, without_yaw, write_v2

POSES = motion(3)[:, :66]
ROOTS = {
    "z-up": upright(0.6),
    "model": [0.0, 0.6, 0.0],
    "camera": (Rotation.from_rotvec([np.pi, 0, 0]) * Rotation.from_euler("y", 0.6)).as_rotvec(),
}


def row(action: str, values: Any, pose_id: Any = "12", refined: Any = "") -> dict[str, Any]:
    return {
        "pose_id": pose_id,
        "action": action,
        "reasoning": f"the arms of {action} are raised",
        "reasoning_refined": refined,
        "answer": "<pose_id_2048><pose_id_7><pose_id_2049>.",
        "pose_param": np.asarray(values).tolist(),
    }


def synthetic(root: Any) -> np.ndarray:
    return np.concatenate([root, POSES[0, 3:]])


TRAIN = [
    row("throw", POSES[0]),
    *(row(f"synthetic {frame}", synthetic(root), "syn", f"Both arms, {frame}") for frame, root in ROOTS.items()),
    row("lie", synthetic([0, 0, np.pi / 2]), "syn", "Lying."),
]
TEST = [
    row(action, synthetic(ROOTS["z-up"]), "syn_test", "the last text of another row") for action in ("jump", "wave")
]


def write(folder: Path, **splits: list[Any]) -> Path:
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path, train=TRAIN, test=TEST)


def read(reader: CotPose, split: Split = "train") -> list[Record | Skipped]:
    return [item for part in reader.parts(split) for item in reader.read(split, part)]


def records(reader: CotPose, split: Split = "train") -> list[Record]:
    return [item for item in read(reader, split) if isinstance(item, Record)]


def test_a_pose_of_amass(source: Path) -> None:
    item = records(CotPose(source))[0]
    assert check(item.poses).rotations.shape == (1, 22, 3, 3) and item.poses.frame == "camera"
    np.testing.assert_allclose(item.poses.rotations[0, 0], without_yaw(POSES[0, :3]), atol=1e-6)
    body = Rotation.from_rotvec(POSES[0].reshape(22, 3)[1:]).as_matrix()
    np.testing.assert_allclose(item.poses.rotations[0, 1:], body, atol=1e-6)
    assert np.flatnonzero(~item.poses.measured[0]).tolist() == [10, 11]
    user, assistant = (message["content"] for message in item.conversations[0])
    assert "throw" in user and assistant.startswith("the arms of throw are raised. ") and "<POSE>" in assistant
    encoded = encode_example(tiny_processor(preset("tiny")), from_bytes(to_bytes(item)).example(), 512)
    assert len(encoded["pose_positions"]) == 1 and encoded["poses"].measured.sum() == 20
    assert item.extras == {"action": "throw", "reasoning": "the arms of throw are raised.", "synthetic": False}


def test_frames_of_other_rows(source: Path) -> None:
    found = records(CotPose(source))[1:]
    assert [item.extras["reasoning"] for item in found] == [f"Both arms, {frame}." for frame in ROOTS]
    for item in found:  # each turned by 0.6 radians about the vertical of its own frame, which is removed
        np.testing.assert_allclose(item.poses.rotations[0, 0], np.diag([1, -1, -1]), atol=1e-6)
    [left_out] = [item for item in read(CotPose(source)) if isinstance(item, Skipped)]
    assert left_out.reason == "the body stands upright in no known frame" and not left_out.broken


def test_a_refined_text_of_several_actions_is_not_used(source: Path) -> None:
    found = records(CotPose(source), "test")
    assert [item.extras["reasoning"] for item in found] == [
        f"the arms of {word} are raised." for word in ("jump", "wave")
    ]
    assert all(item.extras["synthetic"] for item in found)


def test_options(source: Path, tmp_path: Path) -> None:
    item = records(CotPose(source, question="reasoning", answer="pose"))[0]
    user, assistant = (message["content"] for message in item.conversations[0])
    assert "The arms of throw" in user or "the arms of throw are raised." in user
    assert "arms" not in assistant and "<POSE>" in assistant
    assert len(records(CotPose(source, variants=3))[0].conversations) == 3
    with pytest.raises(UserError, match="answer=pose"):
        CotPose(source, question="reasoning")
    write_v2(tmp_path / "ps", {"12": ["AMASS", "BioMotionLab_NTroje/rub055/a_poses.npz", 3]}, {}, {})
    found = records(CotPose(source, posescript=str(tmp_path / "ps")))
    assert [item.group for item in found] == ["BMLrub/rub055/a_poses.npz", "", "", ""]


def test_faults(source: Path) -> None:
    write(
        source, val=[TRAIN[0] | {"pose_param": [1.0] * 65}, TRAIN[0] | {"action": 7}, TRAIN[0] | {"action": None}, [1]]
    )
    found = [item for item in read(CotPose(source), "val") if isinstance(item, Skipped)]
    assert [item.broken for item in found] == [True, True, False, True]
    assert "expected 66 numbers" in found[0].detail and "expected text" in found[1].detail
    for split in ("train", "val", "test"):
        (source / f"{split}.jsonl").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl.*not found.*load_dataset"):
        CotPose(source)

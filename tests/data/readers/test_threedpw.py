import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import DataConfig, SourceRow, Split
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.threedpw import ThreeDPW, gender_of
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.data.sources import examples
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax import for_body, joints, load_body, pelvis
from smpl_jax.pose import check, placed

from .threedpw_files import CAM_INT, SIZE, python2, sequence, write

PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)


def read(source: Path, split: Split = "test", **options: Any) -> list[Record | Skipped]:
    reader = ThreeDPW(source, **options)
    return [item for part in reader.parts(split) for item in reader.read(split, part)]


def records(source: Path, split: Split = "test", **options: Any) -> list[Record]:
    found = read(source, split, **options)
    assert all(isinstance(item, Record) for item in found), found
    return found  # type: ignore[return-value]


def test_the_fixture_is_a_pickle_of_python_2(tmp_path: Path) -> None:
    data = python2(sequence())
    with pytest.raises(UnicodeDecodeError):
        pickle.loads(data)  # arrays are not ASCII
    found = pickle.loads(data, encoding="latin1")
    assert found["genders"] == ["m", "f"] and found["betas"][1].shape == (300,)


def test_people_in_the_camera_frame(tmp_path: Path) -> None:
    data = write(tmp_path, sequence())
    found = records(tmp_path)
    assert [record.key for record in found] == [
        f"street_00/image_{frame:05d}.jpg#{actor}" for frame in range(4) for actor in range(2)
    ]
    for record in found:
        frame, actor = record.extras["frame"], record.extras["actor"]
        camera = data["cam_poses"][frame]
        pose = check(record.poses)
        axis_angle = data["poses"][actor][frame].reshape(24, 3)
        expected = Rotation.from_rotvec(axis_angle).as_matrix()
        expected[0] = (Rotation.from_matrix(camera[:3, :3]) * Rotation.from_rotvec(axis_angle[0])).as_matrix()
        np.testing.assert_allclose(pose.rotations[0], expected, atol=1e-6)
        assert pose.frame == "camera" and pose.betas is None and pose.translation is None
        assert np.flatnonzero(~pose.measured[0]).tolist() == [10, 11, 22, 23]
        assert placed(pose.measured, PARENTS).all()  # the positions of all 24 joints still count
        joints = np.c_[data["jointPositions"][actor][frame].reshape(24, 3), np.ones(24)]
        np.testing.assert_allclose(record.extras["joint_cam"], (joints @ camera.T)[:, :3], atol=1e-5)
        assert record.kind == "image" and record.group == "street_00"
        assert record.extras["gender"] == ("male", "female")[actor] and record.extras["detected"] is True
        assert record.extras["img_frame_id"] == 2 * frame
        np.testing.assert_allclose(record.extras["betas"], data["betas"][actor][:10], rtol=1e-6)
        np.testing.assert_array_equal(record.extras["trans_world"], data["trans"][actor][frame])
        np.testing.assert_array_equal(record.extras["pose_world"], axis_angle[0])
        np.testing.assert_array_equal(record.extras["cam_ext"], camera)
        assert to_bytes(from_bytes(to_bytes(record))) == to_bytes(record)
    assert [to_bytes(record) for record in records(tmp_path)] == [to_bytes(record) for record in found]


def test_the_crop_its_keypoints_and_its_camera_agree(tmp_path: Path) -> None:
    data = write(tmp_path, sequence())
    for record in records(tmp_path):
        x, y, side = record.extras["box"]
        points = data["poses2d"][record.extras["actor"]][record.extras["frame"]].T
        np.testing.assert_allclose(side, 1.2 * np.ptp(points[:, :2], axis=0).max(), rtol=1e-6)
        np.testing.assert_allclose(
            record.extras["poses2d"][:, :2], (points[:, :2] - [x, y]) * 256 / side + 128, atol=1e-3
        )
        projected = record.extras["joint_cam"] @ record.extras["cam_int"].T
        projected = projected[:, :2] / projected[:, 2:]
        np.testing.assert_allclose(projected[:18], record.extras["poses2d"][:, :2], atol=1e-2)
        assert record.extras["image_size"].tolist() == list(SIZE)
        pixels = np.asarray(Image.open(io.BytesIO(record.images[0])), float)
        assert pixels.shape == (256, 256, 3)
        at = np.array([x, y]) + (np.array([120, 140]) - 128) * side / 256  # of the original image
        np.testing.assert_allclose(pixels[140, 120, :2], [2 * at[0], 3 * at[1]], atol=6)


def test_with_the_body_the_translation_is_exact(tmp_path: Path) -> None:
    """The rule of the docstring, with any body: posed in the world and moved by the camera, or posed in the camera frame."""
    write(tmp_path, sequence(frames=2))
    body = load_body()
    for record in records(tmp_path):
        extras, betas = record.extras, np.zeros(10, np.float32)
        turn, moved = extras["cam_ext"][:3, :3], extras["cam_ext"][:3, 3]
        world = np.array(record.poses.rotations[0])
        world[0] = Rotation.from_rotvec(extras["pose_world"]).as_matrix()
        expected = np.asarray(joints(body, world, betas, extras["trans_world"])) @ turn.T + moved
        p = np.asarray(pelvis(body, betas))
        pose = record.poses[0].replace(translation=turn @ (extras["trans_world"] + p) + moved - p)
        np.testing.assert_allclose(joints(body, **for_body(pose, body)), expected, atol=1e-5)


def test_whole_images_are_the_files(tmp_path: Path) -> None:
    write(tmp_path, sequence(frames=5))
    found = records(tmp_path, crop=False, stride=2)
    assert [record.extras["frame"] for record in found] == [0, 0, 2, 2, 4, 4]
    for record in found:
        name = record.key.partition("#")[0]
        assert record.images == ((tmp_path / "imageFiles" / name).read_bytes(),)
        np.testing.assert_allclose(record.extras["cam_int"], CAM_INT)


def test_splits_and_rows(tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "validation", "test")):
        write(tmp_path, sequence(frames=1, people=1, seed=seed), split)
    for split, group in (("train", "street_00"), ("val", "street_01"), ("test", "street_02")):
        (record,) = records(tmp_path, split, variants=3)  # type: ignore[arg-type]
        assert record.group == group and len(record.conversations) == (3 if split == "train" else 1)
    (record,) = records(tmp_path, "train", variants=3)
    processor = tiny_processor(preset("tiny"))
    encoded = encode_example(processor, record.example(2), max_length=2048)
    assert len(encoded["images"]) == 1 and encoded["poses"].measured.sum() == 20
    assert not encoded["poses"].has_betas.any() and not encoded["poses"].has_translation.any()


def test_frames_that_count(tmp_path: Path) -> None:
    data = sequence(people=1)
    data["campose_valid"][0][1] = 0
    data["poses2d"][0][2] = 0
    write(tmp_path, data)
    found = read(tmp_path)
    assert found[1] == Skipped("street_00/image_00001.jpg#0", "the camera was not aligned by this person")
    kept = [item for item in found if isinstance(item, Record)]
    assert [record.extras["detected"] for record in kept] == [True, False, True]
    joints = kept[1].extras["joint_cam"] @ CAM_INT.T  # then the box is around all joints
    points = joints[:, :2] / joints[:, 2:]
    expected = [*(points.min(0) + points.max(0)) / 2, 1.2 * np.ptp(points, axis=0).max()]
    np.testing.assert_allclose(kept[1].extras["box"], expected, rtol=1e-4)


def test_people_outside_the_image_are_left_out(tmp_path: Path) -> None:
    data = sequence(frames=3, people=1)
    data["poses2d"][0][0, 0] += 300
    data["poses2d"][0][1:] = 0
    data["cam_poses"][1, :3] *= -1  # behind the camera
    data["cam_poses"][1, :3, :3] *= -1
    data["cam_poses"][1, 2, 3] -= 20
    write(tmp_path, data)
    assert [getattr(item, "reason", None) for item in read(tmp_path)] == [
        "outside the image",
        "outside the image",
        None,
    ]


def test_upright_people_are_upright(tmp_path: Path) -> None:
    """Upright in a world with y up, seen by a camera that is turned about its vertical axis: up is -y of the camera frame."""
    data, yaw = sequence(people=1), Rotation.from_euler("y", [[0.0], [1], [2], [3]])
    data["poses"][0][:, :3] = Rotation.from_euler("y", [[0.3], [-1], [2], [0]]).as_rotvec()
    joints = np.zeros((4, 24, 3)) + np.linspace(-1, 0.6, 24)[:, None] * [0.1, 1, 0.1]
    data["jointPositions"][0][:] = joints.reshape(4, 72)
    data["cam_poses"] = np.tile(np.eye(4), (4, 1, 1))
    data["cam_poses"][:, :3, :3] = (Rotation.from_rotvec([np.pi, 0, 0]) * yaw).as_matrix()
    data["cam_poses"][:, 2, 3] = 4
    data["poses2d"][0][:] = 0
    write(tmp_path, data)
    found = records(tmp_path)
    assert len(found) == 4
    for record in found:
        np.testing.assert_allclose(record.poses.rotations[0, 0] @ [0, 1, 0], [0, -1, 0], atol=1e-6)
        assert (np.diff(record.extras["joint_cam"][:, 1]) < 0).all()  # the last joint is the highest


def test_damaged_images_are_reported(tmp_path: Path) -> None:
    data = sequence()
    data["poses"][1][3, 5] = np.nan
    write(tmp_path, data)
    images = tmp_path / "imageFiles" / "street_00"
    (images / "image_00000.jpg").unlink()
    (images / "image_00001.jpg").write_bytes((images / "image_00001.jpg").read_bytes()[:300])
    found = read(tmp_path, crop=False)
    broken = [item for item in found if isinstance(item, Skipped)]
    assert [item.key[-11:] for item in broken] == [
        "00000.jpg#0",
        "00000.jpg#1",
        "00001.jpg#0",
        "00001.jpg#1",
        "00003.jpg#1",
    ]
    assert all(item.broken for item in broken) and "image_00000.jpg" in broken[0].detail
    assert broken[4].reason == "damaged pose or camera"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"poses": [np.zeros((3, 72))] * 2}, r"poses must have the shape \(4, 72\)"),
        ({"poses2d": [np.zeros((4, 18, 3))] * 2}, r"poses2d must have the shape \(4, 3, 18\)"),
        ({"cam_poses": np.zeros((4, 3, 3))}, "cam_poses must have the shape"),
        ({"trans": [np.zeros((4, 3))]}, "has no numbers trans"),
        ({"betas": [np.zeros(3)] * 2}, "betas must be at least 10"),
        ({"genders": ["x", "f"]}, "expected a gender"),
        ({"genders": None}, "expected a dictionary of 3DPW"),
    ],
)
def test_files_of_another_form_are_errors(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    write(tmp_path, sequence(**change), images=False)
    with pytest.raises(UserError, match=rf"(?s)street_00\.pkl.*{match}"):
        read(tmp_path)


def test_hostile_pickles_run_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "mark"), "w")

    write(tmp_path, sequence(texture_maps=[Hostile()]), images=False)
    with pytest.raises(UserError, match=r"street_00\.pkl: .*nothing was run"):
        read(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_missing_files_and_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sequenceFiles.*not found.*virtualhumans.*non-commercial"):
        ThreeDPW(tmp_path)
    write(tmp_path, sequence(frames=1))
    with pytest.raises(UserError, match="stride"):
        ThreeDPW(tmp_path, stride=0)
    assert ThreeDPW(tmp_path).parts("train") == []


def test_genders() -> None:
    assert [gender_of(word) for word in ("m", b"f", "MALE", np.str_("female"), np.bytes_(b"n"))] == [
        "male", "female", "male", "female", "neutral",
    ]  # fmt: skip
    for word in ("", "mal", 1):
        with pytest.raises(UserError, match="expected a gender"):
            gender_of(word)


def test_prepared_rows(tmp_path: Path) -> None:
    write(tmp_path / "files", sequence(frames=2), "train")
    write(tmp_path / "files", sequence(frames=2, seed=1))
    out = tmp_path / "prepared" / "3dpw"
    about = prepare("3dpw", tmp_path / "files", out, processor=tiny_processor(preset("tiny")), options={"variants": 2})
    assert {split: (some["rows"], some["records"]) for split, some in about["splits"].items()} == {
        "train": (8, 4), "test": (4, 4),
    }  # fmt: skip
    rows = examples(DataConfig(sources=(SourceRow("3dpw"),), root=str(out.parent)), "test", 32)
    assert rows[3].id == "street_01/image_00001.jpg#1" and rows[3].extras["joint_cam"].shape == (24, 3)

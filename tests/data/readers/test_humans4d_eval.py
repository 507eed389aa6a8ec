import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from chatpose_jax import named
from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.datasets import DATA_SETS
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.humans4d_eval import H36MVal, Humans4DEval, ThreeDPWTest
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax.pose import check

from .humans4d_eval_files import H36M_NAMES, write_3dpw, write_h36m
from .threedpw_files import SIZE


def read(reader: Humans4DEval) -> list[Record | Skipped]:
    return [item for part in reader.parts("test") for item in reader.read("test", part)]


def records(reader: Humans4DEval) -> list[Record]:
    found = read(reader)
    assert all(isinstance(item, Record) for item in found), found
    return found  # type: ignore[return-value]


def row_of(record: Record, arrays: dict[str, np.ndarray]) -> int:
    name, _, person = record.key.partition("#")
    return int(np.flatnonzero(arrays["imgname"] == name)[int(person)])


@pytest.mark.parametrize("folder", ["hmr2_evaluation_data", ""])
def test_3dpw(tmp_path: Path, folder: str) -> None:
    arrays = write_3dpw(tmp_path, folder=folder)
    reader = ThreeDPWTest(tmp_path)
    assert reader.parts("test") == ("bus_01", "walk_00") and reader.parts("train") == reader.parts("val") == ()
    found = records(reader)
    assert len({record.key for record in found}) == 12
    assert sorted(row_of(record, arrays) for record in found) == list(range(12))
    for record in found:
        row = row_of(record, arrays)
        pose = check(record.poses)
        expected = Rotation.from_rotvec(arrays["body_pose"][row].reshape(24, 3)).as_matrix()
        np.testing.assert_allclose(pose.rotations[0], expected, atol=1e-6)
        assert pose.frame == "camera" and pose.betas is None and pose.translation is None
        assert np.flatnonzero(~pose.measured[0]).tolist() == [10, 11, 22, 23]
        np.testing.assert_allclose(record.extras["betas"], arrays["betas"][row], rtol=1e-6)
        assert record.extras["gender"] == ("male", "female")[row % 2] and record.group in record.key
        np.testing.assert_array_equal(record.extras["keypoints_3d"][25:], arrays["extra_keypoints_3d"][row])
        assert record.extras["keypoints_3d"].shape == (44, 4) and not record.extras["keypoints_3d"][:25].any()
        side, middle = arrays["scale"][row], arrays["center"][row]
        np.testing.assert_allclose(record.extras["box"], [*middle, side], rtol=1e-6)
        points = (arrays["body_keypoints_2d"][row, :, :2] - middle) * 256 / side + 128
        np.testing.assert_allclose(record.extras["keypoints_2d"][:25, :2], points, atol=1e-3)
        assert record.extras["keypoints_2d"][:, 2].tolist() == [1] * 25 + [0] * 19
        assert record.extras["image_size"].tolist() == list(SIZE)
        pixels = np.asarray(Image.open(io.BytesIO(record.images[0])), float)
        at = middle + (np.array([120, 140]) - 128) * side / 256
        np.testing.assert_allclose(pixels[140, 120, :2], [2 * at[0], 3 * at[1]], atol=6)
        assert to_bytes(from_bytes(to_bytes(record))) == to_bytes(record)


def test_upright_people_are_upright(tmp_path: Path) -> None:
    pose = np.zeros((12, 72))
    pose[:, :3] = (
        Rotation.from_rotvec([np.pi, 0, 0]) * Rotation.from_euler("y", np.linspace(-3, 3, 12)[:, None])
    ).as_rotvec()
    write_3dpw(tmp_path, body_pose=pose)
    for record in records(ThreeDPWTest(tmp_path)):
        np.testing.assert_allclose(record.poses.rotations[0, 0] @ [0, 1, 0], [0, -1, 0], atol=1e-6)


@pytest.mark.parametrize("images", ["h36m/images", "h36m", "elsewhere"])
def test_h36m_has_joints_and_no_rotations(tmp_path: Path, images: str) -> None:
    arrays = write_h36m(tmp_path, images)
    reader = H36MVal(tmp_path, images=str(tmp_path / images) if images == "elsewhere" else "")
    assert reader.parts("test") == ("S11_Walking", "S9_Directions_1")
    found = records(reader)
    for record, row in zip(found, (2, 0, 1)):
        assert record.key == f"{H36M_NAMES[row]}#0"
        assert not record.poses.measured.any() and "betas" not in record.extras and "gender" not in record.extras
        np.testing.assert_allclose(record.extras["keypoints_3d"][25:], arrays["extra_keypoints_3d"][row], rtol=1e-6)
        assert record.extras["box"][2] == pytest.approx(arrays["scale"][row].max())
        encoded = encode_example(tiny_processor(preset("tiny")), record.example(), max_length=2048)
        assert len(encoded["pose_positions"]) == 1 and not encoded["poses"].measured.any()


@pytest.mark.parametrize("kind", ["text", "bytes", "objects"])
def test_kinds_of_text_and_flags(tmp_path: Path, kind: str) -> None:
    arrays = write_3dpw(tmp_path)
    expected = [to_bytes(record) for record in records(ThreeDPWTest(tmp_path))]
    change = {
        "text": np.array,
        "bytes": lambda x: np.array([v.encode() for v in x]),
        "objects": lambda x: np.array(x, object),
    }
    texts = {name: change[kind](arrays[name].tolist()) for name in ("imgname", "gender")}  # type: ignore[operator]
    write_3dpw(tmp_path, **texts, has_body_pose=np.ones((12, 1), bool), scale=np.tile(arrays["scale"][:, None], 2))
    assert [to_bytes(record) for record in records(ThreeDPWTest(tmp_path))] == expected


def test_rows_without_a_pose_are_not_measured(tmp_path: Path) -> None:
    missing = np.full((12, 72), np.nan)
    missing[1::2] = 0.1
    write_3dpw(tmp_path, body_pose=missing, has_body_pose=np.arange(12) % 2, has_betas=np.arange(12) % 2)
    found = records(ThreeDPWTest(tmp_path))
    assert sorted(bool(record.poses.measured.any()) for record in found) == [False] * 6 + [True] * 6
    assert all(("betas" in record.extras) == bool(record.poses.measured.any()) for record in found)


def test_a_body_keypoint_in_3d_has_no_confidence(tmp_path: Path) -> None:
    write_3dpw(tmp_path, body_keypoints_3d=np.ones((12, 25, 4)))
    confidence = records(ThreeDPWTest(tmp_path))[0].extras["keypoints_3d"][:, 3]
    assert np.flatnonzero(confidence == 0).tolist() == list(range(1, 15))


def test_subsets_are_stable(tmp_path: Path) -> None:
    arrays = write_3dpw(tmp_path)
    keys = {n: {record.key for record in records(ThreeDPWTest(tmp_path, subset=n))} for n in (3, 7, 12, 99)}
    assert [len(found) for found in keys.values()] == [3, 7, 12, 12] and keys[3] < keys[7] < keys[12]
    assert keys[3] != {record.key for record in records(ThreeDPWTest(tmp_path, subset=3, seed=1))}
    order = np.r_[6:12, 0:6]  # the other sequence first: only the system's order of files decides it
    write_3dpw(tmp_path, **{name: array[order] for name, array in arrays.items()})
    before = {record.key: to_bytes(record) for record in records(ThreeDPWTest(tmp_path, subset=7))}
    assert set(before) == keys[7]
    again = pickle.loads(pickle.dumps(ThreeDPWTest(tmp_path, subset=7)))
    assert {record.key: to_bytes(record) for record in records(again)} == before


def test_options(tmp_path: Path) -> None:
    arrays = write_3dpw(tmp_path)
    reader = ThreeDPWTest(tmp_path, tall=True, size=64)
    for record in records(reader):
        assert record.extras["box"][2] == pytest.approx(arrays["scale"][row_of(record, arrays)] * 256 / 192)
        assert Image.open(io.BytesIO(record.images[0])).size == (64, 64)
    assert "_arrays" in vars(reader) and "_arrays" not in vars(pickle.loads(pickle.dumps(reader)))
    for options, match in (({"size": 3}, "size"), ({"subset": -1}, "subset")):
        with pytest.raises(UserError, match=match):
            ThreeDPWTest(tmp_path, **options)  # type: ignore[arg-type]


def test_missing_files(tmp_path: Path) -> None:
    for name, file in (("3dpw_test", "3dpw_test.npz"), ("h36m_val_p2", "h36m_val_p2.npz")):
        with pytest.raises(UserError, match=rf"{file} not found.*4D-Humans.*licence"):
            named.find("data", name, DATA_SETS)(tmp_path)
    write_3dpw(tmp_path)
    with pytest.raises(UserError, match=r"bus_01/image_00000\.jpg not found.*--set images=FOLDER"):
        ThreeDPWTest(tmp_path, images=str(tmp_path))


def test_damaged_rows_are_reported(tmp_path: Path) -> None:
    center = np.full((12, 2), 40.0)
    center[0, 0] = np.nan
    scale = np.full(12, 30.0)
    scale[1] = 0
    names = write_3dpw(tmp_path)["imgname"].copy()
    names[5] = "imageFiles/walk_00/../../../x.jpg"
    write_3dpw(tmp_path, center=center, scale=scale, imgname=names, gender=np.array(["m"] * 2 + ["?"] + ["f"] * 9))
    (tmp_path / "3DPW/imageFiles/bus_01/image_00001.jpg").write_bytes(b"no image")
    broken = [item for item in read(ThreeDPWTest(tmp_path)) if isinstance(item, Skipped)]
    assert all(item.broken for item in broken)
    details = {item.key: item.detail for item in broken}
    assert set(details) == {
        "imageFiles/walk_00/image_00000.jpg#0",
        "imageFiles/walk_00/image_00001.jpg#0",
        "imageFiles/walk_00/image_00002.jpg#0",
        "imageFiles/walk_00/../../../x.jpg#0",
        "imageFiles/bus_01/image_00001.jpg#0",
        "imageFiles/bus_01/image_00001.jpg#1",
    }
    for words in (
        "center must be finite",
        "at least one pixel",
        "expected a gender",
        "inside",
        "an earlier item says why",
    ):
        assert any(words in detail for detail in details.values()), words


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"imgname": None}, "with the names of images"),
        ({"body_pose": None}, "it has no body_pose"),
        ({"has_body_pose": None}, "it has no has_body_pose"),
        ({"extra_keypoints_3d": None}, "it has no extra_keypoints_3d"),
        ({"body_pose": np.zeros((12, 66))}, r"body_pose must have the shape \(12, 72\)"),
        ({"center": np.zeros((11, 2))}, "center must have the shape"),
        ({"betas": np.array([["x"] * 10] * 12)}, "betas must have the shape"),
        ({"imgname": np.array(["somewhere/x.jpg"] * 12)}, "expected names of images"),
    ],
)
def test_files_of_another_form_are_errors(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    write_3dpw(tmp_path)
    write_3dpw(tmp_path, **change) if "imgname" not in change else write_names(tmp_path, change["imgname"])
    with pytest.raises(UserError, match=rf"3dpw_test\.npz: .*{match}"):
        read(ThreeDPWTest(tmp_path))


def write_names(source: Path, names: Any) -> None:
    np.savez(
        source / "hmr2_evaluation_data" / "3dpw_test.npz",
        **({"center": np.zeros((12, 2))} if names is None else {"imgname": names}),
    )


def test_prepared_rows(tmp_path: Path) -> None:
    write_3dpw(tmp_path / "files")
    processor = tiny_processor(preset("tiny"))
    about = prepare("3dpw_test", tmp_path / "files", tmp_path / "out", processor=processor, options={"subset": 5})
    assert about["splits"]["test"]["records"] == 5 and list(about["splits"]) == ["test"]

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import Split
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.rpe import TYPES, Rpe, RpeRefined
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax.pose import check

from .rpe_files import WORDS, refined, truth, write_refined
from .threedpw_files import SIZE, jpeg


def line(number: int = 0, **changes: Any) -> dict[str, Any]:
    pose = np.random.default_rng(number).normal(0, 0.3, 72).tolist()
    return {
        "id": f"person-{number}",
        "type": TYPES[number % 5],
        "image": f"images/street_{number % 2}.jpg",
        "description": f"The woman\nwho waves {number}.",
        "box": [1, 2.5, 30, 50],
        "pose": pose,
        **changes,
    }


def write(source: Path, *lines: Any) -> Path:
    (source / "images").mkdir(parents=True, exist_ok=True)
    for number in range(2):
        (source / "images" / f"street_{number}.jpg").write_bytes(jpeg(number))
    text = [row if isinstance(row, str) else json.dumps(row) for row in lines]
    (source / "rpe.jsonl").write_text("\n".join([*text, ""]))
    return source


def read(reader: Any, split: Split = "test") -> list[Record | Skipped]:
    return [item for part in reader.parts(split) for item in reader.read(split, part)]


def test_the_refined_release(tmp_path: Path) -> None:
    entries = write_refined(tmp_path)
    reader = RpeRefined(tmp_path)
    assert reader.parts("train") == reader.parts("val") == ()
    found = read(reader)
    assert sorted(item.key for item in found) == sorted(f"{kind}/{n:06d}" for kind in WORDS for n in range(3))
    processor = tiny_processor(preset("tiny"))
    for record in found:
        assert isinstance(record, Record)
        kind, _, name = record.key.partition("/")
        entry = entries[kind][int(name)]
        expected = Rotation.from_rotvec(np.reshape(entry["ground_truth"]["smpl_param"]["pose"], (24, 3))).as_matrix()
        pose = check(record.poses)
        np.testing.assert_allclose(pose.rotations[0], expected, atol=1e-6)
        np.testing.assert_allclose(pose.rotations[0, 0] @ [0, 1, 0], [0, -1, 0], atol=1e-6)  # upright
        assert pose.frame == "camera" and pose.betas is None
        assert np.flatnonzero(~pose.measured[0]).tolist() == [10, 11, 22, 23]
        assert record.images == ((tmp_path / entry["real_image"]).read_bytes(),)
        assert record.group == entry["real_image"].split("/")[2]
        (talk,) = record.conversations
        assert talk[0]["content"][1]["text"] == entry["conversations"][0]["value"].removeprefix("<image>\n")
        assert talk[1]["content"] == "Sure, it is <POSE>."
        assert record.extras["description"] == f"The man with {kind} {int(name)}" and record.extras["type"] == kind
        for field in ("joint_cam", "fitted_joint_cam", "joint_img", "openpose_result", "bbox"):
            np.testing.assert_allclose(record.extras[field], entry["ground_truth"][field], rtol=1e-6)
        for field, of in (("betas", "shape"), ("trans_cam", "trans")):
            np.testing.assert_allclose(record.extras[field], entry["ground_truth"]["smpl_param"][of], rtol=1e-6)
        assert record.extras["gender"] == "male" and record.extras["image_size"].tolist() == list(SIZE)
        assert to_bytes(from_bytes(to_bytes(record))) == to_bytes(record)
        encoded = encode_example(processor, record.example(), max_length=2048)
        assert len(encoded["images"]) == 1 and encoded["poses"].measured.sum() == 20


def test_records_of_one_image_are_both_kept(tmp_path: Path) -> None:
    write_refined(tmp_path)
    found = {item.key: item for item in read(RpeRefined(tmp_path))}
    first, third = found["pose/000000"], found["pose/000002"]
    assert isinstance(first, Record) and isinstance(third, Record)
    assert first.images == third.images and first.extras["description"] != third.extras["description"]


def test_the_image_folder(tmp_path: Path) -> None:
    write_refined(tmp_path)
    (tmp_path / "3DPW").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"3DPW/imageFiles not found.*--set images=FOLDER.*RPE-Refined.*licence"):
        RpeRefined(tmp_path)
    for path in (tmp_path / "RPE-refined").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "RPE-refined").rmdir()
    assert len(read(RpeRefined(tmp_path, images=str(tmp_path / "elsewhere")))) == 12
    (tmp_path / "refine_vqa_shape_withGT.json").unlink()
    with pytest.raises(UserError, match=r"refine_vqa_shape_withGT\.json not found"):
        RpeRefined(tmp_path, images=str(tmp_path / "elsewhere"))


def test_damaged_records_are_reported(tmp_path: Path) -> None:
    changes: list[tuple[Any, str]] = [
        ({"ground_truth": None}, "ground_truth must be an object"),
        ({"ground_truth": {**truth(0), "joint_cam": [[1, 2, 3]]}}, r"joint_cam must be finite numbers of shape"),
        ({"ground_truth": {**truth(0), "smpl_param": {**truth(0)["smpl_param"], "gender": "x"}}}, "expected a gender"),
        ({"real_image": "3DPW/../../image.jpg"}, "inside"),
        ({"real_image": "3DPW/imageFiles/walk_00/image_09999.jpg"}, "cannot be read"),
        ({"conversations": [{"from": "human", "value": "<image>\nWhere?"}]}, "conversations must be"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "No."}]},
            "conversations must be",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "<POSE>"}]},
            "conversations must be",
        ),
        ({"id": 3}, "id must be text"),
        ({"id": "000000"}, "an earlier record has this id"),
    ]
    rows = [refined(0, "pose"), *(refined(n + 1, "pose", **change) for n, (change, _) in enumerate(changes)), "text"]
    write_refined(tmp_path, pose=rows)
    found = list(RpeRefined(tmp_path).read("test", "pose"))
    assert isinstance(found[0], Record)
    broken = found[1:]
    assert all(isinstance(item, Skipped) and item.broken for item in broken) and len(broken) == len(changes) + 1
    for item, words in zip(broken, [*(words for _, words in changes), "record must be an object"]):
        assert isinstance(item, Skipped) and words in item.detail and "refine_vqa_pose_withGT.json" in item.detail
    (tmp_path / "RPE-refined" / "refine_vqa_pose_withGT.json").write_text("{}")
    with pytest.raises(UserError, match="expected a list of records"):
        read(RpeRefined(tmp_path))


def test_the_format_of_this_package(tmp_path: Path) -> None:
    rows = [line(n) for n in range(5)]
    write(tmp_path, *rows, line(5, type="shape", split="train", group="walk_00", measured=[True] * 24))
    reader = Rpe(tmp_path, variants=3)
    found = {item.key: item for item in read(reader)}
    assert set(found) == {f"{TYPES[n]}/person-{n}" for n in range(5)} and read(reader, "val") == []
    for row in rows:
        record = found[f"{row['type']}/{row['id']}"]
        assert isinstance(record, Record) and len(record.conversations) == 1
        expected = Rotation.from_rotvec(np.reshape(row["pose"], (24, 3))).as_matrix()
        np.testing.assert_allclose(check(record.poses).rotations[0], expected, atol=1e-6)
        assert record.poses.frame == "camera" and np.flatnonzero(~record.poses.measured[0]).tolist() == [22, 23]
        assert record.images == ((tmp_path / row["image"]).read_bytes(),)
        description = row["description"].replace("\n", " ")
        assert description in record.conversations[0][0]["content"][1]["text"]
        assert record.extras["description"] == description and record.extras["bbox"].tolist() == row["box"]
        assert record.group == row["image"].removesuffix(".jpg") and record.extras["id"] == row["id"]
        encode_example(tiny_processor(preset("tiny")), record.example(), max_length=2048)
    (record,) = read(reader, "train")
    assert isinstance(record, Record) and record.key == "shape/person-5" and len(record.conversations) == 3
    assert record.group == "walk_00" and record.poses.measured.all()
    assert [to_bytes(item) for item in read(Rpe(tmp_path, variants=3), "train")] == [to_bytes(record)]  # type: ignore[arg-type]


def test_damaged_lines_are_reported_once(tmp_path: Path) -> None:
    changes: list[tuple[Any, str]] = [
        ("{", "expected JSON"),
        ("[1]", "must be an object"),
        ({"type": "hair"}, "type must be one of"),
        ({"split": "dev"}, "split must be one of"),
        ({"id": ""}, "id must be text"),
        ({"pose": [0] * 66}, "pose must be finite numbers"),
        ({"pose": [float("nan")] * 72}, "pose must be finite numbers"),
        ({"box": [1, 2]}, "box must be finite numbers"),
        ({"measured": [True] * 23}, "measured must be"),
        ({"measured": [1] * 24}, "measured must be"),
        ({"image": "../image.jpg"}, "inside"),
        ({"image": "images/none.jpg"}, "cannot be read"),
        ({"description": " "}, "description must be text"),
        ({"id": "person-0", "type": TYPES[0]}, "an earlier line has this id and type"),
    ]
    rows = [change if isinstance(change, str) else line(n + 1, **change) for n, (change, _) in enumerate(changes)]
    write(tmp_path, line(0), *rows)
    reader = Rpe(tmp_path)
    found = [item for split in ("train", "val", "test") for item in read(reader, split)]  # type: ignore[arg-type]
    broken = {item.detail.partition(":")[0]: item for item in found if isinstance(item, Skipped)}
    assert len(found) == len(changes) + 1 and all(item.broken for item in broken.values())
    for number, (_, words) in enumerate(changes):
        assert words in broken[f"rpe.jsonl, line {number + 2}"].detail


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rpe\.jsonl not found.*chatpose data build rpe"):
        Rpe(tmp_path)


def test_prepared_rows(tmp_path: Path) -> None:
    processor = tiny_processor(preset("tiny"))
    write_refined(tmp_path / "refined")
    about = prepare("rpe_refined", tmp_path / "refined", tmp_path / "out1", processor=processor)
    assert about["splits"]["test"]["rows"] == 12 and list(about["splits"]) == ["test"]
    write(tmp_path / "own", line(0), line(1, split="train"))
    about = prepare("rpe", tmp_path / "own", tmp_path / "out2", processor=processor)
    assert {split: some["rows"] for split, some in about["splits"].items()} == {"train": 1, "val": 0, "test": 1}
    assert Image.open(io.BytesIO(jpeg())).size == SIZE

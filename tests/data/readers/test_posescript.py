import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatpose_jax.data import questions
from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import DataConfig, SourceRow, Split
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers import posescript
from chatpose_jax.data.readers.posescript import PoseScript
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.data.sources import examples
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax.pose import check

from .amass_files import motion, upright, without_yaw, write_json, write_smplh, write_smplx, write_v1, write_v2

RUB, EYES = "BioMotionLab_NTroje/rub055/0027_jump_poses.npz", "Eyes_Japan_Dataset/aita/walk-01_poses.npz"
PLACES = {str(n): ["AMASS", RUB if n % 2 else EYES, n] for n in range(12)}
HUMAN = {"1": "A person\n  jumps ", "2": "He bows!", "11": "The man waves."}
SPLIT = {"train": list(range(8)), "val": [8], "test": [9, 10, 11]}


@pytest.fixture(params=["v1", "v2"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    human: dict[str, Any] = (
        HUMAN if request.param == "v1" else {key: [text, f"{text} 2"] for key, text in HUMAN.items()}
    )
    folder = tmp_path / "posescript_release" if request.param == "v1" else tmp_path
    (write_v1 if request.param == "v1" else write_v2)(folder, PLACES, human, SPLIT)
    write_smplh(tmp_path / "AMASS" / "BMLrub" / "rub055" / "0027_jump_poses.npz", motion(20), b"male")
    write_smplh(tmp_path / "AMASS" / "Eyes_Japan_Dataset" / "aita" / "walk-01_poses.npz", motion(20, 1), "female")
    return tmp_path


def read(reader: Any, split: Split = "train") -> list[Record | Skipped]:
    return [item for part in reader.parts(split) for item in reader.read(split, part)]


def records(reader: Any, split: Split = "train") -> list[Record]:
    return [item for item in read(reader, split) if isinstance(item, Record)]


def caption(record: Record, n: int = 0) -> str:
    """The question of a row without the words of its template."""
    question = record.conversations[n][0]["content"]
    assert isinstance(question, str)
    for template in sorted(questions.TEXT_TO_POSE, key=len, reverse=True):
        start, end = template.split("{caption}")
        if question.startswith(start) and question.endswith(end):
            return question.removeprefix(start).removesuffix(end)
    raise AssertionError(question)


def test_rows_ask_for_poses_in_the_camera_frame(source: Path) -> None:
    found = records(PoseScript(source))
    assert [record.key for record in found] == ["1", "3", "5", "7", "0", "2", "4", "6"]  # by file and frame
    assert {record.group for record in found} == {
        "BMLrub/rub055/0027_jump_poses.npz",
        "EyesJapanDataset/aita/walk-01_poses.npz",
    }
    processor = tiny_processor(preset("tiny"))
    for record in found:
        assert record.kind == "text" and (record.extras["pose_id"], record.extras["frame"]) == (int(record.key),) * 2
        assert record.extras["version"] == ("v1" if (source / "posescript_release").is_dir() else "v2")
        pose = check(record.poses)
        assert pose.frame == "camera" and pose.rotations.shape == (1, 52, 3, 3) and pose.betas is None
        root = motion(20, 0 if int(record.key) % 2 else 1)[int(record.key), :3]
        np.testing.assert_allclose(pose.rotations[0, 0], without_yaw(root), atol=1e-6)
        encoded = encode_example(processor, record.example(), 512)
        assert encoded["poses"].measured[0, 22:].tolist() == [False, False]  # SMPL's rigid hands
        assert encoded["poses"].measured[0, :22].sum() == 20  # and still feet
        assert not encoded["poses"].has_betas.any()
        assert to_bytes(from_bytes(to_bytes(record))) == to_bytes(record)


def test_captions_of_people_come_first(source: Path) -> None:
    rows = {record.key: caption(record) for record in records(PoseScript(source))}
    assert rows["1"] in ("A person jumps.", "A person jumps 2.") and rows["2"] in ("He bows!", "He bows! 2.")
    assert all(text.startswith("Automatic") for key, text in rows.items() if key not in HUMAN)


def test_the_coin_of_the_released_code(source: Path) -> None:
    record = records(PoseScript(source, captions="coin-flip", variants=400))[0]
    assert record.key == "1" and len(record.conversations) == 400
    drawn = Counter(caption(record, n).startswith("Automatic") for n in range(400))
    assert 160 < drawn[True] < 240  # four standard deviations of a fair coin
    automatic = {caption(record, n) for n in range(400)} - {"A person jumps.", "A person jumps 2."}
    assert len(automatic) == (6 if (source / "posescript_release").is_dir() else 3)


def test_one_kind_of_captions_leaves_out_poses_without(source: Path) -> None:
    found = read(PoseScript(source, captions="human"))
    assert [item.key for item in found if isinstance(item, Record)] == ["1", "2"]
    left_out = [item for item in found if isinstance(item, Skipped)]
    assert len(left_out) == 6 and {(item.reason, item.broken) for item in left_out} == {
        ("no caption of the chosen kind", False)
    }
    assert all(caption(record).startswith("Automatic") for record in records(PoseScript(source, captions="automatic")))


def test_evaluation_rows_carry_all_captions(source: Path) -> None:
    found = {record.key: record for record in records(PoseScript(source, variants=3), "test")}
    assert list(found) == ["9", "11", "10"] and all(len(record.conversations) == 1 for record in found.values())
    extras = from_bytes(to_bytes(found["11"])).extras
    assert extras["pose_id"] == 11 and extras["human"][0] == "The man waves." and len(extras["automatic"]) in (3, 6)
    assert found["9"].extras["human"] == ()
    assert [record.key for record in records(PoseScript(source), "val")] == ["8"]


def test_rows_depend_on_seed_and_id_alone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {record.key: to_bytes(record) for record in records(PoseScript(source, variants=4))}
    again = pickle.loads(pickle.dumps(PoseScript(source, variants=4)))
    assert {record.key: to_bytes(record) for record in records(again)} == first
    monkeypatch.setattr(posescript, "FILES_A_PART", 1)
    assert len(PoseScript(source).parts("train")) == 2
    assert {record.key: to_bytes(record) for record in records(PoseScript(source, variants=4))} == first
    other = records(PoseScript(source, variants=4, seed=1))
    assert any(to_bytes(record) != first[record.key] for record in other)


def test_faults_are_reported_with_their_ids(source: Path) -> None:
    release = source / "posescript_release" if (source / "posescript_release").is_dir() else source
    version = "v1" if release != source else "v2"
    places = PLACES | {
        "0": ["AMASS", "../../secret_poses.npz", 1],
        "1": ["AMASS", RUB, 20],
        "2": ["AMASS", "KIT/3/absent_poses.npz", 1],
        "3": ["HumanAct12", RUB, 1],
    }
    (write_v1 if version == "v1" else write_v2)(release, places, {"4": 17}, {"train": [0, 1, 2, 3, 4, 5, 99]})
    found = {item.key: item for item in read(PoseScript(source))}
    reasons = {key: (item.reason, item.broken) for key, item in found.items() if isinstance(item, Skipped)}
    assert reasons == {
        "0": ("the place of a pose is damaged", True),
        "1": ("a frame beyond the end of the AMASS file", True),
        "2": ("not in the AMASS folder", False),
        "3": ("the place of a pose is damaged", True),
        "4": ("a caption is not text", True),
        "99": ("no pose of this id", True),
    }
    assert isinstance(found["5"], Record)
    assert not read(PoseScript(source), "val")


def test_missing_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ids_2_dataset.*CC BY-NC-SA"):
        PoseScript(tmp_path)
    write_v2(tmp_path, PLACES, HUMAN, SPLIT)
    (tmp_path / "posescript_human_6293.json").unlink()
    with pytest.raises(UserError, match=r"posescript_human_6293\.json not found"):
        PoseScript(tmp_path)
    write_v2(tmp_path, PLACES, HUMAN, SPLIT)
    with pytest.raises(UserError, match="AMASS not found"):
        PoseScript(tmp_path)
    write_v1(tmp_path, PLACES, HUMAN, SPLIT)
    (tmp_path / "AMASS" / "CMU").mkdir(parents=True)
    with pytest.raises(UserError, match="both releases"):
        PoseScript(tmp_path)
    assert PoseScript(tmp_path, version="v2").release.version == "v2"


@pytest.mark.parametrize(
    "name, value", [("train_ids.json", {"a": 1}), ("train_ids.json", [1.5]), ("train_ids.json", ["x"])]
)
def test_lists_of_ids_must_be_that(tmp_path: Path, name: str, value: Any) -> None:
    write_v1(tmp_path, PLACES, HUMAN, SPLIT)
    write_json(tmp_path, {name: value})
    (tmp_path / "AMASS" / "CMU").mkdir(parents=True)
    with pytest.raises(UserError, match=r"train_ids\.json: expected"):
        PoseScript(tmp_path).parts("train")


def test_prepared_rows(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "prepared" / "posescript"
    processor = tiny_processor(preset("tiny"))
    about = prepare("posescript", source, out, processor=processor, options={"variants": 3})
    assert {split: (some["rows"], some["records"]) for split, some in about["splits"].items()} == {
        "train": (24, 8), "val": (1, 1), "test": (3, 3),
    }  # fmt: skip
    rows = examples(DataConfig(sources=(SourceRow("posescript"),), root=str(out.parent)), "test", 32)
    assert [row.id for row in rows] == ["9", "11", "10"]
    assert rows[1].extras["human"][0] == "The man waves." and rows[1].poses.measured.dtype == bool


def test_smplx_files(source: Path) -> None:
    (source / "AMASS" / "BMLrub" / "rub055" / "0027_jump_poses.npz").unlink()
    write_smplx(source / "AMASS" / "BMLrub" / "rub055" / "0027_jump_stageii.npz", motion(20))
    assert Counter(type(item) for item in read(PoseScript(source))) == {Skipped: 4, Record: 4}
    found = records(PoseScript(source, smplx=True))
    assert len(found) == 8
    np.testing.assert_allclose(found[0].poses.rotations[0, 0], without_yaw(motion(20)[1, :3]), atol=1e-6)


def test_upright_people_stay_upright(source: Path) -> None:
    roots = np.stack([upright(turn) for turn in np.linspace(-3, 3, 20)])
    write_smplh(source / "AMASS" / "BMLrub" / "rub055" / "0027_jump_poses.npz", motion(20, roots=roots))
    for record in records(PoseScript(source))[:4]:
        np.testing.assert_allclose(record.poses.rotations[0, 0], np.diag([1, -1, -1]), atol=1e-6)

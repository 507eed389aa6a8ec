import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.spg import Spg
from chatpose_jax.data.record import Record
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

from .amass_files import motion, without_yaw, write_smplh, write_v1

RUB = "BioMotionLab_NTroje/rub055/0027_jump_poses.npz"
PLACES = {str(n): ["AMASS", RUB, n] for n in range(12)}
ROW = {"pose_id": 3, "query": "Someone asks for a hand in marriage. Which pose is it?", "source": "posescript"}


def write(folder: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "spg.jsonl").write_text("\n".join([*lines, ""]))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_v1(tmp_path, PLACES, {}, {})
    write_smplh(tmp_path / "AMASS" / "BMLrub" / "rub055" / "0027_jump_poses.npz", motion(10))
    return tmp_path


def read(reader: Spg, split: Split = "test") -> list[Record | Skipped]:
    return [item for part in reader.parts(split) for item in reader.read(split, part)]


def test_a_row_asks_the_query_as_it_stands(source: Path) -> None:
    again = ROW | {"pose_id": "3", "query": "And again?", "version": "v1", "caption": "of no account"}
    found = read(Spg(write(source, ROW, again)))
    assert [item.key for item in found] == ["3#1", "3#2"]
    item = found[0]
    assert isinstance(item, Record)
    assert item.conversations[0][0] == {"role": "user", "content": ROW["query"]} and item.kind == "text"
    assert item.group == "BMLrub/rub055/0027_jump_poses.npz"
    assert item.extras == {"pose_id": 3, "version": "v1", "frame": 3, "query": ROW["query"]}
    np.testing.assert_allclose(item.poses.rotations[0, 0], without_yaw(motion(10)[3, :3]), atol=1e-6)
    assert len(encode_example(tiny_processor(preset("tiny")), item.example(), 512)["pose_positions"]) == 1


def test_splits(source: Path) -> None:
    reader = Spg(write(source, ROW, ROW | {"pose_id": 4, "split": "train"}))
    assert [item.key for item in read(reader)] == ["3#1"] and [item.key for item in read(reader, "train")] == ["4#2"]
    assert not read(reader, "val")


@pytest.mark.parametrize(
    "row, words",
    [
        ("{", "line 1"),
        ([1], "expected an object"),
        (ROW | {"source": "me"}, 'expected "source": "posescript"'),
        (ROW | {"version": "v2"}, "one of PoseScript 'v2', and v1 was read"),
        (ROW | {"query": "  "}, "expected a question"),
        (ROW | {"pose_id": 1.5}, "pose_id: expected an id"),
        (ROW | {"pose_id": 77}, "no pose 77"),
        (ROW | {"pose_id": 11}, "frame 11 was asked for"),
        (ROW | {"split": "all"}, "split must be"),
    ],
)
def test_faults_are_reported(source: Path, row: Any, words: str) -> None:
    reader = Spg(write(source, row, ROW))
    faults = [item for item in read(reader) if isinstance(item, Skipped)]
    assert len(read(reader)) == 2 and len(faults) == 1
    assert faults[0].broken and words in faults[0].detail
    assert not read(reader, "train")


def test_repeated_queries_are_faults(source: Path) -> None:
    found = read(Spg(write(source, ROW, ROW)))
    assert [isinstance(item, Skipped) for item in found] == [True, False]


def test_files_that_are_not_there(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"spg\.jsonl not found"):
        Spg(source)
    other = tmp_path / "mine"
    other.mkdir()
    write(other, ROW)
    with pytest.raises(UserError, match="ids_2_dataset"):
        Spg(other)
    reader = Spg(other, posescript=str(source), amass=str(source / "AMASS"))
    assert [item.key for item in read(reader)] == ["3#1"]

"""``chatpose data show``, and the files that ``chatpose data check`` leaves. What they find is tested in tests/data."""

import json

import numpy as np
import pytest
from PIL import Image

from chatpose_jax.cli.data_show import describe_pose
from chatpose_jax.cli.main import main
from chatpose_jax.data.record import Record
from chatpose_jax.data.synthetic.families import sample_poses
from smpl_jax.pose import SHAPE_SPACES, Pose
from tests.data.given_reader import write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    bodies = sample_poses(2, seed=1).rotations.astype(np.float32)
    poses = Pose(
        bodies,
        "model",
        betas=np.full((2, 10), 0.5, np.float32),
        has_betas=np.array([True, False]),
        measured=np.arange(24)[None].repeat(2, 0) != 10,
        shape_space=SHAPE_SPACES["smpl"],
    )
    talks = [
        [{"role": "user", "content": f"Two of them, {n}."}, {"role": "assistant", "content": "<POSE> and <POSE>."}]
        for n in range(2)
    ]
    record = Record(
        "the key", "text", tuple(talks), poses=poses, group="clip 7", extras={"frame": 3, "joints": np.ones((4, 3))}
    )
    return write(tmp_path_factory.mktemp("data") / "rows", train=[record], val=[record])


def test_show(folder, tmp_path, capsys):
    out = tmp_path / "new" / "row.png"
    assert main(["data", "show", str(folder), "--row", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{folder}, train, row 1 of 2: text"
    assert said[1] == "record 0 of 00000-of-00001.array_record, conversation 2 of 2"
    assert said[2:6] == ["key: the key", "group: clip 7", "user: Two of them, 1.", "assistant: <POSE> and <POSE>."]
    assert said[6].startswith("pose 1: frame model, smpl (24 joints); head above the pelvis, ")
    assert "measured 23, not left_foot; betas [0.5" in said[6] and said[6].endswith("of SMPL; no translation")
    assert "no betas" in said[7]
    assert said[8:] == ["extras frame: 3", "extras joints: float64 (4, 3), from 1 to 1", f"wrote {out}"]
    with Image.open(out) as image:
        assert image.width > 1500  # two poses from two sides, and the words


def test_show_a_source(capsys):
    words = ["data", "show", "--source", "synthetic", "--split", "val", "--row", "3", "--set", "kind=text"]
    assert main([*words, "--set", "val_size=5"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("synthetic, val, row 3 of 5: text\nid: ") and "user: " in said and "frame camera" in said


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "expected a FOLDER of a prepared data set, or --source NAME"),
        (["FOLDER", "--source", "synthetic"], "one of the two"),
        (["FOLDER", "--set", "a=1"], "--set gives options of a --source"),
        (["FOLDER", "--row", "2"], "has rows 0 to 1 in the split 'train'"),
        (["FOLDER", "--row", "-1"], "--row -1: "),
        (["FOLDER", "--split", "test"], "has no rows in the split 'test'; --split chooses another"),
        (["FOLDER", "--out", "x.jpg"], "expected a file that ends in .png"),
        (["nowhere"], "is no prepared data set"),
        (["--source", "sinthetic"], "did you mean synthetic"),
        (["--source", "synthetic", "--set", "train_size"], "expected OPTION=VALUE"),
    ],
)
def test_show_says_what_is_wrong(folder, tmp_path, monkeypatch, capsys, words, error):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "show", *(str(folder) if word == "FOLDER" else word for word in words)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and error in said.err and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())


def test_check_leaves_a_report_and_a_sheet(folder, capsys):
    assert main(["data", "check", str(folder), "--samples", "1", "--workers", "1"]) == 1  # both splits have the record
    said = capsys.readouterr().out
    assert "! leakage: " in said and "! duplicates: " in said
    report = json.loads((folder / "check.json").read_text())
    assert [finding["kind"] for finding in report["findings"]] == ["duplicates", "leakage"]
    with Image.open(folder / "sheet.png") as image:
        assert image.height > 400
    assert (
        main(
            [
                "data",
                "check",
                str(folder),
                "--samples",
                "0",
                "--workers",
                "1",
                "--allow",
                "leakage",
                "--allow",
                "duplicates",
            ]
        )
        == 0
    )
    assert "allowed leakage: " in capsys.readouterr().out


def test_check_needs_a_folder_that_it_can_write(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["data", "check", str(folder), "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert "cannot be written" in said and "--out chooses another folder" in said and said.count("\n") == 1
    assert main(["data", "check", str(folder), "--samples", "21"]) == 2
    assert "--samples must be a whole number in [0, 20], found 21" in capsys.readouterr().err


def test_all_fingers_are_one_word():
    measured = np.arange(52) < 22
    pose = Pose(np.tile(np.eye(3, dtype=np.float32), (52, 1, 1)), "model", measured=measured)
    assert "measured 22, not all fingers;" in describe_pose(pose)
    measured[30] = True
    assert "measured 23, not left_index1, " in describe_pose(pose)

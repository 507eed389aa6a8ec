"""``chatpose fit``: points of the three kinds go in, poses come out; one clear line for others."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from chatpose_jax.cli.fit import LISTED, read_points, report, save_drawing
from chatpose_jax.cli.main import main
from chatpose_jax.errors import UserError
from smpl_jax import Pose, load_body, read_poses
from smpl_jax.keypoints import locate


def test_openpose_json_to_poses(tmp_path, capsys) -> None:
    """Eight people, as in tests/smpl/test_fit.py, so that the program is compiled once."""
    rng = np.random.default_rng(0)
    rest = np.asarray(locate(load_body(), "openpose25")(np.tile(np.eye(3), (24, 1, 1))))
    camera = rest * [1, -1, -1] + [0, 0, 4]
    pixels = camera[:, :2] / camera[:, 2:] * 1000 + 500
    person = np.concatenate([pixels, np.ones((25, 1))], 1).ravel().tolist()
    file = tmp_path / "people.json"
    people = [{"person_id": [-1], "pose_keypoints_2d": person}] * 8
    people[3] = {"pose_keypoints_2d": [0.0] * 75}
    people[5] = {"pose_keypoints_2d": np.append(rng.uniform(0, 1000, (25, 2)), np.ones((25, 1)), 1).ravel().tolist()}
    file.write_text(json.dumps({"version": 1.3, "people": people}))
    arguments = [
        "fit",
        str(file),
        "--image-size",
        "1000",
        "1000",
        "--focal",
        "1000",
        "--out",
        str(tmp_path / "out.npz"),
    ]
    assert main([*arguments, "--drawing", str(tmp_path / "out.png")]) == 0
    out, said = capsys.readouterr()
    lines = said.splitlines()
    assert out.strip() == str(tmp_path / "out.npz") and (tmp_path / "out.png").exists()
    assert lines[0].startswith("fitting 8 people") and lines[1].startswith("6 of 8 fits converged")
    assert lines[2].startswith("person 3 did not") and "fewer than 6 points were seen; 0 of 25" in lines[2]
    assert lines[3].startswith("person 5 did not") and "px at most" in lines[3]
    assert lines[4:] == [f"drawing: {tmp_path / 'out.png'}"]
    written = np.load(tmp_path / "out.npz")
    assert (np.flatnonzero(~written["converged"]) == [3, 5]).all() and (written["reasons"] != "").sum() == 2
    assert written["errors"].shape == written["seen"].shape == (8, 25) and written["names"][0] == "nose"
    assert not written["seen"][3].any() and written["errors"][0].max() < 5 < written["errors"][5].max()
    read = read_poses(tmp_path / "out.npz")
    assert set(read.unused) >= {"converged", "errors", "seen", "names", "reasons"}
    assert len(read) == 8 and read.frame == "camera" and abs(read[0].translation[2] - 4) < 1


def test_files_say_what_their_points_are(tmp_path) -> None:
    file = tmp_path / "points.npz"
    np.savez(file, keypoints_2d=np.zeros((3, 17, 3)), points=np.array("coco17"), image_size=np.array([640, 480]))
    assert read_points(file, None).set_name == "coco17"
    np.savez(file, joints=np.zeros((2, 24, 3)))
    assert read_points(file, None).kind == "joints"
    np.savez(file, markers=np.zeros((2, 2, 3)), vertices=np.array(["nose", "left_heel"]))
    assert read_points(file, None).kind == "markers"


@pytest.mark.parametrize(
    ("arrays", "name", "message"),
    [
        ({"poses": np.zeros((2, 3))}, None, "expected one of the arrays keypoints_2d"),
        ({"joints": np.zeros((2, 24, 3)), "markers": np.zeros((2, 24, 3))}, None, "expected one of the arrays"),
        ({"keypoints_2d": np.zeros((2, 17, 3))}, None, "--points"),
        ({"keypoints_2d": np.zeros((2, 17, 3))}, "coco18", "coco18 has 18 points; the file has 17"),
        ({"keypoints_2d": np.zeros((2, 17, 3)), "points": np.array("coco17")}, "coco18", "--points says coco18"),
        ({"keypoints_2d": np.zeros((2, 17, 4))}, "coco17", "2 or 3"),
        ({"markers": np.zeros((2, 5, 3))}, None, "vertices"),
    ],
)
def test_other_files_are_refused(arrays, name, message, tmp_path) -> None:
    np.savez(tmp_path / "points.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_points(tmp_path / "points.npz", name)


def test_bad_input_is_one_line(tmp_path, capsys) -> None:
    file = tmp_path / "p.json"
    for content, more, message in [
        ({"people": []}, [], "people is empty"),
        ({"persons": []}, [], "a list people; found none"),
        ({"people": [{"pose_keypoints_2d": [1.0, 2.0]}]}, [], "x, y and confidence"),
        ({"people": [{"pose_keypoints_2d": ["a"]}]}, [], "person 0 has no list of numbers"),
        ({"people": [{}]}, [], "person 0 has no list of numbers"),
        (
            {"people": [{"pose_keypoints_2d": [0.0] * 75}, {"pose_keypoints_2d": [0.0] * 72}]},
            [],
            "person 1: expected 25 × 3 numbers, x, y and confidence in turn; found 72",
        ),
        ({"people": [{"pose_keypoints_2d": [0.0] * 75}]}, ["--points", "coco17"], "expected 17 × 3 numbers"),
        ({"people": [{"pose_keypoints_2d": [0.0] * 75}]}, [], "--image-size"),
        ({"people": [{"pose_keypoints_2d": [0.0] * 75}]}, ["--image-size", "0", "5"], "image_size must be"),
    ]:
        file.write_text(json.dumps(content))
        assert main(["fit", str(file), "--out", str(tmp_path / "o.npz"), *more]) == 2
        said = capsys.readouterr().err
        said = said.removeprefix("fitting 1 person; the first time takes a minute to compile\n")
        assert message in said and said.count("\n") == 1 and said.count(str(file)) == 1
    assert main(["fit", str(file), "--out", str(tmp_path / "o.txt")]) == 2
    assert not list(tmp_path.glob("o.*"))


def test_what_a_file_says_beside_its_points_is_followed(tmp_path, monkeypatch, capsys) -> None:
    file, given = tmp_path / "points.npz", {}

    def fit_joints(*points, **options):
        given.update(options)
        raise ValueError("seen")

    monkeypatch.setattr("smpl_jax.fit.fit_joints", fit_joints)
    arrays = {"joints": np.zeros((2, 24, 3)), "frame": np.array("z-up"), "confidence": np.ones((2, 24))}
    np.savez(file, **arrays, betas=np.arange(10.0))
    command = ["fit", str(file), "--out", str(tmp_path / "o.npz")]
    assert main(command) == 2
    assert given["frame"] == "z-up" and given["confidence"].shape == (2, 24) and given["betas"][3] == 3
    assert main([*command, "--frame", "camera"]) == 2
    assert "the file says that its points are in the frame z-up, --frame says camera" in capsys.readouterr().err
    np.savez(file, joints=arrays["joints"])
    assert main([*command, "--frame", "model"]) == 2 and given["frame"] == "model"
    np.savez(file, joints=arrays["joints"], frame=np.array("world"))
    assert (
        main(command) == 2
        and "joints are in the frame model or camera or z-up; found 'world'" in capsys.readouterr().err
    )
    np.savez(file, keypoints_2d=np.zeros((2, 17, 3)), points="coco17", image_size=[9, 9], frame=np.array("z-up"))
    assert main(command) == 2 and "keypoints_2d are in the frame camera; found 'z-up'" in capsys.readouterr().err


def test_the_drawing_says_which_bodies_are_guesses(tmp_path, monkeypatch) -> None:
    given = {}
    monkeypatch.setattr("smpl_jax.render.contact_sheet", lambda views, **more: given.update(more) or views[0])
    pose = Pose(np.tile(np.eye(3), (2, 24, 1, 1)), "camera", betas=np.zeros((2, 10)))
    save_drawing(tmp_path / "d.png", load_body(), SimpleNamespace(pose=pose, converged=np.array([True, False])))
    assert given["labels"] == ["0", "1: not converged"]


def test_a_long_report_is_cut() -> None:
    fitted = SimpleNamespace(
        converged=np.zeros((3, 9), bool),
        errors=np.ones((3, 9, 4)),
        seen=np.ones((3, 9, 4), bool),
        reasons=np.full((3, 9), "far"),
        names=tuple("abcd"),
    )
    lines = list(report(fitted, "px"))
    assert len(lines) == LISTED + 2 and lines[-1].startswith(f"and {27 - LISTED} more")
    assert lines[10].startswith("person 1, 0 did not converge, its pose is a guess: far; 4 of 4 points were seen")

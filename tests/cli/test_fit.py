"""``chatpose fit``: points of the three kinds go in, poses come out; one clear line for others."""

import json

import numpy as np
import pytest

from chatpose_jax.cli.fit import read_points
from chatpose_jax.cli.main import main
from chatpose_jax.errors import UserError
from smpl_jax import load_body, read_poses
from smpl_jax.keypoints import locate


def test_openpose_json_to_poses(tmp_path, capsys) -> None:
    """Eight people, as in tests/smpl/test_fit.py, so that the program is compiled once."""
    rest = np.asarray(locate(load_body(), "openpose25")(np.tile(np.eye(3), (24, 1, 1))))
    camera = rest * [1, -1, -1] + [0, 0, 4]
    pixels = camera[:, :2] / camera[:, 2:] * 1000 + 500
    person = np.concatenate([pixels, np.ones((25, 1))], 1).ravel().tolist()
    file = tmp_path / "people.json"
    file.write_text(json.dumps({"version": 1.3, "people": [{"person_id": [-1], "pose_keypoints_2d": person}] * 8}))
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
    assert (
        out.strip() == str(tmp_path / "out.npz") and "8 of 8 fits converged" in said and (tmp_path / "out.png").exists()
    )
    read = read_poses(tmp_path / "out.npz")
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
        ({"people": []}, [], "at least one of people"),
        ({"people": [{"pose_keypoints_2d": [1.0, 2.0]}]}, [], "x, y and confidence"),
        ({"people": [{"pose_keypoints_2d": [0.0] * 75}]}, [], "--image-size"),
        ({"people": [{"pose_keypoints_2d": [0.0] * 75}]}, ["--image-size", "0", "5"], "image_size must be"),
    ]:
        file.write_text(json.dumps(content))
        assert main(["fit", str(file), "--out", str(tmp_path / "o.npz"), *more]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
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

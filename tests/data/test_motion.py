"""Rows of motion capture: clips split whole, poses in the camera frame, captions that fit."""

import pytest

from chatpose_jax.data.config import DataConfig
from chatpose_jax.data.motion import MotionDataset, motion, motion_files
from chatpose_jax.data.sources import check_sources, examples
from chatpose_jax.errors import UserError


def test_rows_of_real_clips(shared_data):
    splits = {name: motion(name, seed=0, folder=str(shared_data)) for name in ("train", "val", "test")}
    clips = {name: {path.name for path, _ in rows.clips} for name, rows in splits.items()}
    assert sum(map(len, clips.values())) == len(motion_files(shared_data)) == len(set.union(*clips.values())) == 15
    assert [len(clips[name]) for name in ("train", "val", "test")] == [9, 3, 3]
    rows = splits["test"]
    again = motion("test", seed=0, folder=str(shared_data))
    for index in (0, len(rows) // 2, -1):
        row = rows[index]
        assert row.messages == again[index].messages and row.kind == "text"
        assert row.poses.shape == (1,) and row.poses.frame == "camera" and row.poses.measured[0, :22].all()
        root = row.poses.rotations[0, 0]
        assert root[1, 1] < -0.5 and root[2, 2] < -0.3  # upright in a frame whose y points down, facing the camera
    with pytest.raises(IndexError):
        rows[len(rows)]
    tested = [motion("test", seed=0, folder=str(shared_data), fold=fold).clips for fold in range(5)]
    assert len({path for part in tested for path, _ in part}) == 15


def test_captions_say_what_the_clip_does(shared_data):
    walk = MotionDataset([shared_data / "cmu" / "02_01.amc"])
    words = " ".join(walk[i].messages[0]["content"] for i in range(len(walk)))
    assert words.count("walk") + words.count("step") > len(walk) / 2
    wave = MotionDataset([shared_data / "bvh" / "wave_hello.bvh"])
    middle = wave[len(wave) // 2].messages[0]["content"]
    assert "right elbow is half bent, the hand at shoulder height" in middle
    assert len(MotionDataset([shared_data / "cmu" / "02_01.amc"], rate=30)) == pytest.approx(3 * len(walk), abs=3)


def test_a_folder_that_does_not_do(tmp_path):
    with pytest.raises(UserError, match=r"holds 0 files of \.bvh or \.amc; 5 folds need at least as many"):
        motion("train", seed=0, folder=str(tmp_path))
    (tmp_path / "a.bvh").write_text("HIERARCHY")
    with pytest.raises(UserError, match=r"a\.bvh: expected BVH"):
        MotionDataset([tmp_path / "a.bvh"])
    for options in ({"fold": 5}, {"folds": 2}, {"rate": 0.0}):
        with pytest.raises(UserError):
            motion("train", seed=0, folder=str(tmp_path), **options)


def test_it_is_a_source_by_name(shared_data):
    row = ("motion", 1.0, {"folder": str(shared_data), "fold": 2, "detail": "short"})
    rows = examples(DataConfig(sources=(row,)), "test", 64)
    assert len(rows) == len(motion("test", seed=0, folder=str(shared_data), fold=2))
    for options, words in (({}, "needs the option 'folder'"), ({"folder": "x", "detail": "long"}, "detail")):
        with pytest.raises(UserError, match=words):
            check_sources(DataConfig(sources=(("motion", 1.0, options),)))

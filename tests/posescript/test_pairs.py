"""Rows -> poses and captions, as PoseScript's networks take them."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from chatpose_jax.data.example import Example
from chatpose_jax.data.readers.amass import to_view, yaw_of
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.posescript.pairs import PoseInput, axis_angles, captions_of, pairs
from smpl_jax.pose import Pose, stack


def amass(count: int, seed: int = 0) -> tuple[np.ndarray, Pose]:
    """Axis-angles (N, 52, 3) as AMASS's files hold them, and the poses."""
    vectors = np.random.default_rng(seed).normal(0, 0.5, (count, 52, 3))
    matrices = Rotation.from_rotvec(vectors.reshape(-1, 3)).as_matrix().reshape(count, 52, 3, 3)
    return vectors, Pose(matrices.astype(np.float32), "z-up")


def row(name: str, poses: Pose, group: str = "", **extras: object) -> Example:
    return Example(name, "text", [], poses, extras, group=group)


def test_axis_angles_are_those_of_amass_without_the_yaw_of_the_root() -> None:
    vectors, poses = amass(6)
    found, measured = axis_angles(poses)
    assert found.shape == (6, 52, 3) and found.dtype == np.float32 and measured.all()
    np.testing.assert_allclose(found[:, 1:], vectors[:, 1:], atol=2e-5)
    yaw, pitch, roll = Rotation.from_rotvec(vectors[:, 0]).as_euler("ZYX").T
    expected = Rotation.from_euler("ZYX", np.stack([0 * yaw, pitch, roll], 1)).as_rotvec()
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    rows = stack([to_view(pose, yaw_of(pose)) for pose in poses])  # as the readers of PoseScript give them
    np.testing.assert_allclose(axis_angles(rows)[0], found, atol=1e-5)
    np.testing.assert_array_equal(axis_angles(rows, 22)[0], axis_angles(rows)[0][:, :22])


def test_joints_that_a_body_does_not_have_are_not_measured() -> None:
    _, poses = amass(2)
    smpl = Pose(poses.rotations[:, :24], "z-up", measured=np.arange(24)[None].repeat(2, 0) != 5)
    found, measured = axis_angles(smpl)
    assert measured.sum(1).tolist() == [21, 21] and not measured[:, 5].any()
    np.testing.assert_array_equal(found[:, 22:], 0)


def test_what_says_nothing_has_the_mean_of_the_training_data() -> None:
    _, poses = amass(8)
    measured = np.ones((8, 52), bool)
    measured[:, 40] = False  # no training pose has it
    measured[3:, 30] = False
    found = pairs([row(str(i), stack([p]), caption="a") for i, p in enumerate(poses.replace(measured=measured))])
    given = PoseInput.of(found)
    assert given.joints == 52 and np.flatnonzero(~given.seen).tolist() == [40]
    np.testing.assert_array_equal(given.fill[40], 0)
    np.testing.assert_allclose(given.fill[30], found.poses[:3, 30].mean(0), atol=1e-6)
    full, everything = axis_angles(poses)
    seen = given(full, everything)
    np.testing.assert_array_equal(seen[:, 40], 0)  # a value that it never saw would mislead it
    np.testing.assert_array_equal(np.delete(seen, 40, 1), np.delete(full, 40, 1))
    np.testing.assert_allclose(given(full, measured)[5, 30], given.fill[30])


def test_captions_come_from_extras_and_rows_of_one_pose_are_one_pair() -> None:
    _, poses = amass(3)
    a, b, c = (stack([pose]) for pose in poses)
    rows = [
        row("1", a, "f", human=("He waves.",), automatic=("Arm up.", "An arm is up.")),
        row("1:1", a, "f", human=("He waves.",), automatic=("Arm up.", "An arm is up.")),
        row("2", b.replace(frame="camera"), caption="Sits."),
        row("3", c, query="What does one do in bed?"),
        row("4", c, human=("Move the arm.",), pair_id=3),  # PoseFix
        row("5", poses[:0], caption="Nobody."),
        row("6", c),
    ]
    found = pairs(rows)
    assert found.captions == [("He waves.", "Arm up.", "An arm is up."), ("Sits.",), ("What does one do in bed?",)]
    assert (found.keys, found.groups, found.skipped) == (["1", "2", "3"], ["f", "", ""], 3)
    np.testing.assert_array_equal(
        found.poses[0], axis_angles(a)[0][0]
    )  # in the order of the rows, whatever their frames are
    np.testing.assert_array_equal(found.poses[1], axis_angles(rows[2].poses)[0][0])
    assert pairs(rows, captions="human").captions == [("He waves.",)]
    with pytest.raises(UserError, match="none of 1 rows has a pose and a caption"):
        pairs(rows[-1:])


def test_rows_of_the_generated_set_have_the_caption_of_their_question() -> None:
    tasks = {"text": 1, "text_short": 1, "text_turns": 1, "situation": 1, "image": 1}
    with_caption = collections.Counter[str]()
    for example in SyntheticDataset("val", size=40, tasks=tasks)[:40]:
        task = example.id.rpartition("-")[2]
        assert bool(captions_of(example)) == bool(len(example.poses))
        assert bool(captions_of(example, "query")) == (task == "situation")
        for caption in captions_of(example):
            assert example.kind == "image" or caption in example.messages[0]["content"]
            with_caption[example.kind] += 1
    assert with_caption["text"] > 10 and with_caption["image"] > 10

"""The task ``poses`` on answers with known errors, and what it leaves out."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.poses import mean_pose, pose_errors, true_poses
from chatpose_jax.evaluation.system import Answer
from chatpose_jax.evaluation.tasks.poses import Poses
from smpl_jax import load_body, stack, to_frame
from smpl_jax.pose import unmeasured


def mixed():
    rows = SyntheticDataset("test", 60, tasks={"text": 1, "image": 1, "words": 1})[:]
    return [dataclasses.replace(row, group=f"clip {i // 4}") for i, row in enumerate(rows)]


def test_true_answers_have_no_error_in_any_frame():
    task = Poses(mixed(), "mine")
    assert 20 < len(task.rows) < 60, "rows without a pose are left out"
    answers = [Answer(pose=to_frame(row.poses[0], "model")) for row in task.rows]
    tables = {scores.table: scores for scores in task.score(answers)}
    assert set(tables) == {"poses/mine/text", "poses/mine/image"}
    for scores in tables.values():
        assert scores.values["MPJPE"].value < 0.01 and scores.values["MPJRE"].value < 0.01
        assert scores.values["angle"].value < 0.2
        assert scores.facts["interval"].endswith("groups") and not scores.counts
    kinds = np.array([row.kind for row in task.rows])
    counted = np.isfinite(tables["poses/mine/image"].samples["MPJPE"])
    np.testing.assert_array_equal(counted, kinds == "image")


def test_means_are_those_of_pose_errors():
    rows = [row for row in mixed() if row.kind == "text" and len(row.poses)]
    task, truth = Poses(rows, "mine"), true_poses(rows)
    turned = Rotation.from_rotvec(np.random.default_rng(0).normal(0, 0.4, (24 * len(rows), 3))).as_matrix()
    poses = truth.replace(rotations=(turned.reshape(-1, 24, 3, 3) @ truth.rotations).astype(np.float32))
    [scores] = task.score([Answer(pose=poses[i]) for i in range(len(rows))])
    expected = pose_errors(poses, truth, load_body())
    for name, column in (
        ("mpjpe", "MPJPE"),
        ("pa_mpjpe", "PA-MPJPE"),
        ("mpjre", "MPJRE"),
        ("geodesic_degrees", "angle"),
    ):
        value = scores.values[column]
        np.testing.assert_allclose(value.value, expected[name], rtol=1e-5)
        assert value.low < value.value < value.high


def test_what_is_left_out_is_counted():
    rows = [row for row in mixed() if row.kind == "text" and len(row.poses)][:10]
    rows[4] = dataclasses.replace(rows[4], poses=unmeasured((1,)))
    constant = mean_pose(true_poses(rows))
    answers = [
        Answer("Sorry.", notes={"not parsed": i == 1}) if i in (1, 7) else Answer(pose=constant) for i in range(10)
    ]
    [scores] = Poses(rows, "mine").score(answers)
    assert scores.counts == {
        "rows without ground truth": 1,
        "no pose and no positions in the answer": 1,
        "not parsed": 1,
    }, "each answer counts once, under the reason that its notes give"
    assert scores.facts["samples"] == "7 of 10"
    assert np.isnan(scores.samples["MPJPE"][[1, 4, 7]]).all() and np.isfinite(scores.samples["MPJPE"]).sum() == 7
    kept = [i for i in range(10) if i not in (1, 4, 7)]
    expected = pose_errors(stack([constant] * 7), true_poses([rows[i] for i in kept]), load_body())
    np.testing.assert_allclose(scores.values["MPJPE"].value, expected["mpjpe"], rtol=1e-5)


def test_nothing_to_compare_is_an_error():
    rows = [row for row in mixed() if row.kind == "text" and len(row.poses)][:3]
    with pytest.raises(UserError, match="none of the 0 rows of mine has a pose"):
        Poses([], "mine")
    blind = [dataclasses.replace(row, poses=unmeasured((1,))) for row in rows]
    with pytest.raises(UserError, match="none of the 3 text rows of mine has a measured joint"):
        Poses(blind, "mine").score([Answer(pose=row.poses[0]) for row in rows])


def test_a_question_wants_a_pose_and_holds_none():
    row = next(row for row in mixed() if len(row.poses))
    question = Poses([row], "mine").question(row)
    assert question.wants == "pose" and [message["role"] for message in question.messages] == ["user"]

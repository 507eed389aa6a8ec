"""Answers as lines of JSON, read one by one and many together."""

import json

import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.system import Answer
from smpl_jax import Pose

from ..smpl.models import random_rotations


@pytest.fixture(scope="module")
def answers():
    rng = np.random.default_rng(0)
    measured = np.ones(24, bool)
    measured[[3, 22]] = False
    people = np.array([[0, 0, 10, 20], [5.25, 3, 10, 20]], np.float32)
    return [
        Answer("words", Pose(random_rotations(rng, 24), "camera")),
        Answer(
            "",
            Pose(random_rotations(rng, 22), "model", betas=rng.normal(size=10).astype(np.float32), shape_space="SMPL"),
        ),
        Answer(
            "",
            Pose(random_rotations(rng, 24), "camera", measured=measured),
            {"smpl24": np.ones((24, 3))},
            {"parsed": True},
        ),
        Answer("no pose"),
        Answer("", Pose(random_rotations(rng, 2, 24), "camera", betas=np.ones((2, 10), np.float32)), {}, {}, people),
    ]


def test_they_come_back(answers):
    lines = [json.dumps(answer.to_json()) for answer in answers]
    together = Answer.from_jsons([json.loads(line) for line in lines])
    alone = [Answer.from_json(json.loads(line)) for line in lines]
    for first, second, answer in zip(together, alone, answers):
        assert json.dumps(first.to_json()) == json.dumps(second.to_json())
        assert (first.text, first.notes) == (answer.text, answer.notes)
        if answer.pose is None:
            assert first.pose is None
            continue
        np.testing.assert_array_equal(first.pose.rotations, second.pose.rotations)
        np.testing.assert_allclose(first.pose.rotations, answer.pose.rotations, atol=2e-6)
        assert (first.pose.frame, first.pose.shape_space) == (answer.pose.frame, answer.pose.shape_space)
    np.testing.assert_array_equal(together[2].pose.measured, answers[2].pose.measured)
    np.testing.assert_allclose(together[1].pose.betas, answers[1].pose.betas, atol=1e-6)
    np.testing.assert_array_equal(together[4].boxes, answers[4].boxes)
    assert together[4].pose.shape == (2,)
    assert Answer.from_jsons([]) == []


def test_damaged_ones_are_refused(answers):
    found = answers[0].to_json()
    for broken in (
        {**found, "pose": {"frame": "camera"}},
        {**found, "pose": {**found["pose"], "axis_angle": [[1, 2]]}},
        {},
    ):
        with pytest.raises((KeyError, ValueError)):
            Answer.from_json(broken)
    for said, wrong in (
        ("text must be a str", Answer(3)),  # type: ignore[arg-type]
        ("expected a number of joints", Answer(pose=Pose(random_rotations(np.random.default_rng(0), 23), "camera"))),
        ("frame must be one of", Answer(pose=Pose(random_rotations(np.random.default_rng(0), 24), "world"))),  # type: ignore[arg-type]
        ("joint 0 is none", Answer(pose=Pose(np.zeros((24, 3, 3), np.float32), "camera"))),
        (r"batch shape \(\), found \(2,\)", Answer(pose=answers[4].pose)),
        (r"batch shape \(2,\), found \(\)", Answer(pose=answers[0].pose, boxes=answers[4].boxes)),
    ):
        with pytest.raises(ValueError, match=said):
            wrong.check()
    for answer in answers:
        answer.check()
    rounded = answers[0].pose.replace(rotations=np.round(answers[0].pose.rotations * 200) / np.float32(200))
    Answer(pose=rounded).check()  # as far off as a network in bfloat16
    with pytest.raises(UserError, match="degrees"):
        Answer.from_json({**found, "pose": {**found["pose"], "axis_angle": [[180.0, 0, 0]] * 24}})

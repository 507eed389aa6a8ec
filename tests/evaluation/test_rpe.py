"""RPE by attribute: keyed by record id, the person found by box, and RPE-Refined's own measure."""

import itertools

import numpy as np
import pytest

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.boxes import best_overlap
from chatpose_jax.evaluation.system import Answer
from chatpose_jax.evaluation.tasks.estimation import Estimation
from chatpose_jax.evaluation.tasks.rpe import ReasonedEstimation
from smpl_jax import Pose, io, joints

from ..smpl.models import random_rotations

KINDS = {"behaviour": 6, "shape": 4, "outfit": 4, "pose": 2}
BOX = np.array([100.0, 50, 80, 200])
ELSEWHERE = np.array([300.0, 50, 80, 200])


@pytest.fixture(scope="module")
def body():
    return io.load_body()


@pytest.fixture(scope="module")
def data(body):
    rng, rows = np.random.default_rng(0), []
    for kind, count in KINDS.items():
        for i in range(count):
            pose = Pose(random_rotations(rng, 1, 24), "camera")
            fitted = np.asarray(joints(body, pose.rotations[0], np.linspace(-1, 1, 10)))
            extras = {"type": kind, "id": f"{i:06d}", "bbox": BOX, "fitted_joint_cam": fitted + np.float32([0, 0, 3])}
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<POSE>"}]
            rows.append(Example(f"{kind}/{i:06d}", "image", messages, pose, extras, group=f"sequence{i}"))
    return rows


@pytest.fixture(scope="module")
def answers(data):
    rng = np.random.default_rng(1)
    return [Answer("", Pose(random_rotations(rng, 24), "camera")) for _ in data]


def test_tables_by_attribute(data, answers):
    mean, *tables = ReasonedEstimation(data, "rpe_refined").score(answers)
    assert [found.table for found in (mean, *tables)] == [f"rpe/rpe_refined/{kind}" for kind in ("mean", *KINDS)]
    assert [found.facts["samples"] for found in (mean, *tables)] == ["16", "6", "4", "4", "2"]
    assert mean.facts["attributes"] == "behaviour 6, shape 4, outfit 4, pose 2"
    (whole,) = Estimation(data, "rows").score(answers)
    for name in ("MPJPE", "PA-MPJPE", "MPJRE", "MPJRE-21", "angle", "root angle"):
        np.testing.assert_allclose(mean.samples[name], whole.samples[name], atol=1e-9)
        ends = np.cumsum([0, *KINDS.values()])
        each = [np.mean(whole.samples[name][a:b]) for a, b in itertools.pairwise(ends)]
        assert [found.values[name].value for found in tables] == pytest.approx(each)
        assert mean.values[name].value == pytest.approx(np.mean(each)), "each attribute counts the same"
        assert mean.values[name].low < mean.values[name].value < mean.values[name].high
    for found, start, count in zip(tables, ends, KINDS.values()):
        assert np.flatnonzero(np.isfinite(found.samples["MPJPE"])).tolist() == list(range(start, start + count))
    assert (mean.rank, tables[0].rank) == ("PA-MPJPE", "")


def test_the_measure_of_the_refined_release(body, data, answers):
    """Root-aligned, 22 joints, against the joints of the person's own shape."""
    mean, *_ = ReasonedEstimation(data, "rpe_refined").score(answers)
    for i in (0, 7, 15):
        found = np.asarray(joints(body, answers[i].pose.rotations), np.float64)[:22]
        truth = data[i].extras["fitted_joint_cam"][:22]
        error = 1000 * np.linalg.norm(found - found[0] - truth + truth[0], axis=1).mean()
        assert mean.samples["MPJPE, fitted"][i] == pytest.approx(error, abs=1e-3)
    true = [Answer("", row.poses[0]) for row in data]
    mean, *_ = ReasonedEstimation(data, "rpe_refined").score(true)
    assert mean.values["MPJPE"].value == 0
    assert mean.values["MPJPE, fitted"].value > 1, "the shape differs"
    bare = [Example(r.id, "image", r.messages, r.poses, {k: r.extras[k] for k in ("type", "bbox")}) for r in data]
    mean, *_ = ReasonedEstimation(bare, "rpe").score(true)
    assert "MPJPE, fitted" not in mean.values
    assert "fitted" not in mean.facts


def test_the_person_is_found_by_box(data, answers):
    """Of two people in an answer the one in the row's box counts, in any order; without one, the row is counted and compared with nobody."""
    other = Pose(np.tile(np.eye(3, dtype=np.float32), (24, 1, 1)), "camera")
    several = []
    for i, answer in enumerate(answers):
        poses, boxes = [answer.pose, other], [BOX + np.array([5, -5, 3, 0]), ELSEWHERE]
        if i % 2:
            poses, boxes = poses[::-1], boxes[::-1]
        rotations = np.stack([pose.rotations for pose in poses])
        several.append(Answer("", Pose(rotations, "camera"), {}, {}, np.stack(boxes)))
    lost = 3
    several[lost] = Answer("", several[lost].pose, {}, {}, np.stack([ELSEWHERE, ELSEWHERE + 10]))
    alone, *_ = ReasonedEstimation(data, "rpe").score(answers)
    found, behaviour, shape, *_ = ReasonedEstimation(data, "rpe").score(several)
    np.testing.assert_array_equal(np.delete(found.samples["MPJPE"], lost), np.delete(alone.samples["MPJPE"], lost))
    assert np.isnan(found.samples["MPJPE"][lost])
    words = {"the person asked for is not among those of the answer": 1}
    assert (found.counts, behaviour.counts, shape.counts) == (words, words, {})
    assert behaviour.facts["samples"] == "5 of 6"
    bare = [Example(r.id, "image", r.messages, r.poses, {"type": r.extras["type"]}) for r in data]
    with pytest.raises(UserError, match="has no box"):
        ReasonedEstimation(bare, "rpe").score(several)


def test_overlap():
    assert best_overlap(np.array([[0, 0, 10, 10], [0, 0, 10, 5]]), np.array([0, 0, 10, 10])) == 0
    assert best_overlap(np.array([[0, 0, 10, 2.9], [20, 20, 5, 5]]), np.array([0, 0, 10, 10])) is None
    assert best_overlap(np.array([[0, 0, 10, 3.1]]), np.array([0, 0, 10, 10])) == 0
    assert best_overlap(np.empty((0, 4)), BOX) is None


def test_other_rows_are_refused():
    rows = [Example("x", "image", [], Pose(np.eye(3)[None, None].repeat(24, 1), "camera"))]
    with pytest.raises(UserError, match="expected a row of RPE"):
        ReasonedEstimation(rows, "cmu")

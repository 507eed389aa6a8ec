"""Pose errors against figures worked out by hand and by SciPy."""

import numpy as np
import pytest

from smpl_jax import body as bodies
from smpl_jax import io, metrics
from smpl_jax.pose import Pose, to_family

from ..numerics import MARGIN, near

Rotation = pytest.importorskip("scipy.spatial.transform").Rotation


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(4, 24, 3)).astype(np.float32)


def moved(points, rng):
    rotation = Rotation.random(len(points), random_state=rng).as_matrix()
    return 1.7 * np.einsum("bij,bkj->bki", rotation, points) + rng.normal(size=(len(points), 1, 3))


def test_mpjpe_is_in_millimetres_and_ignores_where_the_root_is(points):
    shifted = points + np.float32([1, 2, 3])
    shifted[:, 5, 0] += 0.24
    np.testing.assert_allclose(metrics.mpjpe(shifted, points), 240 / 24, rtol=1e-4)
    np.testing.assert_allclose(metrics.mpjpe(points + np.float32([0, 3, 4]), points, root=None), 5000, rtol=1e-5)


def test_pa_mpjpe_ignores_a_similarity(points):
    target = moved(points, np.random.default_rng(1))
    assert metrics.mpjpe(points, target).min() > 100
    assert metrics.pa_mpjpe(points, target).max() <= 1000 * MARGIN * 2.0**-23 * np.abs(target).max()
    near(metrics.procrustes_align(points, target), target)
    np.testing.assert_allclose(metrics.procrustes(points, target).scale, 1.7, rtol=1e-5)


def test_procrustes_never_mirrors(points):
    mirrored = points * np.float32([-1, 1, 1])
    np.testing.assert_allclose(np.linalg.det(metrics.procrustes(points, mirrored).rotation), 1, atol=1e-5)
    assert metrics.pa_mpjpe(points, mirrored).min() > 50


def test_procrustes_is_the_least_squares_optimum(points):
    target = points + np.random.default_rng(2).normal(size=points.shape).astype(np.float32)
    aligned = np.asarray(metrics.procrustes_align(points, target), np.float64)
    centred = target - target.mean(1, keepdims=True)
    for i in range(len(points)):  # SciPy fits the rotation; the best scale for it is a quotient
        source = points[i] - points[i].mean(0)
        turned = source @ Rotation.align_vectors(centred[i], source)[0].as_matrix().T
        expected = turned * (turned * centred[i]).sum() / (turned**2).sum() + target[i].mean(0)
        np.testing.assert_allclose(aligned[i], expected, atol=1e-4)


def test_coinciding_points_stay_finite():
    zeros = np.zeros((3, 24, 3), np.float32)
    assert np.isfinite(metrics.pa_mpjpe(zeros, zeros + 1)).all()


def test_mpjre_counts_body_joints_only():
    target = np.broadcast_to(np.eye(3, dtype=np.float32), (2, 24, 3, 3))
    predicted = target.copy()
    predicted[:, 0] = -1  # the root does not count
    np.testing.assert_array_equal(metrics.mpjre(predicted, target), 0)
    predicted[:, 22] += 0.5
    np.testing.assert_allclose(metrics.mpjre(predicted, target), 100 * 0.5 / 23, rtol=1e-6)
    np.testing.assert_array_equal(metrics.mpjre(predicted, target, num_joints=21), 0)


def test_geodesic_degrees():
    turn = Rotation.from_rotvec(np.deg2rad([[0, 0, 0], [0, 30, 0], [0, 180, 0]])).as_matrix().astype(np.float32)
    np.testing.assert_allclose(metrics.geodesic_degrees(turn, np.eye(3, dtype=np.float32)), [0, 30, 180], atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mpjpe(np.zeros((24, 3)), np.zeros((22, 3))), r"got \(24, 3\) and \(22, 3\)"),
        (lambda: metrics.pa_mpjpe(np.zeros((24, 2)), np.zeros((24, 2))), r"\(\.\.\., K, 3\)"),
        (lambda: metrics.mpjre(np.zeros((22, 3, 3)), np.zeros((22, 3, 3))), "more than num_joints=23"),
    ],
)
def test_bad_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_only_joints_that_count_do() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 3, 24, 3))
    mask = rng.random((3, 24)) < 0.6
    mask[:, 0] = True
    x, y = rng.normal(size=(2, 3, 24, 3, 3))
    for i in range(3):
        few = [points[i, mask[i]] for points in (a, b)]
        np.testing.assert_allclose(metrics.mpjpe(a, b, mask=mask)[i], metrics.mpjpe(*few), rtol=1e-5)
        np.testing.assert_allclose(metrics.pa_mpjpe(a, b, mask)[i], metrics.pa_mpjpe(*few), rtol=1e-4)
        expected = 100 * np.abs(x - y)[i, 1:][mask[i, 1:]].mean()
        np.testing.assert_allclose(metrics.mpjre(x, y, mask=mask)[i], expected, rtol=1e-5)
    assert np.isnan(metrics.mpjpe(a, b, mask=np.zeros((3, 24), bool))).all()
    np.testing.assert_array_equal(metrics.mpjpe(a, b, mask=np.ones((3, 24), bool)), metrics.mpjpe(a, b))


def test_poses_are_judged_by_what_was_measured() -> None:
    """Whatever was filled in changes nothing; positions below what was not measured do not count, nor a pose without any."""
    rng = np.random.default_rng(6)
    body = io.load_body()
    target, predicted, other = (
        Pose(np.float32(Rotation.random(4 * 24, random_state=rng).as_matrix()).reshape(4, 24, 3, 3), "camera")
        for _ in range(3)
    )
    measured = np.ones((4, 24), bool)
    measured[1, 3:] = False
    measured[2, 0] = False
    measured[3] = False
    filled = np.where(measured[..., None, None], target.rotations, other.rotations)
    errors = metrics.pose_metrics(predicted, target.replace(measured=measured), body)
    again = metrics.pose_metrics(predicted, target.replace(rotations=filled, measured=measured), body)
    whole = metrics.pose_metrics(predicted, target, body)
    for name, values in errors.items():
        np.testing.assert_allclose(values, again[name], rtol=2e-5)
        np.testing.assert_allclose(values[0], whole[name][0], rtol=1e-6)
        assert np.isnan(values[3])
    assert np.isnan(errors["mpjpe"][2]), "without the root no position is known"
    np.testing.assert_allclose(errors["pa_mpjpe"][2], whole["pa_mpjpe"][2], rtol=1e-4)
    placed = [j for j in range(24) if j == 0 or body.parents[j] < 3]
    joints = [np.asarray(bodies.joints(body, pose.rotations[1]))[placed] for pose in (predicted, target)]
    np.testing.assert_allclose(errors["mpjpe"][1], metrics.mpjpe(*joints), rtol=1e-5)
    shared = metrics.pose_metrics(predicted, to_family(target, "shared"), body)
    np.testing.assert_allclose(shared["mpjpe"], whole["mpjpe"], rtol=1e-5)
    with pytest.raises(ValueError, match="one frame"):
        metrics.pose_metrics(predicted, target.replace(frame="model"), body)

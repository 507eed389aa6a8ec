"""Generated poses: human limits, determinism, frames."""

import numpy as np
import pytest

from chatpose_jax.data.synthetic import skeleton
from chatpose_jax.data.synthetic.families import (
    ARMS,
    COLUMN,
    LIMITS,
    POSTURES,
    from_angles,
    plausible,
    sample_poses,
)
from chatpose_jax.errors import UserError
from smpl_jax import body as body_functions
from smpl_jax.io import load_body


@pytest.fixture(scope="module")
def poses():
    return sample_poses(600, seed=3)


def pose_of(**angles):
    row = np.zeros((1, len(COLUMN)))
    for name, value in angles.items():
        row[0, COLUMN[name]] = value
    return from_angles(row, np.array(["stand"]), np.array([["side", "side"]]))


def test_angles_stay_within_the_limits_of_joints(poses):
    assert (poses.angles >= LIMITS[:, 0]).all() and (poses.angles <= LIMITS[:, 1]).all()
    beyond = pose_of(left_knee=500.0)
    assert beyond.angles[0, COLUMN["left_knee"]] == 140


def test_rotations_are_rotations(poses):
    r = poses.rotations.astype(float)
    np.testing.assert_allclose(r @ np.swapaxes(r, -1, -2), np.broadcast_to(np.eye(3), r.shape), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(r), 1, atol=1e-6)


def test_every_family_occurs_on_both_sides(poses):
    assert set(poses.family) == set(POSTURES)
    assert set(poses.arms[:, 0]) == set(poses.arms[:, 1]) == set(ARMS)
    lunges = poses.angles[poses.family == "lunge"]
    front_left = lunges[:, COLUMN["left_hip_flexion"]] > lunges[:, COLUMN["right_hip_flexion"]]
    assert 0.2 < front_left.mean() < 0.8


def test_same_seed_same_poses_and_other_seed_other_poses(poses):
    again, other = sample_poses(600, seed=3), sample_poses(600, seed=4)
    np.testing.assert_array_equal(again.rotations, poses.rotations)
    assert not np.isclose(other.angles, poses.angles).all(-1).any()


def test_all_poses_are_plausible(poses):
    assert plausible(poses).all()


def test_a_hand_inside_the_chest_is_implausible():
    through = pose_of(left_elevation=25, left_plane=80, left_twist=60, left_elbow=140)
    assert not plausible(through)[0]
    assert plausible(pose_of(left_elevation=90, right_elevation=90))[0]


def test_leaning_beyond_the_feet_is_implausible():
    assert not plausible(pose_of(pitch=45, left_elevation=90, right_elevation=90))[0]


def test_zero_angles_with_level_arms_are_the_rest_pose():
    rest = pose_of(left_elevation=90, right_elevation=90)
    np.testing.assert_allclose(rest.rotations[0], np.broadcast_to(np.eye(3), (24, 3, 3)), atol=1e-6)


def test_bodies_face_forward_with_no_yaw(poses):
    upright = np.isin(poses.family, ["stand", "step", "sit", "kneel", "squat", "one_leg", "kick"])
    facing = poses.rotations[upright, 0, :, 2]
    assert (facing[:, 2] > 0.6).all() and (np.abs(facing[:, 0]) < 1e-6).all()
    np.testing.assert_allclose(skeleton.remove_yaw(poses.rotations)[upright], poses.rotations[upright], atol=1e-6)


def test_remove_yaw_undoes_a_turn(poses):
    turned = poses.rotations.copy()
    turned[:, 0] = skeleton.rotation("y", np.linspace(-179, 179, len(poses))) @ turned[:, 0]
    np.testing.assert_allclose(skeleton.remove_yaw(turned), skeleton.remove_yaw(poses.rotations), atol=1e-5)


def test_kinematics_agree_with_the_body_model(poses):
    body = load_body()
    theirs = np.asarray(body_functions.joints(body, poses.rotations[:32]))
    np.testing.assert_allclose(poses.joints[:32], theirs - theirs[:, :1], atol=1e-5)


def test_lying_bodies_are_low_and_standing_ones_high(poses):
    height = poses.joints[..., 1].max(1) - poses.joints[..., 1].min(1)
    assert np.median(height[poses.family == "side"]) < 0.8 < np.median(height[poses.family == "kneel"])
    assert (height[poses.family == "stand"] > 1.3).all()


def test_unknown_and_impossible_families_are_told():
    with pytest.raises(UserError, match="Unknown pose family 'fly'"):
        sample_poses(1, 0, family="fly")
    with pytest.raises(UserError, match="Unknown pose family 'tail'"):
        sample_poses(1, 0, arms=("tail", None))

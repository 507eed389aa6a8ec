"""Kinematics of the default body's 24 joints in plain numpy: small batches on the host, where a jit call would cost more than the work."""

from __future__ import annotations

import functools

import numpy as np

# fmt: off
PARENTS = np.array([-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21])
MIRROR = np.array([0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22])
NAMES = ("pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle", "right_ankle", "spine3",
         "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head", "left_shoulder", "right_shoulder", "left_elbow",
         "right_elbow", "left_wrist", "right_wrist", "left_hand", "right_hand")
# fmt: on
INDEX = {name: i for i, name in enumerate(NAMES)}

# Half thickness of the flesh at each joint, metres: how far the skin lies below the joint where the body rests on it.
FLESH = np.full(24, 0.05)
for _name, _thickness in {"pelvis": 0.11, "hip": 0.10, "spine1": 0.11, "spine2": 0.11, "spine3": 0.11, "head": 0.09, "shoulder": 0.07,
                          "knee": 0.055, "ankle": 0.07, "foot": 0.025, "hand": 0.02, "wrist": 0.025, "elbow": 0.04}.items():  # fmt: skip
    FLESH[[i for i, n in enumerate(NAMES) if n.endswith(_name)]] = _thickness

# Joints of a person 1.70 m tall in the rest pose (T-pose), metres, x = the body's left, y up, z forward; centre line and left side.
_REST_LEFT = {
    "pelvis": (0.0, 0.0, 0.0),
    "left_hip": (0.065, -0.085, 0.0),
    "spine1": (0.0, 0.11, -0.02),
    "left_knee": (0.10, -0.465, 0.0),
    "spine2": (0.0, 0.24, -0.01),
    "left_ankle": (0.09, -0.86, -0.03),
    "spine3": (0.0, 0.295, 0.0),
    "left_foot": (0.12, -0.92, 0.09),
    "neck": (0.0, 0.51, -0.03),
    "left_collar": (0.08, 0.42, -0.02),
    "head": (0.0, 0.60, 0.02),
    "left_shoulder": (0.18, 0.45, -0.03),
    "left_elbow": (0.43, 0.44, -0.05),
    "left_wrist": (0.68, 0.44, -0.05),
    "left_hand": (0.76, 0.44, -0.06),
}


@functools.cache
def rest_joints() -> np.ndarray:
    """Rest-pose joints (24, 3) float64, metres, body frame (x left, y up, z forward), pelvis at the origin."""
    joints = np.zeros((24, 3))
    for name, point in _REST_LEFT.items():
        joints[INDEX[name]] = point
        if name.startswith("left"):
            joints[INDEX[name.replace("left", "right")]] = np.array(point) * (-1, 1, 1)
    return joints


def rotation(axis: str, degrees: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) about the axis "x", "y" or "z" by angles in degrees (...)."""
    radians = np.deg2rad(np.asarray(degrees, float))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    out = np.zeros((*radians.shape, 3, 3))
    out[..., range(3), range(3)] = 1.0
    out[..., i, i] = out[..., j, j] = np.cos(radians)
    out[..., j, i] = np.sin(radians)
    out[..., i, j] = -out[..., j, i]
    return out


def rotation_power(matrices: np.ndarray, fraction: float) -> np.ndarray:
    """The same turn (..., 3, 3) carried out to a fraction of its angle, by Rodrigues' formula; angles below π."""
    cosine = np.clip((np.trace(matrices, axis1=-2, axis2=-1) - 1) / 2, -1, 1)
    angle = np.arccos(cosine)
    skew = matrices - np.swapaxes(matrices, -1, -2)
    sine = np.sin(angle)
    unit = skew / np.maximum(2 * sine, 1e-9)[..., None, None]
    part = (fraction * angle)[..., None, None]
    return np.eye(3) + np.sin(part) * unit + (1 - np.cos(part)) * (unit @ unit)


def forward(rotations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forward kinematics with the pelvis at the origin.

    rotations: (N, 24, 3, 3) of each joint relative to its parent. Returns joints (N, 24, 3) in metres and global rotations (N, 24, 3, 3), both in
    the frame of joint 0's parent.
    """
    rest = rest_joints()
    world = np.array(rotations, float)
    joints = np.zeros((*world.shape[:2], 3))
    for j in range(1, 24):
        parent = PARENTS[j]
        world[:, j] = world[:, parent] @ rotations[:, j]
        joints[:, j] = joints[:, parent] + world[:, parent] @ (rest[j] - rest[parent])
    return joints, world


def mirror(rotations: np.ndarray) -> np.ndarray:
    """The pose (N, 24, 3, 3) seen in a mirror: left and right joints swap, rotations are reflected in the plane x = 0."""
    flip = np.array([-1.0, 1.0, 1.0])
    return rotations[:, MIRROR] * np.outer(flip, flip)


def remove_yaw(rotations: np.ndarray) -> np.ndarray:
    """Turn bodies (N, 24, 3, 3), y up, about the vertical so that they face +z.

    The heading is where the pelvis faces; for a body that lies on its back or face it is where the top of the head would point if it stood up.
    """
    root = rotations[:, 0]
    facing, up = root[:, :, 2], root[:, :, 1]
    flat = np.abs(facing[:, 1]) > 0.8
    heading = np.where(flat[:, None], -np.sign(facing[:, 1:2]) * up, facing)
    yaw = np.rad2deg(np.arctan2(heading[:, 0], heading[:, 2]))
    out = np.array(rotations, copy=True)
    out[:, 0] = rotation("y", -yaw) @ root
    return out

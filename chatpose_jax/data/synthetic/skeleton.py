"""Kinematics of the default body's 24 joints in NumPy. For small batches on the host a jit call costs more than the work."""

from __future__ import annotations

import functools

import numpy as np

from smpl_jax.io import load_body

# fmt: off
PARENTS = np.array([-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21])
MIRROR = np.array([0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22])
NAMES = ("pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle",
         "right_ankle", "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head",
         "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hand",
         "right_hand")
# fmt: on
INDEX = {name: i for i, name in enumerate(NAMES)}

# Metres from each joint to the skin, where the body rests on it.
_THICKNESS = {
    "pelvis": 0.11, "spine1": 0.11, "spine2": 0.11, "spine3": 0.11, "head": 0.09, "hip": 0.10, "knee": 0.055,
    "ankle": 0.07, "foot": 0.025, "shoulder": 0.07, "elbow": 0.04, "wrist": 0.025, "hand": 0.02,
}  # fmt: skip
FLESH = np.array([_THICKNESS.get(name.removeprefix("left_").removeprefix("right_"), 0.05) for name in NAMES])


@functools.cache
def rest_joints() -> np.ndarray:
    """Rest-pose joints (24, 3) float64 of the default body, metres, x left, y up, z forward, pelvis at the origin."""
    joints = np.asarray(load_body().joint_template, float)
    return joints - joints[0]


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
    """Rotations (..., 3, 3) about the same axes by a fraction of their angles, which must be below π (Rodrigues' formula)."""
    cosine = np.clip((np.trace(matrices, axis1=-2, axis2=-1) - 1) / 2, -1, 1)
    angle = np.arccos(cosine)
    skew = matrices - np.swapaxes(matrices, -1, -2)
    sine = np.sin(angle)
    unit = skew / np.maximum(2 * sine, 1e-9)[..., None, None]
    part = (fraction * angle)[..., None, None]
    return np.eye(3) + np.sin(part) * unit + (1 - np.cos(part)) * (unit @ unit)


def forward_kinematics(rotations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forward kinematics with the pelvis at the origin.

    rotations: (N, 24, 3, 3) of each joint relative to its parent. Returns joints (N, 24, 3) in metres and global
    rotations (N, 24, 3, 3), both in the frame of joint 0's parent.
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
    """Mirrored poses (N, 24, 3, 3): left and right joints change places, rotations are reflected in x = 0."""
    flip = np.array([-1.0, 1.0, 1.0])
    return rotations[:, MIRROR] * np.outer(flip, flip)


def remove_yaw(rotations: np.ndarray) -> np.ndarray:
    """Turns bodies (N, 24, 3, 3), y up, about the vertical so that they face +z.

    A body faces where its pelvis does. One that lies faces where it would if it stood up: on its back from head to feet, on its face from feet
    to head.
    """
    root = rotations[:, 0]
    facing, up = root[:, :, 2], root[:, :, 1]
    flat = np.abs(facing[:, 1]) > 0.8
    heading = np.where(flat[:, None], -np.sign(facing[:, 1:2]) * up, facing)
    yaw = np.rad2deg(np.arctan2(heading[:, 0], heading[:, 2]))
    out = np.array(rotations, copy=True)
    out[:, 0] = rotation("y", -yaw) @ root
    return out

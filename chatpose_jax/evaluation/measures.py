"""Measures of single poses, in float64 with NumPy: one number for each sample, NaN where nothing counts.

Positions are in metres, distances in millimetres, angles in degrees. ``smpl_jax.metrics`` has the first ones for JAX, under ``jit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from chatpose_jax.settings import one_line


class Aligned(NamedTuple):
    """Points (N, K, 3) after a similarity transform, and its rotation (N, 3, 3)."""

    points: np.ndarray
    rotation: np.ndarray

    def __repr__(self) -> str:
        return one_line(self)


def aligned(source: np.ndarray, target: np.ndarray, mask: np.ndarray) -> Aligned:
    """``source`` moved onto ``target`` by the similarity with the least squared distances (Umeyama, PAMI 1991), which never mirrors.

    Points that all lie in one place become the mean of ``target``, and the rotation is the identity, as in 3DPW's official evaluation.

    Args:
        source, target: (N, K, 3).
        mask: (N, K) bool, the points that count. Without any, the result is NaN.
    """
    weights = (mask / np.where(mask.any(1), mask.sum(1), np.nan)[:, None])[..., None]
    middle, goal = ((weights * points).sum(1, keepdims=True) for points in (source, target))
    x, y = (np.where(mask[..., None], points - mean, 0) for points, mean in ((source, middle), (target, goal)))
    u, s, vt = np.linalg.svd(np.nan_to_num(y.swapaxes(1, 2) @ x))
    turn = np.ones((len(s), 3))
    turn[:, 2] = np.where(np.linalg.det(u) * np.linalg.det(vt) < 0, -1, 1)
    spread = (x * x).sum((1, 2))
    moves = spread > 0
    rotation = np.where(moves[:, None, None], (u * turn[:, None]) @ vt, np.eye(3))
    scale = np.where(moves, (s * turn).sum(1) / np.where(moves, spread, 1), 0)
    return Aligned(scale[:, None, None] * (source - middle) @ rotation.swapaxes(1, 2) + goal, rotation)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distances in millimetres of points (..., 3) in metres; shape (...)."""
    return 1000 * np.sqrt(((a - b) ** 2).sum(-1))


def mean_over(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(N,), the mean of values (N, K) over those that count."""
    count = mask.sum(1)
    return np.where(mask, values, 0).sum(1) / np.where(count > 0, count, np.nan)


def entries(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """100 times the mean absolute difference of the entries of matrices (..., 3, 3): MPJRE of one joint, as ChatPose's tables print it."""
    return 100 * np.abs(a - b).mean((-1, -2))


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Geodesic distances in degrees between rotations (..., 3, 3); exact also near 0 and 180 degrees."""
    between = np.swapaxes(a, -1, -2) @ b
    axis = np.stack([between[..., i, j] - between[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))], -1)
    return np.degrees(np.arctan2(np.sqrt((axis**2).sum(-1)), np.trace(between, axis1=-2, axis2=-1) - 1))


def global_rotations(rotations: np.ndarray, parents: Sequence[int]) -> np.ndarray:
    """Orientations (N, J, 3, 3) of the joints in the frame of the root's rotation, from rotations relative to the parents."""
    found: list[np.ndarray] = []
    for joint, parent in enumerate(parents):
        found.append(rotations[:, joint] if parent < 0 else found[parent] @ rotations[:, joint])
    return np.stack(found, 1)


def area_under_pck(errors: np.ndarray, end: int = 200) -> np.ndarray:
    """(N,), the area under the curve of PCK over the thresholds 0, 1 … end - 1 mm, from 0 to 1, of errors (N, K) in millimetres.

    PCK at a threshold is the share of points whose error is at most that. Between thresholds the curve is straight, as in 3DPW's official
    evaluation, so a point whose error lies between two of them adds half of that step.
    """
    first = np.ceil(errors)
    area = np.where(first <= 0, end - 1, end - 0.5 - first)
    return np.where(first < end, area, 0).mean(1) / (end - 1) + 0 * errors.mean(1)

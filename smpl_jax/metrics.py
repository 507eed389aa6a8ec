"""Errors between predicted and true poses, one number for each sample (average over samples yourself, or with
``jnp.mean``).

Joint positions are in metres and their errors in millimetres, as papers print them; rotations are matrices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from smpl_jax.pose import JOINTS
from smpl_jax.printing import one_line
from smpl_jax.rotations import geodesic_distance

_HIGHEST = jax.lax.Precision.HIGHEST


class Similarity(NamedTuple):
    """``x -> scale * rotation @ x + translation`` for column vectors x."""

    scale: jax.Array  # (...)
    rotation: jax.Array  # (..., 3, 3)
    translation: jax.Array  # (..., 3)

    def __repr__(self) -> str:
        return one_line(self)


def mpjpe(predicted: ArrayLike, target: ArrayLike, root: int | None = 0) -> jax.Array:
    """Mean per-joint position error in millimetres, after moving the root joints of both onto each other.

    Args:
        predicted: (..., K, 3) positions in metres, in the frame of ``target``.
        target: (..., K, 3).
        root: index of the joint to align on (the pelvis of SMPL is 0); ``None`` compares positions as they stand.

    Returns:
        (...) millimetres.
    """
    predicted, target = _points(predicted, target)
    if root is not None:
        predicted = predicted - predicted[..., root : root + 1, :]
        target = target - target[..., root : root + 1, :]
    return _mean_distance_mm(predicted, target)


def pa_mpjpe(predicted: ArrayLike, target: ArrayLike) -> jax.Array:
    """MPJPE in millimetres after the similarity transform that brings ``predicted`` nearest to ``target``; shapes as
    :func:`mpjpe`.
    """
    predicted, target = _points(predicted, target)
    return _mean_distance_mm(procrustes_align(predicted, target), target)


def procrustes_align(source: ArrayLike, target: ArrayLike) -> jax.Array:
    """``source`` (..., K, 3) moved by :func:`procrustes` onto ``target`` (..., K, 3)."""
    source, target = _points(source, target)
    scale, rotation, translation = procrustes(source, target)
    moved = jnp.einsum("...ij,...kj->...ki", rotation, source, precision=_HIGHEST)
    return scale[..., None, None] * moved + translation[..., None, :]


def procrustes(source: ArrayLike, target: ArrayLike) -> Similarity:
    """Least-squares similarity from ``source`` to ``target`` (Umeyama, PAMI 1991; reflections are never used).

    Args:
        source: (..., K, 3).
        target: (..., K, 3).

    Returns:
        The transform; its scale is 0 when all source points coincide.
    """
    source, target = _points(source, target)
    source_mean, target_mean = source.mean(-2, keepdims=True), target.mean(-2, keepdims=True)
    x, y = source - source_mean, target - target_mean
    u, s, vt = jnp.linalg.svd(jnp.einsum("...ki,...kj->...ij", y, x, precision=_HIGHEST))
    # A negative determinant would mirror the body: turn the axis that costs least.
    sign = jnp.where(jnp.linalg.det(jnp.matmul(u, vt, precision=_HIGHEST)) < 0, -1.0, 1.0)
    flip = jnp.stack([jnp.ones_like(sign), jnp.ones_like(sign), sign], axis=-1).astype(s.dtype)
    rotation = jnp.matmul(u * flip[..., None, :], vt, precision=_HIGHEST)
    spread = jnp.sum(x * x, axis=(-1, -2))
    scale = jnp.where(spread > 0, jnp.sum(s * flip, axis=-1) / jnp.where(spread > 0, spread, 1), 0)
    moved_mean = scale[..., None] * jnp.einsum("...ij,...j->...i", rotation, source_mean[..., 0, :], precision=_HIGHEST)
    return Similarity(scale, rotation, target_mean[..., 0, :] - moved_mean)


def mpjre(predicted: ArrayLike, target: ArrayLike, num_joints: int = JOINTS["smpl"] - 1) -> jax.Array:
    """Mean per-joint rotation error as ChatPose's tables print it: 100 x the mean absolute difference of matrix
    entries.

    The paper does not define the measure; this definition reproduces published figures. Joint 0, the global
    orientation, is left out.

    Args:
        predicted: (..., J, 3, 3) rotations relative to the parent joint.
        target: (..., J, 3, 3).
        num_joints: body joints that count, joints 1 ... num_joints: 23 for SMPL, 21 for what SMPL shares with SMPL-H
            and SMPL-X.

    Returns:
        (...), no unit.
    """
    predicted, target = jnp.asarray(predicted), jnp.asarray(target)
    joints = predicted.shape[-3] if predicted.ndim >= 3 else 0
    if predicted.shape != target.shape or predicted.shape[-2:] != (3, 3) or not 1 <= num_joints < joints:
        raise ValueError(
            f"expected two equal shapes (..., J, 3, 3) with more than num_joints={num_joints} joints; "
            f"got {predicted.shape} and {target.shape}"
        )
    body = slice(1, 1 + num_joints)
    return 100 * jnp.mean(jnp.abs(predicted[..., body, :, :] - target[..., body, :, :]), axis=(-1, -2, -3))


def geodesic_degrees(predicted: ArrayLike, target: ArrayLike) -> jax.Array:
    """Angle in degrees between rotation matrices (..., 3, 3), one for each pair; shape (...)."""
    return jnp.rad2deg(geodesic_distance(predicted, target))


def _mean_distance_mm(a: jax.Array, b: jax.Array) -> jax.Array:
    return 1000 * jnp.mean(jnp.linalg.norm(a - b, axis=-1), axis=-1)


def _points(a: ArrayLike, b: ArrayLike) -> tuple[jax.Array, jax.Array]:
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.shape != b.shape or a.ndim < 2 or a.shape[-1] != 3:
        raise ValueError(f"expected two equal shapes (..., K, 3) of positions in metres; got {a.shape} and {b.shape}")
    return a, b

"""Errors between predicted and true poses, one number per sample.

Joint positions are in metres, their errors in millimetres, as in papers; rotations are matrices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from smpl_jax.body import BodyModel, joints
from smpl_jax.pose import JOINTS, SHARED, Pose, family_of, known, placed, to_family
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


def mpjpe(predicted: ArrayLike, target: ArrayLike, root: int | None = 0, mask: ArrayLike | None = None) -> jax.Array:
    """Mean per-joint position error in millimetres, after moving the root joints of both onto each other.

    Args:
        predicted: (..., K, 3) positions in metres, in the frame of ``target``.
        target: (..., K, 3).
        root: index of the joint to align on (the pelvis of SMPL is 0); ``None`` compares positions as they stand.
        mask: (..., K) bool, the joints that count; None counts all.

    Returns:
        (...) millimetres; NaN where no joint counts.
    """
    predicted, target = _points(predicted, target)
    if root is not None:
        predicted = predicted - predicted[..., root : root + 1, :]
        target = target - target[..., root : root + 1, :]
    return _mean_distance_mm(predicted, target, mask)


def pa_mpjpe(predicted: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """MPJPE in millimetres after the similarity transform that brings ``predicted`` nearest to ``target``; shapes as
    :func:`mpjpe`.
    """
    predicted, target = _points(predicted, target)
    return _mean_distance_mm(procrustes_align(predicted, target, mask), target, mask)


def procrustes_align(source: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """``source`` (..., K, 3) moved by :func:`procrustes` onto ``target`` (..., K, 3)."""
    source, target = _points(source, target)
    scale, rotation, translation = procrustes(source, target, mask)
    moved = jnp.einsum("...ij,...kj->...ki", rotation, source, precision=_HIGHEST)
    return scale[..., None, None] * moved + translation[..., None, :]


def procrustes(source: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None) -> Similarity:
    """Least-squares similarity from ``source`` to ``target`` (Umeyama, PAMI 1991; reflections are never used).

    Args:
        source: (..., K, 3).
        target: (..., K, 3).
        mask: (..., K) bool, the points that count; None counts all.

    Returns:
        The transform; its scale is 0 when all source points coincide.
    """
    source, target = _points(source, target)
    counts = None if mask is None else jnp.asarray(mask)[..., None]
    source_mean, target_mean = (jnp.expand_dims(_mean(points, -2, counts), -2) for points in (source, target))
    x, y = source - source_mean, target - target_mean
    if counts is not None:
        x, y = jnp.where(counts, x, 0), jnp.where(counts, y, 0)
    u, s, vt = jnp.linalg.svd(jnp.einsum("...ki,...kj->...ij", y, x, precision=_HIGHEST))
    # A negative determinant would mirror the body: turn the axis that costs least.
    sign = jnp.where(jnp.linalg.det(jnp.matmul(u, vt, precision=_HIGHEST)) < 0, -1.0, 1.0)
    flip = jnp.stack([jnp.ones_like(sign), jnp.ones_like(sign), sign], axis=-1).astype(s.dtype)
    rotation = jnp.matmul(u * flip[..., None, :], vt, precision=_HIGHEST)
    spread = jnp.sum(x * x, axis=(-1, -2))
    scale = jnp.where(spread > 0, jnp.sum(s * flip, axis=-1) / jnp.where(spread > 0, spread, 1), 0)
    moved_mean = scale[..., None] * jnp.einsum("...ij,...j->...i", rotation, source_mean[..., 0, :], precision=_HIGHEST)
    return Similarity(scale, rotation, target_mean[..., 0, :] - moved_mean)


def mpjre(
    predicted: ArrayLike, target: ArrayLike, num_joints: int = JOINTS["smpl"] - 1, mask: ArrayLike | None = None
) -> jax.Array:
    """Mean per-joint rotation error as ChatPose's tables print it: 100 x the mean absolute difference of matrix
    entries.

    The paper does not define the measure; this definition reproduces published figures. Joint 0, the global
    orientation, is left out.

    Args:
        predicted: (..., J, 3, 3) rotations relative to the parent joint.
        target: (..., J, 3, 3).
        num_joints: body joints that count, joints 1 ... num_joints: 23 for SMPL, 21 for what SMPL shares with SMPL-H
            and SMPL-X.
        mask: (..., J) bool, the joints that count; None counts all.

    Returns:
        (...), no unit; NaN where no joint counts.
    """
    predicted, target = jnp.asarray(predicted), jnp.asarray(target)
    joints = predicted.shape[-3] if predicted.ndim >= 3 else 0
    if predicted.shape != target.shape or predicted.shape[-2:] != (3, 3) or not 1 <= num_joints < joints:
        raise ValueError(
            f"expected two equal shapes (..., J, 3, 3) with more than num_joints={num_joints} joints; "
            f"got {predicted.shape} and {target.shape}"
        )
    body = slice(1, 1 + num_joints)
    error = jnp.abs(predicted[..., body, :, :] - target[..., body, :, :])
    if mask is None:
        return 100 * jnp.mean(error, axis=(-1, -2, -3))
    return 100 * _mean(jnp.mean(error, axis=(-1, -2)), -1, jnp.asarray(mask)[..., body])


def geodesic_degrees(predicted: ArrayLike, target: ArrayLike) -> jax.Array:
    """Angle in degrees between rotation matrices (..., 3, 3), one for each pair; shape (...)."""
    return jnp.rad2deg(geodesic_distance(predicted, target))


def pose_metrics(predicted: Pose, target: Pose, body: BodyModel) -> dict[str, jax.Array]:
    """Errors of poses in one frame, over the joints that both measured. Joint positions are those of the body's average shape.

    A position counts if all its ancestors in the tree were measured (``pose.placed``); for ``pa_mpjpe`` the root need not be.

    Args:
        predicted, target: of any body families, (...).
        body: gives the positions, those of its first 24 joints.

    Returns:
        Each (...), NaN where no joint counts: ``mpjpe`` and ``pa_mpjpe`` in mm; ``mpjre`` and ``geodesic_degrees`` (the mean angle) over
        the joints without the root (23 of SMPL, or the 21 that all families share).
    """
    if predicted.frame != target.frame:
        raise ValueError(f"expected poses in one frame, found {predicted.frame!r} and {target.frame!r}")
    predicted = to_family(predicted, target.family)
    counts = jnp.asarray(known(predicted) & known(target))
    shown = [to_family(pose.replace(measured=counts), family_of(body.num_joints)) for pose in (predicted, target)]
    a, b = (joints(body, pose.rotations)[..., :24, :] for pose in shown)
    measured = shown[0].measured
    # PA-MPJPE does not depend on the root; it is undefined if no other joint was measured.
    turned = measured.at[..., 0].set(measured[..., 1:].any(-1))
    last = target.num_joints if target.family == "smpl" else SHARED
    angles = geodesic_degrees(predicted.rotations[..., 1:last, :, :], target.rotations[..., 1:last, :, :])
    return {
        "mpjpe": mpjpe(a, b, mask=_positions(measured, body)),
        "pa_mpjpe": pa_mpjpe(a, b, _positions(turned, body)),
        "mpjre": mpjre(predicted.rotations, target.rotations, last - 1, mask=counts),
        "geodesic_degrees": _mean(angles, -1, counts[..., 1:last]),
    }


def _positions(measured: jax.Array, body: BodyModel) -> jax.Array:
    """The joints (of the first 24) whose positions count. None counts if only the root was placed, because positions are relative to it."""
    found = placed(measured, body.parents)[..., :24]
    return found & found[..., 1:].any(-1, keepdims=True)


def _mean(x: jax.Array, axis: int, mask: jax.Array | None) -> jax.Array:
    """The mean of the values that count. If all of them do, this equals ``jnp.mean`` to the bit."""
    if mask is None:
        return x.mean(axis)
    counted = jnp.broadcast_to(mask, x.shape).sum(axis)
    return jnp.where(mask, x, 0).mean(axis) * (x.shape[axis] / counted)


def _mean_distance_mm(a: jax.Array, b: jax.Array, mask: ArrayLike | None) -> jax.Array:
    return 1000 * _mean(jnp.linalg.norm(a - b, axis=-1), -1, None if mask is None else jnp.asarray(mask))


def _points(a: ArrayLike, b: ArrayLike) -> tuple[jax.Array, jax.Array]:
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.shape != b.shape or a.ndim < 2 or a.shape[-1] != 3:
        raise ValueError(f"expected two equal shapes (..., K, 3) of positions in metres; got {a.shape} and {b.shape}")
    return a, b

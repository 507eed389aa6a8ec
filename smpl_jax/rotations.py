"""Conversions between rotation representations.

Every function takes any leading batch shape and keeps the dtype of floating-point input. Values and gradients are finite
at every rotation: at the identity, next to it, at π and at 2π. This matters in practice: a fit starts at the zero pose,
where the textbook formulas divide zero by zero.

Conventions: matrices act on column vectors; an axis-angle vector is the unit axis times the angle in radians;
    quaternions are ``wxyz``.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Order6D = Literal["columns", "interleaved", "rows"]


def rotation_6d_to_matrix(x: ArrayLike, order: Order6D = "columns") -> jax.Array:
    """6D representation to a rotation matrix by Gram-Schmidt (Zhou et al., CVPR 2019, equation 15).

    Published code packs the same six numbers in three orders:

    * ``"columns"``: three numbers of the first column, then three of the second (4D-Humans/HMR2, ChatPose);
    * ``"interleaved"``: the top two columns in row-major order, ``x.reshape(3, 2)`` (SPIN and its descendants);
    * ``"rows"``: three numbers of the first *row*, then three of the second (PyTorch3D).

    Args:
        x: (..., 6). The two vectors need not be unit or orthogonal.
        order: the order of the six numbers.

    Returns:
        (..., 3, 3). Two zero or parallel vectors do not span a frame: the result and its gradient are then finite, but the result is not a
        rotation.

    Raises:
        ValueError: the last axis is not 6, or the order is unknown.
    """
    x = _floating(x, (6,), "6D rotations")
    match order:
        case "columns" | "rows":
            first, second = x[..., :3], x[..., 3:]
        case "interleaved":
            first, second = x[..., 0::2], x[..., 1::2]
        case _:
            raise _unknown_order(order)
    first = _normalize(first)
    second = _normalize(second - _dot(first, second) * first)
    return jnp.stack([first, second, jnp.cross(first, second)], axis=-2 if order == "rows" else -1)


def matrix_to_rotation_6d(matrix: ArrayLike, order: Order6D = "columns") -> jax.Array:
    """Rotation matrices (..., 3, 3) to 6D (..., 6); the inverse of :func:`rotation_6d_to_matrix` for the same order."""
    matrix = _floating(matrix, (3, 3), "rotation matrices")
    match order:
        case "columns":
            pair = jnp.swapaxes(matrix[..., :2], -1, -2)
        case "interleaved":
            pair = matrix[..., :2]
        case "rows":
            pair = matrix[..., :2, :]
        case _:
            raise _unknown_order(order)
    return pair.reshape(*matrix.shape[:-2], 6)


def axis_angle_to_matrix(axis_angle: ArrayLike) -> jax.Array:
    """Axis-angle vectors (..., 3), radians, to rotation matrices (..., 3, 3) by Rodrigues' formula."""
    v = _floating(axis_angle, (3,), "axis-angle vectors")
    cosine, sinc = _half_angle(v)
    # sin(t)/t and (1 - cos t)/t^2 written with the half angle: no cancellation at small angles.
    a, b = sinc * cosine, 0.5 * sinc**2
    x, y, z = v[..., 0], v[..., 1], v[..., 2]
    bx, by, bz = b * x, b * y, b * z
    rows = [
        [1 - (by * y + bz * z), bx * y - a * z, bx * z + a * y],
        [bx * y + a * z, 1 - (bx * x + bz * z), by * z - a * x],
        [bx * z - a * y, by * z + a * x, 1 - (bx * x + by * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_axis_angle(matrix: ArrayLike) -> jax.Array:
    """Rotation matrices (..., 3, 3) to axis-angle (..., 3), angle in [0, π]. At π, both signs of the axis are the same rotation; either is
    returned.
    """
    return quaternion_to_axis_angle(matrix_to_quaternion(matrix))


def quaternion_to_matrix(quaternion: ArrayLike) -> jax.Array:
    """Quaternions (..., 4), ``wxyz``, of any non-zero length, to rotation matrices (..., 3, 3)."""
    q = _normalize(_floating(quaternion, (4,), "quaternions"))
    w, x, y, z = (q[..., i] for i in range(4))
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_quaternion(matrix: ArrayLike) -> jax.Array:
    """Rotation matrices (..., 3, 3) to unit quaternions (..., 4), ``wxyz``. The sign makes the largest component positive.

    Shepperd's method: each row below is ``4 q_i q``. The row with the largest ``q_i`` is normalised, so no division is by a
    small number.
    """
    m = _floating(matrix, (3, 3), "rotation matrices")
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    squares = jnp.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], axis=-1)
    candidates = jnp.stack(
        [
            jnp.stack([squares[..., 0], wx, wy, wz], axis=-1),
            jnp.stack([wx, squares[..., 1], xy, xz], axis=-1),
            jnp.stack([wy, xy, squares[..., 2], yz], axis=-1),
            jnp.stack([wz, xz, yz, squares[..., 3]], axis=-1),
        ],
        axis=-2,
    )
    best = jnp.argmax(squares, axis=-1)[..., None, None]
    return _normalize(jnp.take_along_axis(candidates, best, axis=-2)[..., 0, :])


def axis_angle_to_quaternion(axis_angle: ArrayLike) -> jax.Array:
    """Axis-angle vectors (..., 3), radians, to unit quaternions (..., 4), ``wxyz``."""
    v = _floating(axis_angle, (3,), "axis-angle vectors")
    cosine, sinc = _half_angle(v)
    return jnp.concatenate([cosine[..., None], 0.5 * sinc[..., None] * v], axis=-1)


def quaternion_to_axis_angle(quaternion: ArrayLike) -> jax.Array:
    """Quaternions (..., 4), ``wxyz``, of any non-zero length, to axis-angle (..., 3), angle in [0, π]."""
    q = _normalize(_floating(quaternion, (4,), "quaternions"))
    q = jnp.where(q[..., :1] < 0, -q, q)
    w, xyz = q[..., 0], q[..., 1:]
    square = jnp.sum(xyz * xyz, axis=-1)
    small = square < 1e-4
    sine = jnp.sqrt(jnp.where(small, 1.0, square))
    ratio = square / jnp.where(small, w * w, 1.0)
    series = (1 - ratio * (1 / 3 - ratio * (1 / 5 - ratio / 7))) / jnp.where(small, w, 1.0)
    return 2 * jnp.where(small, series, jnp.arctan2(sine, w) / sine)[..., None] * xyz


@jax.custom_jvp
def matrix_9d_to_rotation(matrix: ArrayLike) -> jax.Array:
    """The rotation nearest to any matrix, in the Frobenius norm. Its singular values are set to 1, with the sign of the smallest such that the
    determinant is 1 (Levinson et al., NeurIPS 2020, "SVD+").

    Args:
        matrix: (..., 3, 3), nine free numbers; its scale does not matter.

    Returns:
        (..., 3, 3). The first derivative is correct wherever the nearest rotation is unique. This includes equal singular values, such as at a
        rotation, where the derivative of an SVD is not defined. If several rotations are nearest (a matrix of rank 1 or 0, a reflection whose
        smallest singular values are equal), one of them is returned, and the derivative along the directions in which they differ is 0.

    Raises:
        ValueError: the last axes are not (3, 3).
    """
    u, _, vt = _proper_svd(_floating(matrix, (3, 3), "matrices"))
    return _product(u, vt)


@matrix_9d_to_rotation.defjvp
def _matrix_9d_to_rotation_jvp(primals: tuple[ArrayLike], tangents: tuple[ArrayLike]) -> tuple[jax.Array, jax.Array]:
    """M = U S Vᵀ, R = U Vᵀ: dR = U Z Vᵀ with Z_ij = (A_ij - A_ji) / (s_i + s_j), A = Uᵀ dM V. The derivatives of U and V divide by s_i - s_j; this
    formula does not.
    """
    matrix, tangent = _floating(primals[0], (3, 3), "matrices"), jnp.asarray(tangents[0])
    u, s, vt = _proper_svd(matrix)
    a = _product(_product(jnp.swapaxes(u, -1, -2), tangent), jnp.swapaxes(vt, -1, -2))
    sums = s[..., :, None] + s[..., None, :]
    unique = sums > 4 * jnp.finfo(s.dtype).eps * s[..., :1, None]
    z = jnp.where(unique, (a - jnp.swapaxes(a, -1, -2)) / jnp.where(unique, sums, 1.0), 0.0)
    return _product(u, vt), _product(_product(u, z), vt)


def _proper_svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, s, Vᵀ with det(U Vᵀ) = 1: the last singular value and column of U are negated if necessary."""
    u, s, vt = jnp.linalg.svd(matrix)
    sign = jnp.where(jnp.linalg.det(u) * jnp.linalg.det(vt) < 0, -1.0, 1.0).astype(s.dtype)
    last = jnp.stack([jnp.ones_like(sign), jnp.ones_like(sign), sign], axis=-1)
    return u * last[..., None, :], s * last, vt


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # Accelerators multiply float32 matrices in bfloat16 or TF32 unless told otherwise.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def exponential_volume(axis_angle: ArrayLike) -> jax.Array:
    """Volume factor of the exponential map at axis-angle vectors (..., 3): 2 (1 - cos t) / t², t = |v|, shape (...). It turns densities of
    axis-angle vectors into densities of rotations (Chirikjian 2012, section 10.4).
    """
    return _half_angle(_floating(axis_angle, (3,), "axis-angle vectors"))[1] ** 2


def geodesic_distance(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """Geodesic distance: angle in radians, [0, π], between rotation matrices (..., 3, 3); shape (...), with
    broadcasting.

    The gradient is 0 if the rotations are equal or exactly half a turn apart (the distance has a kink
    at both).
    """
    a, b = _floating(a, (3, 3), "rotation matrices"), _floating(b, (3, 3), "rotation matrices")
    # Broadcast products, not a matmul: accelerators multiply matrices in bfloat16 unless told otherwise.
    relative = jnp.sum(a[..., :, :, None] * b[..., :, None, :], axis=-3)
    q = matrix_to_quaternion(relative)
    square = jnp.sum(q[..., 1:] ** 2, axis=-1)
    sine = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return 2 * jnp.arctan2(sine, jnp.abs(q[..., 0]))


def _half_angle(v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos(t/2) and sin(t/2)/(t/2) of t = |v|, each (...), smooth at 0."""
    square = jnp.sum(v * v, axis=-1) / 4
    small = square < 1e-3
    # The inner `where` keeps sqrt away from 0. Its infinite slope there would turn the gradient of the unused branch
    # into 0 * inf.
    half = jnp.sqrt(jnp.where(small, 1.0, square))
    s = square
    cosine = jnp.where(small, 1 - s / 2 * (1 - s / 12 * (1 - s / 30 * (1 - s / 56))), jnp.cos(half))
    sinc = jnp.where(small, 1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72))), jnp.sin(half) / half)
    return cosine, sinc


def _normalize(v: jax.Array) -> jax.Array:
    """v / |v| along the last axis. Vectors too short to have a direction are returned unchanged."""
    square = jnp.sum(v * v, axis=-1, keepdims=True)
    tiny = square <= jnp.finfo(v.dtype).tiny
    return v / jnp.sqrt(jnp.where(tiny, 1.0, square))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _floating(x: ArrayLike, trailing: tuple[int, ...], what: str) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape[-len(trailing) :] != trailing:
        expected = ", ".join(["...", *map(str, trailing)])
        raise ValueError(f"{what} must have shape ({expected}); got {x.shape}")
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def _unknown_order(order: object) -> ValueError:
    return ValueError(f"unknown 6D order {order!r}; expected one of {', '.join(get_args(Order6D))}")

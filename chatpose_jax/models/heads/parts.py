"""Shared by several heads: representations of rotations, layers with a given initial output, means over measured joints."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.layers import Linear
from chatpose_jax.settings import whole
from smpl_jax.pose import Pose, known
from smpl_jax.rotations import (
    axis_angle_to_matrix,
    matrix_9d_to_rotation,
    quaternion_to_matrix,
    rotation_6d_to_matrix,
)

RotationName = Literal["6d", "svd9d", "quaternion", "axis_angle"]
Start = Literal["upright", "identity"]


class Rotation(NamedTuple):
    """A representation of rotations by n numbers.

    identity: the numbers of the identity. half_turn: those of half a turn about x. to_matrix: (..., n) -> (..., 3, 3).
    """

    identity: tuple[float, ...]
    half_turn: tuple[float, ...]
    to_matrix: Callable[[jax.Array], jax.Array]


def _nearest(x: jax.Array) -> jax.Array:
    return matrix_9d_to_rotation(x.reshape(*x.shape[:-1], 3, 3))


ROTATIONS: dict[RotationName, Rotation] = {
    "6d": Rotation((1, 0, 0, 0, 1, 0), (1, 0, 0, 0, -1, 0), partial(rotation_6d_to_matrix, order="columns")),
    "svd9d": Rotation((1, 0, 0, 0, 1, 0, 0, 0, 1), (1, 0, 0, 0, -1, 0, 0, 0, -1), _nearest),
    "quaternion": Rotation((1, 0, 0, 0), (0, 1, 0, 0), quaternion_to_matrix),
    "axis_angle": Rotation((0, 0, 0), (math.pi, 0, 0), axis_angle_to_matrix),
}
"""6D columns through Gram–Schmidt (Zhou et al. 2019, in HMR2's order), nine numbers through an SVD (Levinson et al. 2020), quaternions of
any length, axis-angles in radians."""


def start_numbers(rotation: RotationName, joints: int, start: Start = "upright") -> jax.Array:
    """(J, n), the initial pose of a head, in the representation ``rotation``.

    start: "upright", the rest pose of a person who stands upright and faces the camera; or "identity", which is upside down in the camera frame.
        The identity is half a turn from upright, where the L1 on matrices has a local minimum.
    """
    row = ROTATIONS[rotation]
    root = row.half_turn if start == "upright" else row.identity
    return jnp.array([root] + [row.identity] * (joints - 1), jnp.float32)


def sizes(**options: int) -> None:
    """Raises UserError for the first option of a head that is not a whole number of at least 1."""
    for name, value in options.items():
        whole(f"model.head.options: {name}", value, 1)


def last_linear(
    width: int, start: jax.Array, *, axes: tuple[str | None, str | None] = (None, None), rngs: nnx.Rngs
) -> Linear:
    """A last layer (..., width) -> (..., start.size). Its initial output is near ``start`` for every input."""
    linear = Linear(width, start.size, bias=True, axes=axes, rngs=rngs)
    linear.kernel[...] = linear.kernel[...] * 0.1
    linear.bias[...] = start.reshape(-1)  # type: ignore[index]
    return linear


def measured_mean(values: jax.Array, target: Pose, mask: jax.Array) -> jax.Array:
    """Mean of (B, P, J) numbers over the measured joints of the poses that exist; 0 if there are none."""
    counts = mask[..., None] & known(target)
    return jnp.where(counts, values, 0).sum() / jnp.maximum(counts.sum(), 1)


def measured_count(target: Pose, mask: jax.Array) -> jax.Array:
    """The number of joints in ``measured_mean``."""
    return (mask[..., None] & known(target)).sum()

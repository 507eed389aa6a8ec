"""One pose: what goes from a data row to a loss, from a head to a reply, from a fit to a file."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax

from smpl_jax.frames import Frame
from smpl_jax.printing import one_line

Family = Literal["shared", "smpl", "smplh", "smplx"]

JOINTS: dict[Family, int] = {"shared": 22, "smpl": 24, "smplh": 52, "smplx": 55}
"""Rotations of a pose by body family, the root first. Joints 0 … 21, "shared", are the same in all; SMPL adds two rigid hands, SMPL-H
30 finger joints, SMPL-X jaw, eyes and the 30 finger joints."""
SHARED = JOINTS["shared"]
HANDS = 30
"""Finger joints of both hands, the left one's first: the last joints of SMPL-H and SMPL-X."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rotations", "betas", "translation", "measured", "has_betas", "has_translation"],
    meta_fields=["frame"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Pose:
    """Poses of one body family in one frame, in any batch shape (...). A pytree of arrays, NumPy's or JAX's; the frame is static.

    rotations: (..., J, 3, 3), relative to the parents, joint 0 the global orientation told in ``frame``; J is one of ``JOINTS``.
    frame: "camera" (x right, y down, z away), "model" (y up) or "z-up"; see ``smpl_jax.frames``.
    betas: (..., n) shape coefficients, or None where nothing is known of the shape.
    translation: (..., 3) metres in ``frame``, or None.
    measured: (..., J) bool, the joints that were measured or estimated; the others are filled in and count in no loss or metric. None
        means all.
    has_betas, has_translation: (...) bool, which poses of a batch have betas or a translation at all, the others being filled with
        zeros. None means all, where the field itself is there.
    """

    rotations: Any
    frame: Frame
    betas: Any = None
    translation: Any = None
    measured: Any = None
    has_betas: Any = None
    has_translation: Any = None

    __repr__ = one_line

    @property
    def num_joints(self) -> int:
        """J."""
        return self.rotations.shape[-3]

    @property
    def shape(self) -> tuple[int, ...]:
        """The batch shape (...)."""
        return tuple(self.rotations.shape[:-3])

    @property
    def family(self) -> Family:
        """Name of the body family whose number of joints this is. Raises ValueError where there is none."""
        return family_of(self.num_joints)

    @property
    def hands(self) -> Any:
        """(..., 30, 3, 3), the finger joints, left hand first; None for families without fingers."""
        return self.rotations[..., -HANDS:, :, :] if self.num_joints > SHARED + HANDS - 1 else None

    def __getitem__(self, index: Any) -> Pose:
        """The poses at an index of the batch axes."""
        return jax.tree.map(lambda x: x[index], self)

    def replace(self, **changes: Any) -> Pose:
        return dataclasses.replace(self, **changes)


def family_of(num_joints: int) -> Family:
    """The family with so many joints; ValueError lists those that there are."""
    for name, count in JOINTS.items():
        if count == num_joints:
            return name
    known = ", ".join(f"{count} ({name})" for name, count in JOINTS.items())
    raise ValueError(f"a pose has {known} joints; found {num_joints}")

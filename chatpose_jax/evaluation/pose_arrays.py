"""Many poses as arrays of SMPL's joints in the camera frame, and what rows say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line
from smpl_jax.frames import turn
from smpl_jax.pose import SHARED, Pose, family_of


@dataclasses.dataclass(frozen=True, eq=False)
class PoseArrays:
    """N poses as arrays, in the camera frame, with SMPL's 24 joints.

    rotations: (N, 24, 3, 3) float64, the identity where there is no pose. measured: (N, 24) bool. betas: (N, 10), zeros where ``has_betas`` (N,) is
    false. there: (N,) bool, whether there is a pose at all.
    """

    rotations: np.ndarray
    measured: np.ndarray
    betas: np.ndarray
    has_betas: np.ndarray
    there: np.ndarray

    __repr__ = one_line

    def take(self, rows: np.ndarray) -> PoseArrays:
        """Those at an index (n,), or where a mask (N,) is true."""
        return PoseArrays(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @classmethod
    def gather(cls, poses: Sequence[Pose | None]) -> PoseArrays:
        """From poses of batch shape () in any frame and family. Joints beyond SMPL's are dropped. Hands that a pose lacks are straight, and not
        measured. Betas of another shape space than SMPL's are not taken, and of more than ten only the first ten.
        """
        count = len(poses)
        rotations = np.broadcast_to(np.eye(3), (count, 24, 3, 3)).copy()
        measured, betas = np.zeros((count, 24), bool), np.zeros((count, 10))
        has_betas, there = np.zeros(count, bool), np.array([pose is not None for pose in poses], bool)
        kinds: dict[tuple[str, int], list[int]] = {}
        for i, pose in enumerate(poses):
            if pose is not None:
                kinds.setdefault((pose.frame, pose.num_joints), []).append(i)
        for (frame, joints), places in kinds.items():
            family_of(joints)
            kept = joints if joints == 24 else SHARED
            rotations[places, :kept] = np.stack([np.asarray(poses[i].rotations)[:kept] for i in places])  # type: ignore[union-attr]
            rotations[places, 0] = turn(frame, "camera") @ rotations[places, 0]
            measured[places, :kept] = True
        for i, pose in enumerate(poses):
            if pose is None:
                continue
            if pose.measured is not None:
                kept = 24 if pose.num_joints == 24 else SHARED
                measured[i, :kept] = np.asarray(pose.measured)[:kept]
            space = pose.shape_space or ("SMPL" if pose.num_joints in (SHARED, 24, 52) else "")
            if gives_betas(pose) and space == "SMPL":
                given = np.asarray(pose.betas, np.float64)[:10]
                betas[i, : len(given)], has_betas[i] = given, True
        return cls(rotations, measured, betas, has_betas, there & measured.any(1))


def gives_betas(pose: Pose) -> bool:
    """Whether a pose of batch shape () has betas."""
    return pose.betas is not None and (pose.has_betas is None or bool(pose.has_betas))


@dataclasses.dataclass(frozen=True, eq=False)
class Truths:
    """What N rows say, gathered once. keys, groups: (N,). poses: the first pose of each. extras: of each row."""

    keys: list[str]
    groups: list[str]
    poses: PoseArrays
    extras: list[Mapping[str, Any]]

    __repr__ = one_line

    @classmethod
    def gather(cls, rows: Iterable[Example]) -> Truths:
        """Reads each row once, and keeps no image."""
        keys, groups, poses, extras = [], [], [], []
        for row in rows:
            keys.append(row.id)
            groups.append(row.group)
            poses.append(first_pose(row.poses))
            extras.append(row.extras)
        return cls(keys, groups, PoseArrays.gather(poses), extras)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: np.ndarray) -> Truths:
        """Those at an index (n,)."""
        keys, groups, extras = ([values[i] for i in rows] for values in (self.keys, self.groups, self.extras))
        return Truths(keys, groups, self.poses.take(rows), extras)

    def numbers(self, name: str, *shape: int) -> np.ndarray:
        """(N, *shape) float64, one of the extras. Raises UserError, which names the row, where it is not there or has another shape."""
        found = [np.asarray(extras[name], np.float64) if name in extras else None for extras in self.extras]
        for key, value in zip(self.keys, found):
            if value is None or value.shape != shape:
                raise UserError(
                    f"row {key!r}: the protocol needs {name} of shape {shape} in its extras; found "
                    + ("nothing" if value is None else str(value.shape))
                )
        return np.stack(found)  # type: ignore[arg-type]


def first_pose(poses: Pose) -> Pose | None:
    """The first of a batch (P,) as NumPy arrays, or None."""
    if not len(poses.rotations):
        return None

    def of(value: Any) -> Any:
        return None if value is None else np.asarray(value)[0]

    return Pose(
        of(poses.rotations),
        poses.frame,
        betas=of(poses.betas),
        measured=of(poses.measured),
        has_betas=of(poses.has_betas),
        shape_space=poses.shape_space,
    )

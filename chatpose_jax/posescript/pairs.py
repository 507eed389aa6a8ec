"""Poses with their captions, from the rows of any source, as PoseScript's networks take them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line
from smpl_jax.pose import Pose, stack, to_family, to_frame
from smpl_jax.rotations import axis_angle_to_matrix, matrix_to_axis_angle

Captions = Literal["all", "human", "automatic", "caption", "query"]
KINDS = ("human", "automatic", "caption", "query")
"""Extras of rows that hold captions: PoseScript's human-written and automatic ones, the caption in a row of other data sets, SPG's questions."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """N poses and the captions of each.

    poses: (N, J, 3) float32, as ``axis_angles`` gives them. measured: (N, J) bool. captions: one or more for each pose. keys, groups: of the
    rows. skipped: rows without a pose or a caption.
    """

    poses: np.ndarray
    measured: np.ndarray
    captions: Sequence[tuple[str, ...]]
    keys: Sequence[str]
    groups: Sequence[str]
    skipped: int = 0

    __repr__ = one_line

    def __len__(self) -> int:
        return len(self.poses)


def captions_of(row: Example, captions: Captions = "all") -> tuple[str, ...]:
    """The captions of the first pose of a row: its extras of this kind, or of all ``KINDS``; often none. PoseFix's rows
    (with ``pair_id``) have none, because their texts describe changes of a pose.
    """
    if "pair_id" in row.extras:
        return ()
    kinds = KINDS if captions == "all" else (captions,)
    found: list[str] = []
    for kind in kinds:
        value = row.extras.get(kind, ())
        found += [value] if isinstance(value, str) else list(value)
    return tuple(text for text in found if text.strip())


def pairs(rows: Iterable[Example], *, captions: Captions = "all", joints: int = 52) -> Pairs:
    """The rows that have a pose and captions. Rows with the same pose, which differ only in their conversation, become one
    pair.

    Raises UserError where no row has both.
    """
    poses: list[Pose] = []
    texts: dict[tuple[str, bytes], list[str]] = {}
    first: list[Example] = []
    skipped = 0
    for row in rows:
        found = captions_of(row, captions)
        if not found or not len(row.poses):
            skipped += 1
            continue
        pose = row.poses[0]
        place = (row.group, np.asarray(pose.rotations).tobytes())
        if place in texts:
            texts[place] += found
            continue
        texts[place] = list(found)
        first.append(row)
        poses.append(pose.replace(betas=None, has_betas=None, translation=None, has_translation=None, shape_space=None))
    if not first:
        kinds = " or ".join(map(repr, KINDS)) if captions == "all" else repr(captions)
        raise UserError(
            f"none of {skipped} rows has a pose and a caption. A caption is text in the row's extras, {kinds}: "
            "posescript, cmu, bvh, spg and synthetic write one; a data set that was prepared earlier must be prepared again"
        )
    values, measured = [], []
    by_form: dict[tuple[str, int], list[int]] = {}
    for number, pose in enumerate(poses):
        by_form.setdefault((pose.frame, pose.num_joints), []).append(number)
    for numbers in by_form.values():
        angles, known = axis_angles(stack([poses[number] for number in numbers]), joints)
        values.append(angles)
        measured.append(known)
    order = np.argsort(np.concatenate([*by_form.values()]), kind="stable")
    return Pairs(
        np.concatenate(values)[order],
        np.concatenate(measured)[order],
        [tuple(dict.fromkeys(found)) for found in texts.values()],
        [row.id for row in first],
        [row.group for row in first],
        skipped,
    )


def axis_angles(poses: Pose, joints: int = 52) -> tuple[np.ndarray, np.ndarray]:
    """Poses of batch shape (N,) as PoseScript's networks take them: SMPL-H's joints in AMASS's z-up frame, the root without yaw.

    The root is Rz(θz) Ry(θy) Rx(θx); θz is set to 0. Joints that a family does not have, such as fingers, are the identity.

    Args:
        poses: in any frame and of any family. SMPL's two rigid hands are dropped, because SMPL-H has fingers in their place.
        joints: 52, or 22 for the body without fingers.

    Returns:
        (N, joints, 3) float32 axis-angles in radians of at most π, and (N, joints) bool, the joints that are measured.
    """
    poses = to_frame(poses.replace(translation=None, has_translation=None), "z-up")
    poses = to_family(poses, "smplh" if joints == 52 else "shared")
    rotations = np.array(poses.rotations, np.float32)
    root = rotations[:, 0].astype(np.float64)
    yaw = np.arctan2(root[:, 1, 0], root[:, 0, 0])
    zero = np.zeros_like(yaw)
    back = np.asarray(axis_angle_to_matrix(np.stack([zero, zero, -yaw], -1).astype(np.float32)))
    rotations[:, 0] = back @ root
    measured = np.ones(rotations.shape[:2], bool) if poses.measured is None else np.array(poses.measured)
    return np.array(matrix_to_axis_angle(rotations), np.float32), measured


@dataclasses.dataclass(frozen=True, eq=False)
class PoseInput:
    """What a network sees of a pose: the joints that are measured and that were measured in its training data. The others get a constant, the
    mean of its training data, so they carry no information.

    fill: (J, 3) float32 axis-angles, this constant. seen: (J,) bool, joints that some training pose had measured.
    """

    fill: np.ndarray
    seen: np.ndarray

    __repr__ = one_line

    @classmethod
    def of(cls, found: Pairs) -> PoseInput:
        """For training on these pairs. The mean counts measured poses alone; a joint that none has measured is the identity."""
        counts = found.measured.sum(0)[:, None]
        total = np.where(found.measured[..., None], found.poses, 0).sum(0, dtype=np.float64)
        return cls((total / np.maximum(counts, 1)).astype(np.float32), counts[:, 0] > 0)

    @property
    def joints(self) -> int:
        return len(self.fill)

    def __call__(self, poses: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """(N, J, 3) float32 from what ``axis_angles`` gives."""
        return np.where((measured & self.seen)[..., None], poses, self.fill)

"""``Pose``, the class of body poses for data rows, losses, pose heads, replies and files.

The functions take and return poses of any batch shape. For poses of NumPy arrays they compute with NumPy; for poses of JAX arrays with JAX, also
under ``jit``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from smpl_jax import body as bodies
from smpl_jax.body import SHAPE_SPACES, BodyModel
from smpl_jax.frames import Frame, turn
from smpl_jax.printing import one_line

Family = Literal["shared", "smpl", "smplh", "smplx"]

PARTS = {"body": 22, "rigid hands": 2, "jaw and eyes": 3, "fingers": 30}
"""Number of joints of each part. "body" is shared by all families, with the root first. "fingers" are those of the left hand, then those of the
right hand."""
FAMILIES: dict[Family, tuple[str, ...]] = {
    "shared": ("body",),
    "smpl": ("body", "rigid hands"),
    "smplh": ("body", "fingers"),
    "smplx": ("body", "jaw and eyes", "fingers"),
}
"""The parts of each family, in the order of the joints."""
JOINTS: dict[Family, int] = {name: sum(PARTS[part] for part in parts) for name, parts in FAMILIES.items()}
"""Number of joints of each family: 22, 24, 52 and 55."""
SHARED = PARTS["body"]
HANDS = PARTS["fingers"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rotations", "betas", "translation", "measured", "has_betas", "has_translation"],
    meta_fields=["frame", "shape_space"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Pose:
    """Poses of one body family in one frame, with any batch shape (...). A pytree of NumPy or JAX arrays; the frame and the
    shape space are static.

    The constructor checks nothing, because JAX also calls it with values that are not arrays. Use ``check``.

    rotations: (..., J, 3, 3), relative to the parents, joint 0 the global orientation in ``frame``; J is one of ``JOINTS``.
    frame: "camera" (x right, y down, z away), "model" (y up) or "z-up"; see ``smpl_jax.frames``.
    betas: (..., n) shape coefficients, or None if the shape is unknown. The same numbers mean another shape in another shape space.
    translation: (..., 3) metres in ``frame``, or None. As in SMPL, it is added after the root rotation about the pelvis.
    measured: (..., J) bool, the joints that were measured or estimated. The others have filled-in values and count in no loss or metric. None
        means all.
    has_betas, has_translation: (...) bool, which poses of a batch have betas or a translation; the others have zeros there. None means all,
        if the field itself is not None.
    shape_space: what the betas belong to, ``BodyModel.shape_space`` of the body that they were fitted with: "SMPL" (SMPL-H's too), "SMPL-X" or
        the name of another body. None if unknown; then the number of joints alone tells SMPL's from SMPL-X's.
    """

    rotations: Any
    frame: Frame
    betas: Any = None
    translation: Any = None
    measured: Any = None
    has_betas: Any = None
    has_translation: Any = None
    shape_space: str | None = None

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
        """The body family with this number of joints. Raises ValueError if there is none."""
        return family_of(self.num_joints)

    @property
    def hands(self) -> Any:
        """(..., 30, 3, 3), the finger joints, left hand first; None for families without fingers."""
        return self.rotations[..., -HANDS:, :, :] if self.num_joints >= SHARED + HANDS else None

    def __len__(self) -> int:
        """Number of poses along the first batch axis."""
        if not self.shape:
            raise TypeError("a single pose has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Pose]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Pose:
        """The poses at an index of the batch axes."""
        return jax.tree.map(lambda x: x[index], self)

    def replace(self, **changes: Any) -> Pose:
        """The same pose with some fields changed."""
        return dataclasses.replace(self, **changes)


def family_of(num_joints: int) -> Family:
    """The family with this number of joints. Raises a ValueError that lists the families if there is none."""
    for name, count in JOINTS.items():
        if count == num_joints:
            return name
    known = ", ".join(f"{count} ({name})" for name, count in JOINTS.items())
    raise ValueError(f"expected a number of joints of {known}; found {num_joints}")


def check(pose: Pose) -> Pose:
    """Returns a valid pose unchanged. For poses from data or from a user. It reads values, so it does not work under ``jit``.

    Raises:
        ValueError: the shapes of the fields do not agree, no family has this number of joints, the frame is unknown, numbers are not finite,
            or a matrix is not a rotation (R Rᵀ = 1 within 1e-3, det R = 1). Joints that were not measured must be rotations too.
    """
    check_shapes(pose)
    for *at, joint in no_rotations(pose.rotations):
        where = f" of pose {', '.join(map(str, at))}" if at else ""
        raise ValueError(
            f"rotations must be rotation matrices (R Rᵀ = 1 within 1e-3, det R = 1); joint {joint}{where} is not one"
        )
    return pose


def no_rotations(matrices: Any, within: float = 1e-3) -> list[list[int]]:
    """Indices (...) of the matrices (..., 3, 3) that are not rotations: R Rᵀ is not 1 within this number, or det R is negative."""
    matrices = np.asarray(matrices)
    apart = np.abs(matrices @ matrices.swapaxes(-1, -2) - np.eye(3)).max(axis=(-1, -2), initial=0)
    return np.argwhere((apart > within) | (np.linalg.det(matrices) < 0)).tolist()


def check_shapes(pose: Pose) -> Pose:
    """``check`` without the test that matrices are rotations. For predictions of a network, which are less exact than data."""
    if not isinstance(pose, Pose):
        raise ValueError(f'expected a smpl_jax.Pose, found {type(pose).__name__}; Pose(rotations, "camera") makes one')
    turn(pose.frame)
    if not isinstance(pose.shape_space, str | None):
        raise ValueError(f"shape_space must be the name of a shape space or None, found {pose.shape_space!r:.60}")
    rotations = _shaped("rotations", pose.rotations, (..., "J", 3, 3), jnp.floating)
    family_of(rotations.shape[-3])
    batch = rotations.shape[:-3]
    fields: list[tuple[str, tuple[Any, ...], Any]] = [
        ("betas", (*batch, "n"), jnp.floating),
        ("translation", (*batch, 3), jnp.floating),
        ("measured", rotations.shape[:-2], np.bool_),
        ("has_betas", batch, np.bool_),
        ("has_translation", batch, np.bool_),
    ]
    for name, shape, kind in fields:
        if getattr(pose, name) is not None:
            _shaped(name, getattr(pose, name), shape, kind)
    for name in ("betas", "translation"):
        if getattr(pose, f"has_{name}") is not None and getattr(pose, name) is None:
            raise ValueError(f"has_{name} is given, but {name} is None")
    return pose


def _shaped(name: str, value: Any, shape: tuple[Any, ...], kind: Any) -> np.ndarray:
    """Returns a finite array of the given shape, in which a string matches any size. Raises ValueError otherwise."""
    array = np.asarray(value)
    tail = shape[1:] if shape[:1] == (...,) else shape
    fits = array.ndim >= len(tail) and (len(tail) < len(shape) or array.ndim == len(tail))
    found = array.shape[array.ndim - len(tail) :]
    if not fits or not all(isinstance(n, str) or n == m for n, m in zip(tail, found)):
        expected = ", ".join("..." if n is ... else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({expected}), found {array.dtype} {array.shape}")
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(
            f"{name} must be {'bool' if kind is np.bool_ else 'floating-point numbers'}, found {array.dtype}"
        )
    if kind is not np.bool_ and not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers, found NaN or infinities")
    return array


def to_frame(pose: Pose, frame: Frame, body: BodyModel | None = None) -> Pose:
    """The same poses in another frame: changes the root rotation and the translation.

    Args:
        pose: in any frame.
        frame: "camera", "model" or "z-up".
        body: the body of the poses; needed only if they have a translation. SMPL rotates the root about the pelvis, which is not at the
            origin, so a translation must rotate about the pelvis p of the rest pose: t' = T (t + p) - p. Then the vertices and joints of the
            result are exactly the rotated ones of ``pose``.

    Raises:
        ValueError: an unknown frame, or a pose with a translation and no body.
    """
    matrix = turn(pose.frame, frame)
    if frame == pose.frame:
        return pose
    if pose.translation is not None and body is None:
        raise ValueError(
            f"a translation changes its frame about the pelvis, so the body is needed: to_frame(pose, {frame!r}, body); "
            "or drop the translation: pose.replace(translation=None, has_translation=None)"
        )
    xp = _numpy(pose)
    turned = xp.asarray(matrix, pose.rotations.dtype)

    def apply(
        vectors: Any,
    ) -> Any:  # a broadcast product is exact, because T contains only 0 and ±1; a matmul rounds on accelerators
        return (turned * vectors[..., None, :]).sum(-1)

    root = apply(pose.rotations[..., 0, :, :].swapaxes(-1, -2)).swapaxes(-1, -2)
    rotations = xp.concatenate([root[..., None, :, :], pose.rotations[..., 1:, :, :]], -3)
    translation = pose.translation
    if translation is not None and body is not None:
        pelvis = xp.asarray(bodies.pelvis(body, _betas_of(pose, body)))
        moved = (apply(translation + pelvis) - pelvis).astype(translation.dtype)
        has = pose.has_translation
        translation = moved if has is None else xp.where(has[..., None], moved, 0).astype(translation.dtype)
    return pose.replace(rotations=rotations, frame=frame, translation=translation)


def to_family(pose: Pose, name: Family) -> Pose:
    """The same poses with the joints of another body family.

    Parts that both families have are kept: the 22 joints of the body always, the fingers between SMPL-H and SMPL-X. Parts that only the new
    family has are set to the identity (so fingers are straight) and marked as not measured. Parts that only the old family has are dropped,
    including SMPL's two rigid hands. Betas are dropped between the shape space of SMPL and SMPL-H and that of SMPL-X; betas of an unknown space,
    or of another body, count as those of their family. The translation is kept; it is exact up to the distance between the pelvises of the two
    rest poses.

    Raises:
        ValueError: the family is unknown, or the pose belongs to none.
    """
    if name not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(map(repr, FAMILIES))}; found {name!r}")
    source = pose.family
    ours = pose.shape_space if pose.shape_space in SHAPE_SPACES.values() else SHAPE_SPACES.get(source)
    theirs = SHAPE_SPACES.get(name)
    if ours and theirs and ours != theirs:
        pose = pose.replace(betas=None, has_betas=None, shape_space=None)
    if name == source:
        return pose
    xp, dtype = _numpy(pose), pose.rotations.dtype
    ends = np.cumsum([PARTS[part] for part in FAMILIES[source]]).tolist()
    places = {part: slice(end - PARTS[part], end) for part, end in zip(FAMILIES[source], ends)}
    measured = pose.measured
    if measured is None and not set(FAMILIES[name]) <= set(places):
        measured = xp.ones((*pose.shape, pose.num_joints), bool)
    rotations, known = [], []
    for part in FAMILIES[name]:
        shape = (*pose.shape, PARTS[part])
        kept = part in places
        rest = xp.broadcast_to(xp.eye(3, dtype=dtype), (*shape, 3, 3))
        rotations.append(pose.rotations[..., places[part], :, :] if kept else rest)
        if measured is not None:
            known.append(measured[..., places[part]] if kept else xp.zeros(shape, bool))
    return pose.replace(
        rotations=xp.concatenate(rotations, -3), measured=None if measured is None else xp.concatenate(known, -1)
    )


_TWINS: dict[str, list[int]] = {
    "body": [0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20],
    "rigid hands": [1, 0],
    "jaw and eyes": [0, 2, 1],
    "fingers": [*range(HANDS // 2, HANDS), *range(HANDS // 2)],
}
"""For each joint of a part, its counterpart on the other side."""


def mirror_pose(pose: Pose) -> Pose:
    """The poses as a mirror shows them: left and right change places, and x changes its sign, in any frame.

    Betas are kept, because bodies are taken to be symmetric. The translation is exact up to the distance of the rest pose's pelvis from x = 0
    (a few millimetres for SMPL).

    Raises ValueError if the pose belongs to no family.
    """
    starts = itertools.accumulate([PARTS[part] for part in FAMILIES[pose.family]], initial=0)
    twins = [start + twin for start, part in zip(starts, FAMILIES[pose.family]) for twin in _TWINS[part]]
    xp, side = _numpy(pose), np.array([-1, 1, 1], np.float32)
    rotations = pose.rotations[..., twins, :, :] * xp.asarray(np.outer(side, side), pose.rotations.dtype)
    return pose.replace(
        rotations=rotations,
        translation=None if pose.translation is None else pose.translation * xp.asarray(side, pose.translation.dtype),
        measured=None if pose.measured is None else pose.measured[..., twins],
    )


def to_betas(pose: Pose, count: int) -> Pose:
    """The same poses with `count` betas, zero-padded or truncated. SMPL orders betas by their effect on the body, so truncation keeps the most
    important ones. A pose without betas is returned unchanged."""
    if pose.betas is None:
        return pose
    more = count - pose.betas.shape[-1]
    betas = pose.betas[..., :count]
    if more > 0:
        betas = _numpy(pose).pad(betas, [(0, 0)] * (betas.ndim - 1) + [(0, more)])
    return pose.replace(betas=betas)


def for_body(pose: Pose, body: BodyModel) -> dict[str, Any]:
    """Arguments of ``smpl_jax.joints``, ``vertices`` and ``forward``: ``smpl_jax.joints(body, **for_body(pose, body))``.

    Converts the poses to the body's family (see ``to_family``), and passes betas and translation on.

    Returns:
        ``rotations`` (..., J, 3, 3), and ``betas`` (..., n) and ``translation`` (..., 3) or None.

    Raises:
        ValueError: the body belongs to no family; or the betas are not the body's: there are more than it was loaded with
            (``load_body(path, num_betas=…)`` loads more, ``to_betas`` truncates), or they are of another shape space.
    """
    return {
        "rotations": _fit(pose, body).rotations,
        "betas": _betas_of(pose, body),
        "translation": pose.translation,
    }


def _fit(pose: Pose, body: BodyModel) -> Pose:
    if pose.num_joints == body.num_joints:
        return pose
    if body.num_joints not in JOINTS.values():
        raise ValueError(
            f"body {body.name!r} belongs to no family, so poses are not converted for it; "
            f"expected a pose of {body.num_joints} joints, found {pose.num_joints}"
        )
    return to_family(pose, family_of(body.num_joints))


def _betas_of(pose: Pose, body: BodyModel) -> Any:
    """The betas of a pose for a body. Raises ValueError if they do not belong to this body."""
    if pose.betas is None:
        return None
    spaces: list[str | None] = [pose.shape_space, body.shape_space]
    if pose.shape_space is None and pose.num_joints != body.num_joints:
        spaces = [SHAPE_SPACES.get(family_of(count)) for count in (pose.num_joints, body.num_joints)]
    ours, theirs = spaces
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"the pose has betas of {ours}, which mean another shape for body {body.name!r} of {theirs}; "
            "pose.replace(betas=None, has_betas=None) has the average shape"
        )
    count = pose.betas.shape[-1]
    if count > body.num_betas:
        raise ValueError(
            f"the pose has {count} betas, body {body.name!r} was loaded with {body.num_betas}: load more with "
            f"load_body(path, num_betas={count}), or truncate with to_betas(pose, {body.num_betas})"
        )
    return pose.betas


def known(pose: Pose) -> Any:
    """(..., J) bool, the measured joints: ``measured``, or all if that is None."""
    return _numpy(pose).ones(pose.rotations.shape[:-2], bool) if pose.measured is None else pose.measured


def placed(measured: Any, parents: Sequence[int]) -> Any:
    """The joints whose position relative to the root is known, because all their ancestors in the tree were measured.

    Args:
        measured: (..., J) bool.
        parents: (J,), -1 for the root; a parent precedes its children, as in ``BodyModel.parents``.

    Returns:
        (..., J) bool; always True for the root.
    """
    found = [_numpy(measured).ones_like(measured[..., 0])]
    for parent in parents[1:]:
        found.append(found[parent] & measured[..., parent])
    return _numpy(measured).stack(found, -1)


def unmeasured(shape: Sequence[int], family: Family = "smpl", frame: Frame = "camera") -> Pose:
    """Placeholder poses of a given batch shape: identity rotations, with no joint measured. NumPy arrays."""
    rotations = np.broadcast_to(np.eye(3, dtype=np.float32), (*shape, JOINTS[family], 3, 3)).copy()
    return Pose(rotations, frame, measured=np.zeros((*shape, JOINTS[family]), bool))


def complete(pose: Pose, num_betas: int = 10) -> Pose:
    """The same poses with no field None, so that all batches have the same structure. Missing fields are zeros, and the ``has_…`` fields say so.

    Args:
        pose: any pose.
        num_betas: number of betas of the result; if ``pose`` has fewer, the others are zeros.

    Raises:
        ValueError: the pose has more betas; ``to_betas`` truncates them.
    """
    width = 0 if pose.betas is None else pose.betas.shape[-1]
    if width > num_betas:
        raise ValueError(
            f"expected at most {num_betas} betas, found {width}; to_betas(pose, {num_betas}) truncates them"
        )
    return _fill(pose, set(_FIELDS), num_betas)


_SIZES: dict[str, Callable[[Pose, int], int]] = {
    "betas": lambda pose, num_betas: num_betas,
    "translation": lambda pose, num_betas: 3,
    "measured": lambda pose, num_betas: pose.num_joints,
}


def _fill(pose: Pose, names: set[str], num_betas: int) -> Pose:
    """The pose with the named optional fields filled in if they are None."""
    xp, changes = _numpy(pose), {}
    pose = to_betas(pose, num_betas)
    for name in names:
        there = getattr(pose, name) is not None
        if name.startswith("has_"):
            if not there:
                changes[name] = xp.full(pose.shape, getattr(pose, name.removeprefix("has_")) is not None)
        elif not there:
            size = (*pose.shape, _SIZES[name](pose, num_betas))
            changes[name] = xp.ones(size, bool) if name == "measured" else xp.zeros(size, pose.rotations.dtype)
    return pose.replace(**changes)


def stack(poses: Sequence[Pose], axis: int = 0) -> Pose:
    """Stacks poses of one batch shape, frame and family along a new batch axis.

    If only some poses have betas, a translation or ``measured``, the field is filled in for the others, and ``has_betas``, ``has_translation`` or
    ``measured`` mark them. Betas are zero-padded to the largest number. A field that no pose has stays None. The shape space of the result is
    unknown if that of any betas is.

    Raises:
        ValueError: there are no poses, an item is not a pose, or the poses have different frames, families, shape spaces or batch shapes.
    """
    return _join(poses, axis, "stack", lambda pose: pose.shape)


def concatenate(poses: Sequence[Pose], axis: int = 0) -> Pose:
    """Concatenates poses along an existing batch axis; otherwise like ``stack``."""
    return _join(poses, axis, "concatenate", lambda pose: pose.shape[:axis] + pose.shape[axis:][1:])


def _join(poses: Sequence[Pose], axis: int, how: str, alike: Callable[[Pose], tuple[int, ...]]) -> Pose:
    if not len(poses):
        raise ValueError(f"{how} needs at least one pose")
    for pose in poses:
        if not isinstance(pose, Pose):
            raise ValueError(
                f'{how} takes smpl_jax.Pose, found {type(pose).__name__}; Pose(rotations, "camera") makes one'
            )
    first = poses[0]
    least = 0 if how == "stack" else 1
    if not 0 <= axis <= len(first.shape) - least:
        raise ValueError(f"axis must be one of the batch axes, 0 to {len(first.shape) - least}; found {axis}")
    for pose in poses[1:]:
        for what, a, b in (
            ("frames", first.frame, pose.frame),
            ("numbers of joints", first.num_joints, pose.num_joints),
            ("batch shapes", alike(first), alike(pose)),
        ):
            if a != b:
                hint = {"frames": "; to_frame changes them", "numbers of joints": "; to_family changes them"}
                raise ValueError(f"{how} takes poses of equal {what}, found {a} and {b}{hint.get(what, '')}")
    names = {name for name in _FIELDS if any(getattr(pose, name) is not None for pose in poses)}
    for name in ("betas", "translation"):
        if name in names and any(getattr(pose, name) is None for pose in poses):
            names.add(f"has_{name}")
    width = max((pose.betas.shape[-1] for pose in poses if pose.betas is not None), default=0)
    spaces = {pose.shape_space for pose in poses if pose.betas is not None}
    if len(named := sorted(space for space in spaces if space is not None)) > 1:
        raise ValueError(f"{how} takes poses of one shape space, found betas of {' and '.join(named)}")
    space = spaces.pop() if len(spaces) == 1 else None
    xp = _numpy(poses)
    filled = [_fill(pose, names, width).replace(shape_space=space) for pose in poses]
    return jax.tree.map(lambda *leaves: getattr(xp, how)(leaves, axis), *filled)


_FIELDS = ("betas", "translation", "measured", "has_betas", "has_translation")


def _numpy(poses: Any) -> ModuleType:
    """``jax.numpy`` if any array is a JAX array, else ``numpy``."""
    return jnp if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(poses)) else np

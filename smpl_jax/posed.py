"""A pose together with a body: joints, mesh, rendered images and files of one pose."""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smpl_jax import body as bodies
from smpl_jax import rotations
from smpl_jax.body import BodyModel
from smpl_jax.frames import describe_frame
from smpl_jax.pose import Pose, check_shapes, for_body
from smpl_jax.pose_writers import write_poses
from smpl_jax.printing import one_line

SUFFIXES = (".glb", ".obj", ".npz", ".png")
SIZES = (16, 4096)
"""Smallest and largest side of a rendered image, in pixels."""


def _copy(x: Any) -> np.ndarray:
    """Read-only. A view would hold the buffer of a device's array."""
    copy = np.array(x)
    copy.setflags(write=False)
    return copy


@dataclasses.dataclass(frozen=True, eq=False)
class PosedBody:
    """One pose on one body. Without betas the body has the average shape; without a translation it is at the origin.

    pose: a single pose (batch shape ()), in any frame and family.
    body: any body of the SMPL family. Joints that the pose lacks are in the rest pose; joints that the body lacks are ignored (``pose.to_family``).

    Raises:
        ValueError: the pose's arrays do not fit each other or are not finite, there are several poses, the body is not a ``BodyModel``, or
            the betas do not belong to this body (``pose.for_body``).
    """

    pose: Pose
    body: BodyModel

    __repr__ = one_line

    def __post_init__(self) -> None:
        if not isinstance(self.body, BodyModel):
            found = f"{type(self.body).__name__}: {' '.join(repr(self.body).split()):.100}"
            raise ValueError(f"body must be a smpl_jax.BodyModel, as smpl_jax.load_body gives it, found {found}")
        pose = check_shapes(self.pose)
        if pose.shape:
            raise ValueError(f"a PosedBody shows one pose, found a batch of shape {pose.shape}; index it: pose[0]")
        pose = jax.tree.map(_copy, pose)
        for name in ("betas", "translation"):  # a pose of a batch may lack a field that others have
            if (has := getattr(pose, f"has_{name}")) is not None:
                pose = pose.replace(**{name: getattr(pose, name) if has else None, f"has_{name}": None})
        object.__setattr__(self, "pose", pose)
        for_body(pose, self.body)

    @property
    def matrices(self) -> np.ndarray:
        """(J, 3, 3) float32, the pose's rotations relative to the parents; joint 0 is the global orientation in ``pose.frame``."""
        return np.asarray(self.pose.rotations, np.float32)

    @functools.cached_property
    def axis_angle(self) -> np.ndarray:
        """(J, 3) float32, radians."""
        return _copy(_axis_angle(self.matrices))

    @functools.cached_property
    def rotation_6d(self) -> np.ndarray:
        """(J, 6) float32: the first two columns of each matrix, one after the other."""
        return _copy(rotations.matrix_to_rotation_6d(self.matrices, order="columns"))

    @functools.cached_property
    def joints(self) -> np.ndarray:
        """(K, 3) float32, metres in ``pose.frame``, in the order of the body's ``joint_names``."""
        return _copy(_joints(self.body, for_body(self.pose, self.body)))

    @functools.cached_property
    def vertices(self) -> np.ndarray:
        """(V, 3) float32, metres in ``pose.frame``."""
        return _copy(_vertices(self.body, for_body(self.pose, self.body)))

    def render(self, size: int = 512, views: Sequence[str] = ("front",)) -> np.ndarray:
        """Renders an image (H, W, 3) uint8 with one square panel per view, ``size`` (16 … 4096) pixels wide. The body is always centred.

        views: some of "front" (what the camera sees), "three_quarter", "side", "back" and "other_side".

        Raises:
            ValueError: the size or a view is invalid.
        """
        from smpl_jax.render import render_body

        names = tuple(views) if isinstance(views, list | tuple) else (views,)
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"views must be names, as ('front', 'side'), found {views!r:.100}")
        fitted = for_body(self.pose, self.body)
        return render_body(
            self.body, fitted["rotations"], fitted["betas"], size=_size(size), views=names, frame=self.pose.frame
        )

    def save(self, path: str | os.PathLike[str], *, skinned: bool = True) -> Path:
        """Writes ``.glb`` (mesh in the colours of ``render``, skin and named joints), ``.obj``, ``.npz`` (``write_poses``, with joints) or ``.png``.

        skinned: True writes the rest mesh and the posed skeleton to a ``.glb``; programs without skinning show the rest pose. False writes
            the posed mesh only, which every viewer shows in its pose.

        Raises:
            ValueError: the path has another suffix; or, for ``.npz``, the matrices are not rotations.
        """
        from smpl_jax import export, render

        if not isinstance(path, str | os.PathLike):
            found = f"{type(path).__name__}: {path!r:.100}"
            raise ValueError(f"path must be a path that ends in {', '.join(SUFFIXES)}, found {found}")
        if not isinstance(skinned, bool | np.bool_):
            raise ValueError(f"skinned must be True or False, found {skinned!r:.100}")
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise ValueError(
                f"{path}: expected a path that ends in {', '.join(SUFFIXES)}; found {path.suffix or 'no suffix'}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        frame, faces = self.pose.frame, np.asarray(self.body.faces)
        if suffix == ".glb" and skinned:
            colors = render.clothing_colors(self.body)
            export.write_skinned_glb(path, self.body, **for_body(self.pose, self.body), frame=frame, colors=colors)
        elif suffix == ".glb":
            export.write_glb(path, self.vertices, faces, frame=frame, colors=render.clothing_colors(self.body))
        elif suffix == ".obj":
            export.write_obj(path, self.vertices, faces, frame=frame)
        elif suffix == ".npz":
            shown = None if self.pose.betas is None else self.body.name  # betas mean nothing without their body
            write_poses(path, self.pose, joints=self.joints, joint_names=self.body.joint_names, body=shown)
        else:
            render.save_png(path, self.render(views=("front", "side")))
        return path

    def to_json(self) -> dict[str, Any]:
        """The frame, the body's name, axis-angle (J, 3), the body's joints (K, 3), and betas and translation if the pose has them. Numbers
        have the shortest decimals that read back as the same float32."""
        more = {name: getattr(self.pose, name) for name in ("betas", "translation")}
        return {
            "frame": describe_frame(self.pose.frame),
            "body": self.body.name,
            "axis_angle": _decimals(self.axis_angle),
            "joint_names": list(self.body.joint_names),
            "joints": _decimals(self.joints),
            **{name: _decimals(value) for name, value in more.items() if value is not None},
        }


_axis_angle = jax.jit(rotations.matrix_to_axis_angle)


@jax.jit
def _joints(body: BodyModel, arguments: dict[str, Any]) -> jax.Array:
    return bodies.joints(body, **arguments)


@jax.jit
def _vertices(body: BodyModel, arguments: dict[str, Any]) -> jax.Array:
    return bodies.vertices(body, **arguments)


def _decimals(array: np.ndarray) -> list[Any]:
    """Nested lists of the shortest decimals that read back as the same float32: 0.1 instead of 0.10000000149011612 (``tolist``)."""
    return np.asarray(array, np.float32).astype(str).astype(float).tolist()


def _size(value: Any) -> int:
    try:
        size = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        size = None
    if size is None or not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size must be a whole number in [{SIZES[0]}, {SIZES[1]}], found {value!r:.100}")
    return size

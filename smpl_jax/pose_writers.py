"""Writes poses to files: this package's npz, AMASS's two formats, plain axis-angle. ``smpl_jax.read_poses`` reads all of them.

Files are written atomically.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from numpy.typing import ArrayLike

from smpl_jax import rotations
from smpl_jax._files import write_whole
from smpl_jax.body import SHAPE_SPACES
from smpl_jax.frames import describe_frame
from smpl_jax.pose import HANDS, JOINTS, SHARED, Pose, check, to_betas
from smpl_jax.poses import READ

FileKind = Literal["smpl_jax", "amass", "axis-angle"]
_AMASS_BETAS = 16
_GENDERS = ("female", "male", "neutral")


def write_poses(
    path: str | os.PathLike[str],
    pose: Pose,
    layout: FileKind = "smpl_jax",
    *,
    gender: str | None = None,
    rate: float | None = None,
    joints: ArrayLike | None = None,
    joint_names: Sequence[str] | None = None,
    body: str | None = None,
    beside: Mapping[str, ArrayLike] | None = None,
) -> Path:
    """Writes poses for NumPy and for other programs: ``np.load(path, allow_pickle=False)``.

    Layouts:

    * "smpl_jax", ``.npz``: ``axis_angle`` (..., J, 3) radians, ``matrices`` (..., J, 3, 3), ``rotation_6d`` (..., J, 6) with
      ``rotation_6d_order`` ("columns": first column, then second), the name of the ``frame``, the other fields of the pose that are not None
      (``shape_space`` beside ``betas``) under their names, and ``joints``, ``joint_names``, ``body`` and the arrays of ``beside`` if given.
    * "amass", ``.npz``, poses of batch shape (T,) in the frame "z-up". SMPL-H's 52 joints are written as in AMASS's SMPL+H release (``poses``
      (T, 156), ``trans``, ``betas`` (16,), ``dmpls``, ``gender``, ``mocap_framerate``), SMPL-X's 55 joints as in its SMPL-X release (``poses``
      (T, 165), its parts ``root_orient`` … ``pose_eye``, ``surface_model_type``, ``mocap_frame_rate`` …). These formats always have betas, a
      translation and, for SMPL-H, soft tissue (``dmpls``). Fields that the pose lacks are zeros; ``has_betas``, ``has_translation`` and
      ``measured`` mark them, but other programs do not read these flags.
    * "axis-angle", ``.npy``: (..., 3 J) float32 radians and nothing else. The reader has to know the frame.

    Args:
        path: the file to write; its suffix must be the layout's.
        pose: any pose whose matrices are rotations.
        layout: one of the above.
        gender: "female", "male" or "neutral": gender of the body that the betas belong to; "amass" needs it.
        rate: poses per second; "amass" needs it.
        joints: (..., K, 3) metres in the pose's frame, with their K ``joint_names``; body: name of the body of these joints and the betas.
            For "smpl_jax" only.
        beside: other arrays of numbers or text about these poses, by name, for "smpl_jax" only. ``read_poses`` lists them as unused, so their names
            must not be those of arrays that it reads.

    Returns:
        The path.

    Raises:
        ValueError: the pose is invalid, the layout cannot store it, or a required argument is missing; the message says what to do.
    """
    check(pose)
    if layout not in get_args(FileKind):
        raise ValueError(f"layout must be one of {', '.join(map(repr, get_args(FileKind)))}; found {layout!r}")
    suffix = ".npy" if layout == "axis-angle" else ".npz"
    if Path(path).suffix.lower() != suffix:
        raise ValueError(f"{path}: a file of layout {layout!r} must end in {suffix}")
    given: dict[str, Any] = {"gender": gender, "rate": rate, "joints": joints, "joint_names": joint_names, "body": body}
    given["beside"] = beside
    taken = {"smpl_jax": ("joints", "joint_names", "body", "beside"), "amass": ("gender", "rate"), "axis-angle": ()}[
        layout
    ]
    if foreign := [name for name, value in given.items() if value is not None and name not in taken]:
        raise ValueError(f"the layout {layout!r} cannot store {', '.join(foreign)}")
    if 0 in pose.shape:
        raise ValueError(f"{path}: expected at least one pose, found the batch shape {pose.shape}")
    pose = jax.tree.map(np.asarray, pose)
    if layout == "axis-angle":
        return _write_axis_angle(path, pose)
    arrays = _amass(pose, gender, rate) if layout == "amass" else _ours(pose, given)
    return write_whole(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def _ours(pose: Pose, given: dict[str, Any]) -> dict[str, np.ndarray]:
    matrices = np.asarray(pose.rotations, np.float32)
    arrays = {
        "axis_angle": _axis_angle(pose),
        "matrices": matrices,
        "rotation_6d": np.asarray(rotations.matrix_to_rotation_6d(matrices, order="columns"), np.float32),
        "rotation_6d_order": np.array("columns"),
        "frame": np.array(describe_frame(pose.frame)),
    }
    for name in ("betas", "translation", "measured", "has_betas", "has_translation"):
        if (value := getattr(pose, name)) is not None:
            arrays[name] = value.astype(bool if value.dtype == bool else np.float32)
    if pose.betas is not None and pose.shape_space is not None:
        arrays["shape_space"] = np.array(pose.shape_space)
    if given["joints"] is not None:
        arrays["joints"] = np.asarray(given["joints"], np.float32)
    if given["joint_names"] is not None:
        arrays["joint_names"] = np.array(list(given["joint_names"]), np.str_)
    if given["body"] is not None:
        arrays["body"] = np.array(given["body"])
    beside = {name: np.asarray(value) for name, value in (given["beside"] or {}).items()}
    if clash := sorted(beside.keys() & (READ | arrays.keys())):
        raise ValueError(f"beside has {', '.join(clash)}, which would be read as part of the poses; choose other names")
    return arrays | beside


def _amass(pose: Pose, gender: str | None, rate: float | None) -> dict[str, Any]:
    if pose.num_joints not in (JOINTS["smplh"], JOINTS["smplx"]):
        raise ValueError(
            f"AMASS stores poses of SMPL-H (52 joints) or SMPL-X (55), found {pose.num_joints} joints ({pose.family}); "
            "to_family(pose, 'smplh') adds straight fingers"
        )
    space = SHAPE_SPACES[pose.family]
    if pose.betas is not None and pose.shape_space not in (None, space):
        raise ValueError(
            f"AMASS stores betas of {space} for {pose.num_joints} joints, found betas of {pose.shape_space}; "
            "pose.replace(betas=None, has_betas=None) drops them"
        )
    if pose.frame != "z-up":
        raise ValueError(f"AMASS uses the frame 'z-up', found {pose.frame!r}; to_frame(pose, 'z-up', body) changes it")
    if len(pose.shape) != 1 or not pose.shape[0]:
        raise ValueError(
            f"AMASS stores a sequence of batch shape (T,), found {pose.shape}; pose[None] is a sequence of one pose"
        )
    if gender not in _GENDERS:
        raise ValueError(f"the layout 'amass' needs gender, one of {', '.join(_GENDERS)}; found {gender!r}")
    number = isinstance(rate, int | float | np.number) and not isinstance(rate, bool)
    if not number or not 0 < float(rate or 0) < math.inf:
        raise ValueError(f"the layout 'amass' needs rate, a positive number of poses per second; found {rate!r}")
    size, poses = pose.shape[0], _axis_angle(pose).reshape(*pose.shape, -1).astype(np.float64)
    trans = np.zeros((size, 3)) if pose.translation is None else pose.translation.astype(np.float64)
    betas, extra = np.zeros(_AMASS_BETAS), {}
    if pose.betas is not None:
        if (pose.betas != pose.betas[:1]).any() or (pose.has_betas is not None and not pose.has_betas.all()):
            raise ValueError("AMASS stores the same betas for all poses of a file; found different betas")
        betas = to_betas(pose, max(_AMASS_BETAS, pose.betas.shape[-1])).betas[0].astype(np.float64)
    else:
        extra["has_betas"] = np.array(False)
    if pose.translation is None:
        extra["has_translation"] = np.array(False)
    extra |= {name: value for name in ("measured", "has_translation") if (value := getattr(pose, name)) is not None}
    arrays = {"trans": trans, "gender": np.array(gender), "betas": betas, "poses": poses} | extra
    if pose.num_joints == JOINTS["smplh"]:
        return arrays | {"mocap_framerate": np.float64(rate), "dmpls": np.zeros((size, 8))}
    ends = 3 * np.cumsum([1, SHARED - 1, 1, 2, HANDS])
    parts = np.split(poses, ends[:-1], axis=1)
    return arrays | {
        "surface_model_type": np.array("smplx"),
        "mocap_frame_rate": np.float64(rate),
        "mocap_time_length": np.float64(size / float(rate)),  # type: ignore[arg-type]
        "num_betas": np.array(len(betas)),
        **dict(zip(("root_orient", "pose_body", "pose_jaw", "pose_eye", "pose_hand"), parts)),
    }


def _write_axis_angle(path: str | os.PathLike[str], pose: Pose) -> Path:
    optional = ("betas", "has_betas", "translation", "has_translation", "measured")
    if lost := [name for name in optional if getattr(pose, name) is not None]:
        none = ", ".join(f"{name}=None" for name in lost)
        raise ValueError(
            f"the layout 'axis-angle' stores only rotations and would lose {', '.join(lost)}; "
            f"drop them with pose.replace({none})"
        )
    array = _axis_angle(pose).reshape(*pose.shape, -1)
    return write_whole(path, lambda file: np.save(file, array, allow_pickle=False))


def _axis_angle(pose: Pose) -> np.ndarray:
    """(..., J, 3) float32."""
    return np.asarray(_to_axis_angle(np.asarray(pose.rotations, np.float32)))


_to_axis_angle = jax.jit(rotations.matrix_to_axis_angle)  # compiles one program for each shape instead of dozens

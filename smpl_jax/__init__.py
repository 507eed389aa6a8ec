"""Human body models of the SMPL family in JAX: rotations, poses, posing, safe files, metrics.

``smpl_jax.render``, ``smpl_jax.export``, ``smpl_jax.keypoints`` and ``smpl_jax.fit`` are modules of their own.
"""

from smpl_jax.body import (
    BodyModel,
    BodyOutput,
    forward,
    joints,
    pelvis,
    regress,
    vertices,
)
from smpl_jax.cameras import translation_to_weak, weak_to_translation
from smpl_jax.errors import BodyFileError, PoseFileError
from smpl_jax.io import load_body, load_body_arrays, save_body_npz
from smpl_jax.layer import Layer, LayerOutput, create
from smpl_jax.metrics import geodesic_degrees, mpjpe, mpjre, pa_mpjpe, procrustes, procrustes_align
from smpl_jax.pose import (
    Pose,
    check,
    complete,
    concatenate,
    for_body,
    mirror_pose,
    stack,
    to_betas,
    to_family,
    to_frame,
    unmeasured,
)
from smpl_jax.pose_writers import write_poses
from smpl_jax.posed import PosedBody
from smpl_jax.poses import PoseFile, read_poses
from smpl_jax.rotations import (
    axis_angle_to_matrix,
    axis_angle_to_quaternion,
    exponential_volume,
    geodesic_distance,
    matrix_9d_to_rotation,
    matrix_to_axis_angle,
    matrix_to_quaternion,
    matrix_to_rotation_6d,
    quaternion_to_axis_angle,
    quaternion_to_matrix,
    rotation_6d_to_matrix,
)

__all__ = [
    "BodyFileError",
    "BodyModel",
    "BodyOutput",
    "Layer",
    "LayerOutput",
    "Pose",
    "PoseFile",
    "PoseFileError",
    "PosedBody",
    "axis_angle_to_matrix",
    "axis_angle_to_quaternion",
    "check",
    "complete",
    "concatenate",
    "create",
    "exponential_volume",
    "for_body",
    "forward",
    "geodesic_degrees",
    "geodesic_distance",
    "joints",
    "load_body",
    "load_body_arrays",
    "matrix_9d_to_rotation",
    "matrix_to_axis_angle",
    "matrix_to_quaternion",
    "matrix_to_rotation_6d",
    "mirror_pose",
    "mpjpe",
    "mpjre",
    "pa_mpjpe",
    "pelvis",
    "procrustes",
    "procrustes_align",
    "quaternion_to_axis_angle",
    "quaternion_to_matrix",
    "read_poses",
    "regress",
    "rotation_6d_to_matrix",
    "save_body_npz",
    "stack",
    "to_betas",
    "to_family",
    "to_frame",
    "translation_to_weak",
    "unmeasured",
    "vertices",
    "weak_to_translation",
    "write_poses",
]

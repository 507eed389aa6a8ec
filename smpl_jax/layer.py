"""A body model with smplx's keywords: ``create(...)``, then ``model(betas=…, body_pose=…, global_orient=…).vertices``.

For code that moves from smplx: axis-angle poses in parts, a leading batch axis, hands by principal components, and the joints in smplx's order
with its additional keypoints. :mod:`smpl_jax.body` does the arithmetic; new code calls it directly.
"""

import dataclasses
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from smpl_jax import body as bodies
from smpl_jax.body import BodyModel
from smpl_jax.errors import BodyFileError
from smpl_jax.io import load_body_arrays
from smpl_jax.pose import HANDS, JOINTS, SHARED
from smpl_jax.rotations import axis_angle_to_matrix

_HIGHEST = jax.lax.Precision.HIGHEST

# Number of joints of the body -> parts of its pose, in the order of the joints.
_BODY = (("global_orient", 1), ("body_pose", SHARED - 1))
_FACE = (("jaw_pose", 1), ("leye_pose", 1), ("reye_pose", 1))
_HANDS = (("left_hand_pose", HANDS // 2), ("right_hand_pose", HANDS // 2))
_PARTS: dict[int, tuple[str, tuple[tuple[str, int], ...]]] = {
    JOINTS["smpl"]: ("smpl", (("global_orient", 1), ("body_pose", JOINTS["smpl"] - 1))),
    JOINTS["smplh"]: ("smplh", (*_BODY, *_HANDS)),
    JOINTS["smplx"]: ("smplx", (*_BODY, *_FACE, *_HANDS)),
}
# The vertices that smplx appends to the joints, in its order: its names, and the names in our files.
# fmt: off
_VERTEX_JOINTS = {
    "nose": "nose", "reye": "right_eye", "leye": "left_eye", "rear": "right_ear", "lear": "left_ear",
    "LBigToe": "left_big_toe", "LSmallToe": "left_small_toe", "LHeel": "left_heel",
    "RBigToe": "right_big_toe", "RSmallToe": "right_small_toe", "RHeel": "right_heel",
    "lthumb": "left_thumb_tip", "lindex": "left_index_tip", "lmiddle": "left_middle_tip",
    "lring": "left_ring_tip", "lpinky": "left_pinky_tip",
    "rthumb": "right_thumb_tip", "rindex": "right_index_tip", "rmiddle": "right_middle_tip",
    "rring": "right_ring_tip", "rpinky": "right_pinky_tip",
}
# fmt: on
# Keywords of smplx.create that are not supported: the value that is accepted because it changes nothing, and advice for other values.
_FOREIGN: dict[str, tuple[Any, str]] = {
    "use_face_contour": (False, "contour landmarks depend on the pose of the head; the 51 fixed ones are in .joints"),
    "joint_mapper": (None, "index .joints, whose names are .joint_names"),
    "age": ("adult", "blend v_template in the arrays of load_body_arrays, and build BodyModel.from_arrays"),
    "kid_template_path": ("", "blend v_template in the arrays of load_body_arrays, and build BodyModel.from_arrays"),
    "v_template": (None, "replace v_template in the arrays of load_body_arrays, and build BodyModel.from_arrays"),
}


class LayerOutput(NamedTuple):
    """A posed body."""

    vertices: jax.Array | None  # (B, V, 3) metres; None with return_verts=False
    joints: jax.Array  # (B, len(joint_names), 3) metres
    # (B, 3 J) axis-angle or (B, J, 3, 3), hands as 15 joints each; None unless return_full_pose
    full_pose: jax.Array | None

    def __repr__(self) -> str:
        shapes = (f"{name} {np.shape(value)}" for name, value in self._asdict().items() if value is not None)
        return f"LayerOutput({', '.join(shapes)})"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["body", "part", "hand_components", "hand_mean", "keypoints"],
    meta_fields=["support", "joint_names", "batch_size"],
)
@dataclasses.dataclass(frozen=True)
class Layer:
    """A body model that is called with smplx's keywords; :func:`create` makes it. It is a pytree, so it may be an argument of ``jax.jit``."""

    body: BodyModel
    part: BodyModel  # the body with the vertices `support` only
    hand_components: jax.Array | None  # (2, C, 45), left and right hand
    hand_mean: jax.Array | None  # (2, 45) axis-angle
    keypoints: jax.Array  # (K, len(support)) weights of the appended joints on the vertices `support`
    support: tuple[int, ...]
    joint_names: tuple[str, ...]  # of `LayerOutput.joints`: the kinematic joints, then the appended ones
    batch_size: int

    @property
    def faces(self) -> np.ndarray:
        """(F, 3) int32."""
        return np.asarray(self.body.faces)

    def __repr__(self) -> str:
        hands = f", hands by {self._components} components" if self._components else ""
        return f"Layer({self.body.name!r}, {self.body.num_vertices} vertices, {len(self.joint_names)} joints{hands})"

    @property
    def _components(self) -> int:
        return 0 if self.hand_components is None else self.hand_components.shape[1]

    def __call__(
        self,
        *,
        betas: ArrayLike | None = None,
        global_orient: ArrayLike | None = None,
        body_pose: ArrayLike | None = None,
        left_hand_pose: ArrayLike | None = None,
        right_hand_pose: ArrayLike | None = None,
        jaw_pose: ArrayLike | None = None,
        leye_pose: ArrayLike | None = None,
        reye_pose: ArrayLike | None = None,
        expression: ArrayLike | None = None,
        transl: ArrayLike | None = None,
        pose2rot: bool = True,
        return_verts: bool = True,
        return_full_pose: bool = False,
    ) -> LayerOutput:
        """Poses the body. Missing arguments are zero; batch shapes broadcast with ``(batch_size,)``.

        Args:
            betas: (B, n) shape coefficients, n at most the number of loaded ones.
            global_orient, body_pose, jaw_pose, leye_pose, reye_pose: axis-angle (B, 3 K) or (B, K, 3) in radians, for
                1, 23 (SMPL) or 21, 1, 1 and 1 joints.
            left_hand_pose, right_hand_pose: (B, n) components, or with ``use_pca=False`` axis-angle of 15
                joints; the file's mean pose is added unless ``flat_hand_mean=True``.
            expression: (B, n) coefficients (SMPL-X).
            transl: (B, 3) metres, added last.
            pose2rot: False takes rotation matrices (B, K, 3, 3) for every part; hands then have no components and no mean.
            return_verts: False computes only the vertices that joints need.
            return_full_pose: return the pose of all joints.

        Raises:
            ValueError: a shape does not fit, or the body has no such part.
        """
        given = {
            "global_orient": global_orient, "body_pose": body_pose, "jaw_pose": jaw_pose, "leye_pose": leye_pose,
            "reye_pose": reye_pose, "left_hand_pose": left_hand_pose, "right_hand_pose": right_hand_pose,
        }  # fmt: skip
        kind, parts = _PARTS[self.body.num_joints]
        foreign = [name for name, value in given.items() if value is not None and name not in dict(parts)]
        if foreign:
            raise ValueError(f"a body of type {kind} ({self.body.num_joints} joints) has no {', '.join(foreign)}")
        poses = [self._part(name, count, given[name], pose2rot) for name, count in parts]
        try:
            batch = np.broadcast_shapes((self.batch_size,), *(pose.shape[:-3] for pose in poses))
        except ValueError:
            shapes = {name: pose.shape[:-3] for (name, _), pose in zip(parts, poses)}
            raise ValueError(
                f"batch shapes of the pose do not broadcast: {shapes}, batch_size {self.batch_size}"
            ) from None
        full = jnp.concatenate([jnp.broadcast_to(pose, (*batch, *pose.shape[-3:])) for pose in poses], axis=-3)
        rotations = axis_angle_to_matrix(full[..., 0]) if pose2rot else full
        shape: dict[str, Any] = {"betas": betas, "translation": transl, "expression": expression}
        vertices = None
        if return_verts:
            vertices, joints = bodies.forward(self.body, rotations, **shape)
            keypoints = vertices[..., np.array(self.support, int), :]
        elif self.support:
            keypoints, joints = bodies.forward(self.part, rotations, **shape)
        else:
            joints = bodies.joints(self.body, rotations, **shape)
        if self.support:
            more = jnp.einsum("kn,...nc->...kc", self.keypoints, keypoints, precision=_HIGHEST)
            joints = jnp.concatenate([joints, more], axis=-2)
        whole = full[..., 0].reshape(*batch, -1) if pose2rot else full
        return LayerOutput(vertices, joints, whole if return_full_pose else None)

    def _part(self, name: str, count: int, given: ArrayLike | None, pose2rot: bool) -> jax.Array:
        """One part of the pose: axis-angle (..., K, 3, 1), or matrices (..., K, 3, 3)."""
        hand = {"left_hand_pose": 0, "right_hand_pose": 1}.get(name)
        if not pose2rot:
            if given is None:
                return jnp.broadcast_to(jnp.eye(3, dtype=self.body.dtype), (count, 3, 3))
            pose = jnp.asarray(given, self.body.dtype)
            if pose.shape[-3:] != (count, 3, 3):
                raise ValueError(f"{name} with pose2rot=False must have shape (B, {count}, 3, 3); got {pose.shape}")
            return pose
        by_components = hand is not None and self.hand_components is not None
        width = self._components if by_components else 3 * count
        pose = jnp.zeros(width, self.body.dtype) if given is None else jnp.asarray(given, self.body.dtype)
        if not by_components and pose.shape[-2:] == (count, 3):
            pose = pose.reshape(*pose.shape[:-2], width)
        if pose.shape[-1:] != (width,):
            expected = f"(B, {width})" if by_components else f"(B, {width}) or (B, {count}, 3)"
            hint = " of components (use_pca=True)" if by_components else ", axis-angle"
            hint += "; pose2rot=False takes matrices" if pose.shape[-2:] == (3, 3) else ""
            raise ValueError(f"{name} must have shape {expected}{hint}; got {pose.shape}")
        if hand is not None and self.hand_components is not None:
            pose = jnp.matmul(pose, self.hand_components[hand], precision=_HIGHEST)
        if hand is not None and self.hand_mean is not None:
            pose = pose + self.hand_mean[hand]
        return pose.reshape(*pose.shape[:-1], count, 3, 1)


def create(
    model_path: str | os.PathLike[str] | None = None,
    model_type: str | None = None,
    *,
    gender: str = "neutral",
    ext: str | None = None,
    num_betas: int = 10,
    num_expression_coeffs: int = 10,
    use_pca: bool = True,
    num_pca_comps: int = 6,
    flat_hand_mean: bool = False,
    vertex_ids: Mapping[str, int] | None = None,
    batch_size: int = 1,
    dtype: DTypeLike = jnp.float32,
    **foreign: Any,
) -> Layer:
    """Loads a body model that is called like smplx's.

    Args:
        model_path: a body file, or a folder with files such as ``smplx/SMPLX_NEUTRAL.npz`` and ``smpl/SMPL_MALE.pkl``;
            None is the default body of the package.
        model_type: "smpl", "smplh" or "smplx". In a folder it chooses the file ("smpl" by default). For a file it is the expected type; the
            actual type follows from the file's contents.
        gender: "neutral", "male" or "female": chooses the file in a folder.
        ext: "npz" or "pkl": chooses the file in a folder; by default the one that exists.
        num_betas, num_expression_coeffs: number of coefficients to keep.
        use_pca, num_pca_comps, flat_hand_mean: hands of SMPL-H and SMPL-X, see ``Layer.__call__``.
        vertex_ids: the vertices that smplx appends to the joints, by its names, for instance
            ``smplx.vertex_ids.vertex_ids["smplh"]``. SMPL's own files have no vertex names. A body that names all 21 does not need it.
        batch_size: batch size of the output if no argument has a batch axis.
        dtype: dtype of everything; float64 needs ``jax_enable_x64``.
        foreign: smplx's ``create_*``, which are accepted and ignored: a ``Layer`` stores no parameters, all are arguments of the call.

    Raises:
        BodyFileError: the file is missing or is not a body.
        ValueError: the body is of another type or lacks hands, or a keyword is not supported.
    """
    _refuse(foreign)
    for name, text in (("model_type", model_type), ("gender", gender), ("ext", ext)):
        if not isinstance(text, str) and (text is not None or name == "gender"):
            raise ValueError(f"{name} must be text; found {text!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1; found {batch_size!r}")
    path = _find(model_path, model_type, gender, ext)
    arrays = load_body_arrays(path)
    body = BodyModel.from_arrays(arrays, num_betas=num_betas, num_expression=num_expression_coeffs, dtype=dtype)
    if body.num_joints not in _PARTS:
        raise ValueError(f"{path}: expected a body of {', '.join(map(str, _PARTS))} joints, found {body.num_joints}")
    kind = _PARTS[body.num_joints][0]
    if model_type is not None and model_type.lower() != kind:
        raise ValueError(
            f"{path or 'the default body'} has the {body.num_joints} joints of {kind}, not of {model_type}"
        )
    components, mean = None, None
    if "left_hand_pose" in dict(_PARTS[body.num_joints][1]):
        if use_pca:
            components = _hands(arrays, "hands_components", path)[:, :num_pca_comps].astype(dtype)
            if not 1 <= num_pca_comps <= components.shape[1]:
                raise ValueError(f"num_pca_comps must be 1 to {components.shape[1]}; found {num_pca_comps}")
        if not flat_hand_mean:
            mean = _hands(arrays, "hands_mean", path).astype(dtype)
    if vertex_ids is not None:
        body = body.with_keypoints(vertex_ids={_VERTEX_JOINTS.get(name, name): i for name, i in vertex_ids.items()})
        if missing := [name for name, ours in _VERTEX_JOINTS.items() if ours not in dict(body.vertex_ids)]:
            raise ValueError(f"vertex_ids must name all {len(_VERTEX_JOINTS)} vertices; it lacks {', '.join(missing)}")
    names, weights = _appended(body)
    support = np.flatnonzero(weights.any(axis=0))
    return Layer(
        body=body,
        part=body.subset(support),
        hand_components=None if components is None else jnp.asarray(components),
        hand_mean=None if mean is None else jnp.asarray(mean),
        keypoints=jnp.asarray(weights[:, support], body.dtype),
        support=tuple(support.tolist()),
        joint_names=(*body.joint_names, *names),
        batch_size=batch_size,
    )


def _refuse(foreign: Mapping[str, Any]) -> None:
    for name, value in foreign.items():
        if name.startswith("create_"):
            continue
        if name not in _FOREIGN:
            raise TypeError(f"create() got an unexpected keyword argument {name!r}")
        harmless, instead = _FOREIGN[name]
        if value is not None and not (isinstance(value, type(harmless)) and value == harmless):
            raise ValueError(f"{name}={value!r:.50} is not supported: {instead}")


def _find(path: str | os.PathLike[str] | None, model_type: str | None, gender: str, ext: str | None) -> Path | None:
    """The body file; in a folder it has the name that smplx expects."""
    if path is None:
        return None
    if model_type is not None and model_type.lower() not in {kind for kind, _ in _PARTS.values()}:
        raise ValueError(f"model_type must be smpl, smplh or smplx; found {model_type!r}")
    folder = Path(path)
    if not folder.is_dir():
        return folder
    kind = (model_type or "smpl").lower()
    names = [f"{kind.upper()}_{gender.upper()}.{e}" for e in ((ext,) if ext else ("npz", "pkl"))]
    tried = [place / name for place in (folder / kind, folder) for name in names]
    found = next((file for file in tried if file.is_file()), None)
    if found is None:
        raise BodyFileError(f"{folder}: found no {gender} {kind} body; expected one of {', '.join(map(str, tried))}")
    return found


def _hands(arrays: Mapping[str, np.ndarray], name: str, path: Path | None) -> np.ndarray:
    """(2, ...), left and right hand."""
    if missing := [side for side in (f"{name}l", f"{name}r") if side not in arrays]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; use_pca=False and flat_hand_mean=True do not need them")
    return np.stack([arrays[f"{name}l"], arrays[f"{name}r"]])


def _appended(body: BodyModel) -> tuple[list[str], np.ndarray]:
    """Names and weights (K, V) of the joints after the kinematic ones: the 21 vertices, if the body names all of them, then
    face landmarks.
    """
    ids, landmarks = dict(body.vertex_ids), body.regressors.get("face_landmarks")
    named = all(name in ids for name in _VERTEX_JOINTS.values())
    names = list(_VERTEX_JOINTS.values()) if named else []
    weights = np.zeros((len(names), body.num_vertices))
    weights[np.arange(len(names)), [ids[name] for name in names]] = 1
    if landmarks is not None:
        names = names + [f"face_landmark{i}" for i in range(len(landmarks))]
        weights = np.concatenate([weights, np.asarray(landmarks)])
    return names, weights

"""Meshes for other programs: OBJ and GLB (glTF 2.0). Files are written atomically.

`frame` names the frame of the mesh or pose (`smpl_jax.frames`); the default is the model frame: y up, facing +z. OBJ and
glTF are y up, so meshes in another frame are rotated; nothing is mirrored.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smpl_jax import rotations as rotation_functions
from smpl_jax._files import write_whole
from smpl_jax.body import BodyModel
from smpl_jax.frames import Frame, turn
from smpl_jax.raster import mesh, vertex_normals
from smpl_jax.render import SKIN

PathLike = str | os.PathLike[str]

# glTF 2.0 enumerations (Khronos specification, sections 3.6 and 5).
_FLOAT, _UINT, _USHORT, _UBYTE = 5126, 5125, 5123, 5121
_DTYPES: dict[int, Any] = {_FLOAT: np.float32, _UINT: np.uint32, _USHORT: np.uint16, _UBYTE: np.uint8}
_KINDS = {(): "SCALAR", (2,): "VEC2", (3,): "VEC3", (4,): "VEC4", (4, 4): "MAT4"}
_VERTEX_DATA, _INDEX_DATA = 34962, 34963


def write_obj(path: PathLike, vertices: ArrayLike, faces: ArrayLike, *, frame: Frame = "model") -> Path:
    """Writes a Wavefront OBJ, y up, metres, with smooth normals.

    Args:
        path: where.
        vertices: (V, 3) metres in `frame`.
        faces: (F, 3) vertex indices, counter-clockwise seen from outside.
        frame: of the vertices; see the module's docstring.

    Raises:
        ValueError: the arrays are not a mesh, or the frame is unknown.
    """
    points, triangles = _y_up(vertices, faces, frame)
    lines = ["# y up, metres"]
    lines += ["v {:.6f} {:.6f} {:.6f}".format(*p) for p in points.tolist()]
    lines += ["vn {:.4f} {:.4f} {:.4f}".format(*n) for n in vertex_normals(points, triangles).tolist()]
    lines += ["f {0}//{0} {1}//{1} {2}//{2}".format(*t) for t in (triangles + 1).tolist()]
    text = "\n".join(lines) + "\n"
    return write_whole(path, lambda file: file.write(text.encode()))


def write_glb(
    path: PathLike, vertices: ArrayLike, faces: ArrayLike, *, frame: Frame = "model", colors: ArrayLike | None = None
) -> Path:
    """Writes a mesh as binary glTF 2.0, y up, metres. Every viewer shows a posed body in its pose.

    Args:
        path, vertices, faces, frame: as for `write_obj`; glTF has no mesh without faces.
        colors: sRGB in 0..1, one (3,) or one for each vertex (V, 3).

    Raises:
        ValueError: the arrays are not a mesh, there are no faces, or the frame is unknown.
    """
    points, triangles = _y_up(vertices, faces, frame)
    glb = _Glb()
    glb.document["nodes"] = [{"name": "body", "mesh": 0}]
    glb.document["scenes"] = [{"nodes": [0]}]
    _add_mesh(glb, points, triangles, colors, {})
    return write_whole(path, glb.write)


def write_skinned_glb(
    path: PathLike,
    body: BodyModel,
    rotations: ArrayLike,
    betas: ArrayLike | None = None,
    translation: ArrayLike | None = None,
    *,
    frame: Frame = "model",
    colors: ArrayLike | None = None,
) -> Path:
    """Writes a posed body with its skeleton: binary glTF 2.0, named joints, y up, metres.

    The file contains the rest mesh (template + shape + the pose correctives *of this pose*) and the posed joints. Plain glTF skinning thus
    reproduces this pose exactly, and Blender or Unity get a rig. In other poses the mesh keeps this pose's correctives. A program without
    skinning shows the rest pose; use `write_glb` for those.

    Args:
        path: where.
        body: the body model.
        rotations: (J, 3, 3), relative to the parents; joint 0 rotates the body into `frame`.
        betas: (S,) shape coefficients.
        translation: (3,) metres, in `frame`.
        frame: of joint 0's rotation and of the translation.
        colors: sRGB (3,) or (V, 3).

    Raises:
        ValueError: shapes do not fit the body, numbers are not finite, the body's weights are negative or do not sum to 1,
            or the frame is unknown.
    """
    upright = turn(frame)
    pose = np.asarray(rotations, np.float64)
    if pose.shape != (body.num_joints, 3, 3):
        raise ValueError(f"rotations must be ({body.num_joints}, 3, 3) for this body, found {pose.shape}")
    move = np.zeros(3) if translation is None else np.asarray(translation, np.float64)
    if move.shape != (3,) or not (np.isfinite(pose).all() and np.isfinite(move).all()):
        raise ValueError(f"rotations and translation (3,) must be finite numbers; translation has shape {move.shape}")
    shape = np.zeros(body.num_betas + body.num_expression)
    if betas is not None:
        given = np.asarray(betas, np.float64)
        if given.ndim != 1 or len(given) > body.num_betas:
            raise ValueError(f"betas must be at most {body.num_betas} numbers, found shape {given.shape}")
        shape[: len(given)] = given
    coefficients = np.concatenate([shape, (pose[1:] - np.eye(3)).ravel()])
    rest = (np.asarray(body.template) + np.tensordot(coefficients, np.asarray(body.bases, np.float64), 1)).T
    joints = np.asarray(body.joint_template) + np.tensordot(shape, np.asarray(body.joint_shapedirs, np.float64), 1)

    local = pose.copy()
    local[0] = upright @ pose[0]
    quaternions = np.asarray(rotation_functions.matrix_to_quaternion(local), np.float64)[:, [1, 2, 3, 0]]  # glTF: xyzw
    parents = body.parents
    places = np.stack([joints[k] - joints[p] if p >= 0 else joints[k] for k, p in enumerate(parents)])
    places[0] = upright @ (joints[0] + move)
    nodes: list[dict[str, Any]] = [{"name": "body", "mesh": 0, "skin": 0}]
    for k, name in enumerate(body.joint_names):
        node: dict[str, Any] = {"name": name, "translation": places[k].tolist(), "rotation": quaternions[k].tolist()}
        children = [c + 1 for c, p in enumerate(parents) if p == k]
        nodes.append(node | ({"children": children} if children else {}))

    glb = _Glb()
    glb.document["nodes"] = nodes
    glb.document["scenes"] = [{"nodes": [0, 1]}]
    inverse_bind = np.tile(np.eye(4), (len(joints), 1, 1))
    inverse_bind[:, :3, 3] = -joints
    # glTF stores matrices column by column.
    matrices = glb.accessor(inverse_bind.transpose(0, 2, 1), _FLOAT)
    glb.document["skins"] = [
        {"joints": list(range(1, len(joints) + 1)), "skeleton": 1, "inverseBindMatrices": matrices, "name": body.name}
    ]
    points, triangles = mesh(rest, np.asarray(body.faces))
    _add_mesh(glb, points, triangles, colors, _influences(np.asarray(body.weights, np.float64).T))
    return write_whole(path, glb.write)


class _Glb:
    """A glTF document and its binary chunk, under construction."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "smpl_jax"},
            "scene": 0,
            "accessors": [],
            "bufferViews": [],
        }
        self.binary = bytearray()

    def accessor(
        self,
        array: NDArray[Any],
        component: int,
        *,
        target: int | None = None,
        bounds: bool = False,
        normalized: bool = False,
    ) -> int:
        """Appends an array (N, ...) as its own buffer view; returns the accessor's index."""
        data = np.ascontiguousarray(array, _DTYPES[component])
        offset = len(self.binary)
        self.binary += data.tobytes()
        self.binary += b"\0" * (-len(self.binary) % 4)
        view: dict[str, Any] = {"buffer": 0, "byteOffset": offset, "byteLength": data.nbytes}
        self.document["bufferViews"].append(view | ({"target": target} if target else {}))
        entry: dict[str, Any] = {
            "bufferView": len(self.document["bufferViews"]) - 1,
            "componentType": component,
            "count": len(data),
            "type": _KINDS[data.shape[1:]],
        }
        if normalized:
            entry["normalized"] = True
        if bounds:
            entry |= {"min": data.min(0).tolist(), "max": data.max(0).tolist()}
        self.document["accessors"].append(entry)
        return len(self.document["accessors"]) - 1

    def write(self, file: IO[bytes]) -> None:
        self.document["buffers"] = [{"byteLength": len(self.binary)}]
        text = json.dumps(self.document, separators=(",", ":"), allow_nan=False).encode()
        text += b" " * (-len(text) % 4)
        total = 12 + 8 + len(text) + 8 + len(self.binary)
        file.write(struct.pack("<4sII", b"glTF", 2, total))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", len(self.binary), b"BIN\0") + bytes(self.binary))


def _add_mesh(
    glb: _Glb,
    points: NDArray[np.float32],
    faces: NDArray[Any],
    colors: ArrayLike | None,
    further: dict[str, tuple[NDArray[Any], int]],
) -> None:
    if not len(faces):
        raise ValueError(f"a glTF mesh needs faces; found {len(points)} vertices and 0 faces")
    attributes = {
        "POSITION": glb.accessor(points, _FLOAT, target=_VERTEX_DATA, bounds=True),
        "NORMAL": glb.accessor(vertex_normals(points, faces), _FLOAT, target=_VERTEX_DATA),
    }
    for name, (array, component) in further.items():
        attributes[name] = glb.accessor(array, component, target=_VERTEX_DATA)
    srgb = np.asarray(SKIN if colors is None else colors, np.float64)
    if srgb.shape not in ((3,), (len(points), 3)):
        raise ValueError(f"colors must have shape (3,) or ({len(points)}, 3), found {srgb.shape}")
    if not (np.abs(srgb - 0.5) <= 0.5 + 1e-6).all():
        raise ValueError(f"colors are sRGB in 0..1, found {srgb.min():.6g} to {srgb.max():.6g}")
    # glTF factors and vertex colours are linear.
    srgb = srgb.clip(0, 1)
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clip(0.04045) + 0.055) / 1.055) ** 2.4)
    factor = [1.0, 1.0, 1.0, 1.0]
    if linear.ndim == 1:
        factor[:3] = linear.tolist()
    else:
        rgba = np.concatenate([linear, np.ones((len(linear), 1))], 1)
        attributes["COLOR_0"] = glb.accessor(np.rint(rgba * 65535), _USHORT, target=_VERTEX_DATA, normalized=True)
    component = _USHORT if len(points) < 65535 else _UINT
    indices = glb.accessor(faces.reshape(-1), component, target=_INDEX_DATA)
    surface = {"baseColorFactor": factor, "metallicFactor": 0.0, "roughnessFactor": 0.75}
    glb.document["materials"] = [{"name": "body", "pbrMetallicRoughness": surface}]
    glb.document["meshes"] = [
        {"name": "body", "primitives": [{"attributes": attributes, "indices": indices, "material": 0}]}
    ]


def _influences(weights: NDArray[np.float64]) -> dict[str, tuple[NDArray[Any], int]]:
    """Sets of four joints and weights from weights (V, J), as many as the vertex with the most joints needs."""
    total = weights.sum(1, keepdims=True)
    if not ((weights >= 0).all() and (np.abs(total - 1) < 1e-3).all()):
        raise ValueError(
            "skinning weights must be non-negative and sum to 1 at each vertex; "
            f"found weights from {weights.min():.3g} and sums from {total.min():.3g} to {total.max():.3g}"
        )
    count = int((weights > 0).sum(1).max())
    sets = -(-count // 4)
    order = np.argsort(-weights, axis=1, kind="stable")[:, : 4 * sets]
    values = np.take_along_axis(weights, order, 1) / total
    order = np.where(values > 0, order, 0)
    if order.shape[1] < 4 * sets:
        pad = ((0, 0), (0, 4 * sets - order.shape[1]))
        order, values = np.pad(order, pad), np.pad(values, pad)
    component = _UBYTE if weights.shape[1] <= 256 else _USHORT
    out: dict[str, tuple[NDArray[Any], int]] = {}
    for k in range(sets):
        out[f"JOINTS_{k}"] = (order[:, 4 * k : 4 * k + 4], component)
        out[f"WEIGHTS_{k}"] = (values[:, 4 * k : 4 * k + 4], _FLOAT)
    return out


def _y_up(vertices: ArrayLike, faces: ArrayLike, frame: str) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    points, triangles = mesh(vertices, faces)
    return (points @ turn(frame).T.astype(np.float32)).astype(np.float32), triangles

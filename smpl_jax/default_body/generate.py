"""Makes the default body: `python -m smpl_jax.default_body.generate body.npz`.

Building needs scikit-image, scipy and fast-simplification (`pip install '.[body]'`); reading the result needs only numpy.
The file records their versions as `built_with`; the same versions give the same file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smpl_jax._files import write_whole
from smpl_jax.default_body import mesh, rig, skeleton, surface

NAME = "chatpose-default"
_GRID_STEP = 0.004
_BUILD_NEEDS = {"skimage": "scikit-image", "scipy": "scipy", "fast_simplification": "fast-simplification"}

# Landmarks: the vertex furthest along a direction among those that a joint moves most; the right mirrors the left.
_LANDMARKS: dict[str, tuple[str, tuple[float, float, float]]] = {
    "head_top": ("head", (0, 1, -0.1)),
    "nose": ("head", (0, -0.2, 1)),
    "chin": ("head", (0, -1, 0.8)),
    "left_ear": ("head", (1, 0, -0.2)),
    "left_shoulder_tip": ("left_shoulder", (-0.4, 1, 0)),
    "left_elbow_tip": ("left_elbow", (-0.5, 0, -1)),
    "left_thumb_tip": ("left_wrist", (0.5, 0, 1)),
    "left_index_tip": ("left_hand", (1, 0, 0.9)),
    "left_middle_tip": ("left_hand", (1, 0, 0.02)),
    "left_ring_tip": ("left_hand", (1, 0, -0.45)),
    "left_pinky_tip": ("left_hand", (0.8, 0, -1)),
    "left_kneecap": ("left_knee", (0, 0.3, 1)),
    "left_heel": ("left_ankle", (0, -0.3, -1)),
    "left_big_toe": ("left_foot", (-0.5, 0, 1)),
    "left_small_toe": ("left_foot", (1, 0, 0.5)),
}
# Other landmarks: the vertex nearest to a point (floor frame).
_PLACES = {"left_eye": (0.0315, 1.6105, 0.086), "mouth": (0.0, 1.549, 0.095)}


def build() -> dict[str, NDArray[Any]]:
    """All arrays of the body in SMPL's names and shapes, float64, with the origin off the pelvis as in published files.

    Raises:
        ImportError: a build-time package is missing.
    """
    _check_needs()
    half = mesh.half_surface(surface.body, (0.0, -0.02, -0.20), (0.90, 1.76, 0.24), _GRID_STEP)
    thinned = mesh.thin(*mesh.largest_piece(*half), surface.normals, mesh.FACES // 2)
    vertices, faces, twin = mesh.mirror_mesh(*thinned)
    # Vertices of head, hands and feet hardly move, to keep their features; those of trunk and limbs become evenly spaced.
    amount = np.where(mesh.detailed(vertices), 0.08, 0.5)
    vertices = mesh.relax(vertices, faces, surface.body, surface.normals, 8, amount)
    joints = skeleton.joint_positions()
    weights = rig.skinning_weights(vertices, faces, twin)
    names, ids = landmarks(vertices, weights, twin)
    return {
        "v_template": vertices - skeleton.ORIGIN,
        "f": faces,
        "weights": weights,
        "J_regressor": rig.joint_regressor(vertices, weights, joints, twin),
        "kintree_table": np.stack([skeleton.PARENTS, np.arange(len(skeleton.PARENTS))]),
        "shapedirs": rig.shape_directions(vertices, faces, weights, joints),
        "posedirs": rig.pose_correctives(vertices, faces, weights, joints, twin),
        "joint_names": np.array(skeleton.JOINT_NAMES),
        "shape_names": np.array(rig.SHAPE_NAMES),
        "vertex_id_names": np.array(names),
        "vertex_ids": np.array(ids),
        "vert_sym_idxs": twin,
        "model_name": np.array(NAME),
        "built_with": np.array([f"{package}=={version(package)}" for package in ("numpy", *_BUILD_NEEDS.values())]),
    }


def landmarks(
    vertices: NDArray[np.float64], weights: NDArray[np.float64], twin: NDArray[np.int64]
) -> tuple[list[str], list[int]]:
    """Names and vertex indices of `_LANDMARKS` on both sides."""
    owner = weights.argmax(1)
    found: dict[str, int] = {}
    for name, (joint, direction) in _LANDMARKS.items():
        (candidates,) = np.nonzero(owner == skeleton.JOINT_NAMES.index(joint))
        if not name.startswith("left_"):
            candidates = candidates[twin[candidates] == candidates]
        vertex = int(candidates[(vertices[candidates] @ np.array(direction, np.float64)).argmax()])
        found[name] = vertex
        if name.startswith("left_"):
            found[skeleton.swap_sides(name)] = int(twin[vertex])
    for name, place in _PLACES.items():
        distance = np.linalg.norm(vertices - place, axis=1)
        vertex = int((distance + (0 if name.startswith("left_") else 1e3 * (twin != np.arange(len(twin))))).argmin())
        found[name] = vertex
        if name.startswith("left_"):
            found[skeleton.swap_sides(name)] = int(twin[vertex])
    return list(found), list(found.values())


def pack_body(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Rounds the arrays for the file: to integers with a `_scale` each. The regressor becomes sparse."""
    packed: dict[str, NDArray[Any]] = {
        "f": arrays["f"].astype(np.uint16),
        "kintree_table": arrays["kintree_table"].astype(np.int32),
        "vertex_ids": arrays["vertex_ids"].astype(np.int32),
        "vert_sym_idxs": arrays["vert_sym_idxs"].astype(np.uint16),
        **{k: arrays[k] for k in ("joint_names", "shape_names", "vertex_id_names", "model_name", "built_with")},
    }
    correctives = np.abs(arrays["posedirs"]).max((0, 1), keepdims=True)
    for name, scale, dtype in (
        ("v_template", np.float64(1e-5), np.int32),
        ("shapedirs", np.float64(5e-5), np.int16),
        ("weights", np.float64(1 / 65535), np.uint16),
        ("posedirs", np.where(correctives > 0, correctives, 1) / 127, np.int8),
    ):
        stored = np.asarray(scale, np.float32)
        packed[name] = np.rint(arrays[name] / stored).astype(dtype)
        packed[f"{name}_scale"] = stored
    row, column = np.nonzero(arrays["J_regressor"])
    packed |= {
        "J_regressor_data": arrays["J_regressor"][row, column].astype(np.float32),
        "J_regressor_indices": column.astype(np.int32),
        "J_regressor_indptr": np.searchsorted(row, np.arange(len(arrays["J_regressor"]) + 1)).astype(np.int32),
        "J_regressor_shape": np.array(arrays["J_regressor"].shape, np.int32),
    }
    return packed


def write(path: str | os.PathLike[str]) -> Path:
    """Builds the body and writes it to `path` atomically."""
    packed = pack_body(build())
    return write_whole(path, lambda file: np.savez_compressed(file, allow_pickle=False, **packed))


def _check_needs() -> None:
    from importlib.util import find_spec

    missing = [package for module, package in _BUILD_NEEDS.items() if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"building the default body needs {', '.join(missing)}: run pip install '.[body]' in the checkout. "
            "To use the default body, nothing has to be built: the package contains it."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the default body in SMPL's file format.")
    parser.add_argument("out", help="the .npz to write")
    path = write(parser.parse_args().out)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

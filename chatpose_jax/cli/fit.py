"""``chatpose fit``: bodies from keypoints in images, joints in space or markers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from chatpose_jax.data.readers.untrusted import load_npz, read_json
from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line
from smpl_jax import io, render
from smpl_jax.body import BodyModel
from smpl_jax.frames import Frame
from smpl_jax.keypoints import KEYPOINT_SETS, SMPL_VERTICES, keypoint_set
from smpl_jax.pose_writers import write_poses

OPENPOSE = {25: "openpose25", 18: "coco18"}
"""Number of points of a person in OpenPose's JSON -> the set."""
KINDS = {"keypoints_2d": (2, 3), "joints": (3, 4), "markers": (3, 4)}
"""Arrays of an npz -> columns that they may have; the last is a confidence."""
DRAWN = 16


class Points(NamedTuple):
    """kind: a key of KINDS. values: (..., K, columns). set_name: the set of keypoints if the file names it. more: the other arrays of the file."""

    kind: str
    values: np.ndarray
    set_name: str | None
    more: dict[str, np.ndarray]

    def __repr__(self) -> str:
        return one_line(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose fit``."""
    parser.add_argument(
        "file",
        type=Path,
        help="OpenPose's .json, or an .npz with keypoints_2d (..., K, 2 or 3) in pixels, joints (..., K, 3 or 4) in metres, or markers "
        "(..., K, 3 or 4) in metres with vertices (K,) of the body; the last column is a confidence",
    )
    parser.add_argument("--out", required=True, type=Path, help=".npz of poses")
    parser.add_argument("--points", choices=KEYPOINT_SETS, help="the set of keypoints, where the file does not name it")
    parser.add_argument(
        "--image-size", nargs=2, type=float, metavar=("WIDTH", "HEIGHT"), help="of the images, in pixels"
    )
    parser.add_argument(
        "--frame", choices=get_args(Frame), help="of joints and markers; default: that of the file, or camera"
    )
    parser.add_argument("--focal", type=float, help="focal length in pixels; default: the diagonal of the image")
    parser.add_argument(
        "--noise", type=float, help="of the points, in pixels or metres; default: estimated for each person"
    )
    parser.add_argument("--body", type=Path, help="SMPL file; default: the body that comes with the package")
    parser.add_argument(
        "--prior", type=Path, help="pose prior: .npz, or SMPLify's gmm_08.pkl; default: that of the package"
    )
    parser.add_argument("--drawing", type=Path, help=f".png of the fitted bodies, {DRAWN} at most")


def run(args: argparse.Namespace) -> int:
    """Fits all people of a file. Prints how many fits converged."""
    from smpl_jax import fit  # compiles nothing, but the prior is read

    if args.out.suffix.lower() != ".npz":
        raise UserError(f"--out {args.out}: expected a path that ends in .npz")
    given = read_points(args.file, args.points)
    body = io.load_body(args.body)
    if body.name in ("smpl", "smplh") and body.num_vertices == 6890 and not body.vertex_ids:
        body = body.with_keypoints(vertex_ids=SMPL_VERTICES)
    shared: dict[str, Any] = {"body": body, "noise": args.noise, "prior": fit.load_prior(args.prior)}
    shared |= {name: given.more[name] for name in ("confidence", "betas") if name in given.more}
    frame = _frame(args.file, args.frame, given)
    try:
        if given.kind == "keypoints_2d":
            size = args.image_size if args.image_size else given.more.get("image_size")
            if size is None:
                raise UserError(f"{args.file}: the size of the images is not known; --image-size WIDTH HEIGHT")
            focal = given.more.get("focal") if args.focal is None else args.focal
            fitted = fit.fit_keypoints(
                given.values,
                given.set_name or "",
                image_size=tuple(size),
                focal=focal,
                center=given.more.get("center"),
                **shared,
            )
        elif given.kind == "joints":
            fitted = fit.fit_joints(given.values, given.set_name or "smpl24", frame=frame, **shared)
        else:
            fitted = fit.fit_markers(given.values, given.more["vertices"].tolist(), frame=frame, **shared)
        write_poses(args.out, fitted.pose, body=body.name)
        if args.drawing:
            save_drawing(args.drawing, body, fitted.pose)
    except ValueError as error:
        raise UserError(f"{args.file}: {error}") from None
    total, unit = fitted.converged.size, "px" if given.kind == "keypoints_2d" else "m"
    seen = fitted.errors[fitted.seen]
    far = f"; the points are {np.median(seen):.3g} {unit} off in the median" if seen.size else ""
    print(f"{int(fitted.converged.sum())} of {total} fits converged{far}", file=sys.stderr)
    print(args.out)
    return 0


def _frame(file: Path, typed: Frame | None, given: Points) -> Frame:
    """The frame of the points: the typed one, that of the file, or "camera". Raises UserError where these differ."""
    stated = str(given.more["frame"]) if "frame" in given.more else None
    if typed and stated and typed != stated:
        raise UserError(f"{file}: the file says that its points are in the frame {stated}, --frame says {typed}")
    found = typed or stated or "camera"
    known = ("camera",) if given.kind == "keypoints_2d" else get_args(Frame)
    if found not in known:
        raise UserError(f"{file}: {given.kind} are in the frame {' or '.join(known)}; found {found!r:.40}")
    return found  # type: ignore[return-value]


def read_points(file: Path, name: str | None) -> Points:
    """The points of a file. Raises UserError for a file of another kind, and for points of an unknown set."""
    if file.suffix.lower() == ".json":
        return _openpose(file, name)
    arrays = load_npz(file)
    kinds = [kind for kind in KINDS if kind in arrays]
    if len(kinds) != 1:
        raise UserError(f"{file}: expected one of the arrays {', '.join(KINDS)}; found {', '.join(arrays) or 'none'}")
    kind, values = kinds[0], arrays[kinds[0]]
    if values.ndim < 2 or values.dtype.kind not in "fiu" or values.shape[-1] not in KINDS[kind]:
        columns = " or ".join(map(str, KINDS[kind]))
        raise UserError(f"{file}: {kind} must be numbers (..., K, {columns}); found {values.dtype} {values.shape}")
    if kind == "markers" and (arrays.get("vertices", np.empty(0)).shape != values.shape[-2:-1]):
        raise UserError(f"{file}: markers need an array vertices ({values.shape[-2]},), the vertex of each")
    named = str(arrays["points"]) if "points" in arrays else None
    if name and named and name != named:
        raise UserError(f"{file}: the file says that its points are {named}, --points says {name}")
    return Points(kind, values, _set(file, name or named, values.shape[-2], kind), arrays)


def _openpose(file: Path, name: str | None) -> Points:
    content = read_json(file)
    people = content.get("people") if isinstance(content, dict) else None
    if not isinstance(people, list) or not people:
        raise UserError(f"{file}: expected OpenPose's JSON with at least one of people; found none")
    try:
        values = np.array([person["pose_keypoints_2d"] for person in people], np.float64)
        values = values.reshape(len(people), -1, 3)
    except (TypeError, KeyError, ValueError):
        raise UserError(
            f"{file}: expected pose_keypoints_2d, x, y and confidence in turn, of every one of people"
        ) from None
    return Points(
        "keypoints_2d", values, _set(file, name or OPENPOSE.get(values.shape[1]), values.shape[1], "keypoints_2d"), {}
    )


def _set(file: Path, name: str | None, count: int, kind: str) -> str | None:
    if kind == "markers" or (kind == "joints" and name is None and count == len(KEYPOINT_SETS["smpl24"])):
        return name
    if name is None:
        raise UserError(f"{file}: which {count} keypoints are these? --points, one of {', '.join(KEYPOINT_SETS)}")
    try:
        expected = len(keypoint_set(name))
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    if expected != count:
        raise UserError(f"{file}: {name} has {expected} points; the file has {count}")
    return name


def save_drawing(path: Path, body: BodyModel, pose: Any) -> None:
    """Draws the first people, each from the front and from the side."""
    flat = pose.rotations.reshape(-1, *pose.rotations.shape[-3:])[:DRAWN]
    betas = pose.betas.reshape(-1, pose.betas.shape[-1])
    views = [
        render.render_body(body, rotations, shape, size=256, views=("front", "side"), frame=pose.frame)
        for rotations, shape in zip(flat, betas)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    render.save_png(path, render.contact_sheet(views, columns=min(4, len(views))))

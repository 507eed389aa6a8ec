"""``chatpose fit``: bodies from keypoints in images, joints in space or markers."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from chatpose_jax.data.readers.untrusted import load_npz, read_json
from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line
from smpl_jax import io, render
from smpl_jax.body import BodyModel
from smpl_jax.frames import Frame
from smpl_jax.keypoints import KEYPOINT_SETS, SMPL_VERTICES, keypoint_set
from smpl_jax.pose_writers import write_poses

if TYPE_CHECKING:
    from smpl_jax.fit import Fit

OPENPOSE = {25: "openpose25", 18: "coco18"}
"""Number of points of a person in OpenPose's JSON -> the set."""
KINDS = {"keypoints_2d": (2, 3), "joints": (3, 4), "markers": (3, 4)}
"""Arrays of an npz -> columns that they may have; the last is a confidence."""
WRITTEN = ("converged", "reasons", "errors", "seen", "names")
"""Fields of a fit that are written beside its poses."""
DRAWN, LISTED = 16, 20


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
    """Fits all people of a file. Prints how many fits converged, and which did not and why."""
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
    size: Any = args.image_size if args.image_size else given.more.get("image_size")
    if given.kind == "keypoints_2d" and size is None:
        raise UserError(f"{args.file}: the size of the images is not known; --image-size WIDTH HEIGHT")
    people = math.prod(given.values.shape[:-2])
    if not people:
        raise UserError(f"{args.file}: {given.kind} has the shape {given.values.shape}: nobody to fit")
    print(
        f"fitting {people} {'person' if people == 1 else 'people'}; the first time takes a minute to compile",
        file=sys.stderr,
    )
    try:
        if given.kind == "keypoints_2d":
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
    except ValueError as error:
        raise UserError(f"{args.file}: {error}") from None
    beside = {name: getattr(fitted, name) for name in WRITTEN}
    write_poses(args.out, fitted.pose, body=body.name, beside=beside)
    for line in report(fitted, "px" if given.kind == "keypoints_2d" else "m"):
        print(line, file=sys.stderr)
    if args.drawing:
        save_drawing(args.drawing, body, fitted)
        print(f"drawing: {args.drawing}", file=sys.stderr)
    print(args.out)
    return 0


def report(fitted: Fit, unit: str) -> Iterator[str]:
    """How many fits converged, and a line for each of the first that did not: which person, why, and how far its points are off."""
    off = fitted.errors[fitted.seen]
    median = f"; the points are {np.median(off):.3g} {unit} off in the median" if off.size else ""
    yield f"{int(fitted.converged.sum())} of {fitted.converged.size} fits converged{median}"
    guesses = np.argwhere(~fitted.converged)
    for person in guesses[:LISTED]:
        at, number = tuple(person), ", ".join(map(str, person))
        off = fitted.errors[at][fitted.seen[at]]
        points = f"; {len(off)} of {len(fitted.names)} points were seen"
        if off.size:
            points += f", {np.median(off):.3g} {unit} off in the median and {off.max():.3g} {unit} at most"
        yield f"person {number or 0} did not converge, its pose is a guess: {fitted.reasons[at]}{points}"
    if len(guesses) > LISTED:
        yield f"and {len(guesses) - LISTED} more that did not converge: converged and reasons in the file name them"


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
    if not isinstance(people, list):
        raise UserError(f"{file}: expected OpenPose's JSON, with a list people; found none")
    if not people:
        raise UserError(f"{file}: people is empty: OpenPose found nobody in this image, so there is nothing to fit")
    rows = [_numbers(file, number, person) for number, person in enumerate(people)]
    lengths, counts = {len(row) for row in rows}, [len(keypoint_set(name))] if name else list(OPENPOSE)
    count = next((count for count in counts if 3 * count in lengths), counts[0])
    for number, row in enumerate(rows):
        if len(row) != 3 * count:
            raise UserError(
                f"{file}: pose_keypoints_2d of person {number}: expected {count} × 3 numbers, x, y and confidence in "
                f"turn; found {len(row)}. For other sets than OpenPose's: --points"
            )
    name = name or OPENPOSE[count]
    values = np.stack(rows).reshape(len(people), count, 3)
    return Points("keypoints_2d", values, _set(file, name, count, "keypoints_2d"), {})


def _numbers(file: Path, number: int, person: Any) -> np.ndarray:
    try:
        row = np.array(person["pose_keypoints_2d"], np.float64)
    except (TypeError, KeyError, ValueError):
        row = np.empty(())
    if row.ndim != 1:
        raise UserError(
            f"{file}: person {number} has no list of numbers pose_keypoints_2d; expected x, y and confidence in turn"
        )
    return row


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


def save_drawing(path: Path, body: BodyModel, fitted: Fit) -> None:
    """Draws the first people, each from the front and from the side, with its number and whether it converged."""
    pose = fitted.pose
    flat = pose.rotations.reshape(-1, *pose.rotations.shape[-3:])[:DRAWN]
    betas = pose.betas.reshape(-1, pose.betas.shape[-1])
    views = [
        render.render_body(body, rotations, shape, size=256, views=("front", "side"), frame=pose.frame)
        for rotations, shape in zip(flat, betas)
    ]
    labels = [
        f"{number}" if converged else f"{number}: not converged"
        for number, converged in enumerate(fitted.converged.flat[: len(views)])
    ]
    render.save_png(path, render.contact_sheet(views, columns=min(4, len(views)), labels=labels))

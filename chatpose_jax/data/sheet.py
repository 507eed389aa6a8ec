"""Draws rows: text, images, and poses beside and over the images."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from chatpose_jax import storage
from chatpose_jax.data import store
from chatpose_jax.data.config import Split
from chatpose_jax.data.example import Example
from chatpose_jax.data.prepared import Prepared
from chatpose_jax.data.record import seeded
from chatpose_jax.errors import UserError
from chatpose_jax.processing.conversation import ImageSource, parse_messages
from chatpose_jax.processing.images import load_image
from chatpose_jax.settings import one_line
from chatpose_jax.storage import Location
from smpl_jax import body as bodies
from smpl_jax import render
from smpl_jax.body import BodyModel
from smpl_jax.io import load_body
from smpl_jax.pose import HANDS, SHARED, Pose, known, to_family, to_frame
from smpl_jax.raster import Camera

CELL, GAP, WORDS = 232, 8, 620
"""Pixels: side of an image or a view, distance, width of the text."""
MOST_IMAGES, MOST_POSES = 2, 2
NOT_MEASURED = (0.74, 0.52, 0.92)
"""sRGB of the parts of a body that were not measured: violet."""
_INK, _GREY, _BAND, _POINT = "#1b1b1f", "#6b6b75", "#2f3a4a", (40, 230, 90)
_ROLES = {"user": "#1b1b1f", "assistant": "#0b5d3b", "system": "#6b6b75", "text": "#0b5d3b"}
_SIZE = 15  # of the text
_FOCAL = 5000 / 256  # of the camera that is fitted to keypoints, in sides of the image; as 4D-Humans'
_PELVIS = {"smpl": (-0.002, -0.223, 0.028), "smplh": (-0.002, -0.223, 0.028), "smplx": (0.003, -0.351, 0.012)}
"""The pelvis of the mean bodies at rest, in metres. A translation is added to it."""
_KEYPOINTS = (
    {2: 17, 3: 19, 4: 21, 5: 16, 6: 18, 7: 20, 8: 0, 9: 2, 10: 5, 11: 8, 12: 1, 13: 4, 14: 7}
    | {25: 8, 26: 5, 27: 2, 28: 1, 29: 4, 30: 7, 31: 21, 32: 19, 33: 17, 34: 16, 35: 18, 36: 20}
)  # fmt: skip
"""Keypoints of OpenPose (25) and of 4D-Humans (19 more) -> the joint of SMPL at nearly the same place."""


class View(NamedTuple):
    """A camera, and the vertices (V, 3) of a body that it sees, in the camera frame. points: (K, 2) keypoints in pixels, maybe none."""

    camera: Camera
    vertices: np.ndarray
    points: np.ndarray

    def __repr__(self) -> str:
        return one_line(self)


def save_sheet(file: str | PathLike[str], folders: Sequence[str | PathLike[str]], samples: int = 3) -> Location:
    """Writes a PNG with some rows of each kind and split of prepared folders. Returns its path or address.
    The rows are drawn at random, and are always the same. A row that cannot be read shows its error instead.
    """
    rows = [row for folder in folders for row in _folder(storage.location(os.path.expanduser(folder)), samples)]
    note = "violet: not measured · green: keypoints · over: the body with the row's camera, or fitted to the keypoints"
    return write_png(storage.location(file), _below([_band(note, _GREY), *rows]))


def write_png(file: Location, image: Image.Image) -> Location:
    """Writes an image, whole or not at all, with its folder. Returns its path or address."""
    data = io.BytesIO()
    image.save(data, "PNG")
    storage.write_bytes(file, data.getvalue())
    return file


def _folder(folder: Location, samples: int) -> Iterator[Image.Image]:
    for split in get_args(Split):
        try:
            rows = Prepared(folder, split)
        except UserError as error:
            yield _band(str(error), "#a01818")
            continue
        for number, kind in enumerate(store.KINDS):
            found = np.flatnonzero(rows.entries["kind"] == number)
            if len(found):
                yield _band(f"{rows.description['name']} · {split} · {kind}: {len(found):,} rows", _BAND)
                chosen = seeded(0, "sheet", split, kind).choice(found, min(samples, len(found)), replace=False)
                for row in sorted(chosen.tolist()):
                    yield draw_row(rows, row)


def draw_row(rows: Sequence[Example], number: int, *, whole: bool = False) -> Image.Image:
    """One row of a data set. whole: all of its text, images and poses; otherwise as much as fits."""
    try:
        example = rows[number]
        title = f"row {number} · {example.id}"
        return draw(example, title, whole=whole)
    except UserError as error:
        return _words([(f"row {number}: {error}", "#a01818")], WORDS, CELL)


def draw(example: Example, title: str, *, whole: bool = False) -> Image.Image:
    """A row: its images, the first pose over the first image where the camera is known, each pose from the front and the side, and the text.

    Raises UserError for an image that cannot be read.
    """
    talk = parse_messages(example.messages)
    sources = [part for turn in talk.turns for part in turn.parts if isinstance(part, ImageSource)]
    counts = (len(sources), len(example.poses))
    shown = counts if whole else (min(counts[0], MOST_IMAGES), min(counts[1], MOST_POSES))
    images = [load_image(source.value, source.where) for source in sources[: shown[0]]]
    poses = [pose for pose in (example.poses[number] for number in range(shown[1])) if known(pose).any()]
    cells = [_cell(image, f"image, {image.width} by {image.height}") for image in images]
    if images and poses and (over := overlay(images[0], poses[0], example.extras)) is not None:
        cells.insert(1, _cell(over, "over"))
    for number, pose in enumerate(poses):
        name = f"pose {number + 1} " if len(poses) > 1 else ""
        views = body_views(pose)
        cells += [_cell(view, f"{name}{label}") for view, label in zip(views, ("front", "side"))]
    lines = [(title, _GREY)]
    for turn in talk.turns:
        text = " ".join(part if isinstance(part, str) else "[image]" for part in turn.parts)
        lines.append((f"{turn.role}: {text}", _ROLES[turn.role]))
    hidden = [
        f"{all_of - some} more {what}"
        for all_of, some, what in zip(counts, shown, ("images", "poses"))
        if all_of > some
    ]
    hidden += ["a pose of which nothing was measured"] if len(poses) < shown[1] else []
    lines += [(", ".join(hidden), _GREY)] if hidden else []
    return _beside([*cells, _words(lines, WORDS, None if whole else CELL)])


def body_views(pose: Pose, size: int = CELL) -> list[np.ndarray]:
    """A single pose from the front, which is what its camera sees, and from the side: (size, size, 3) uint8 each. The body is that of the
    package with its average shape; parts that were not measured are violet."""
    body, shown = _body(), _shown(pose)
    views = render.render_body(
        body, shown.rotations, size=size, views=("front", "side"), frame=pose.frame, colors=_colors(shown)
    )
    return np.split(views, 2, axis=1)


def overlay(image: Image.Image, pose: Pose, extras: Mapping[str, Any]) -> Image.Image | None:
    """The body of a single pose over an image, and the keypoints; None where no camera is known (``view``)."""
    found = view(pose, extras, image.size)
    if found is None:
        return None
    scale = CELL / max(image.size)
    camera = found.camera.scaled(scale)
    behind = np.asarray(image.resize((camera.width, camera.height), Image.Resampling.LANCZOS))
    drawn = render.render_mesh(
        found.vertices, np.asarray(_body().faces), frame="camera", camera=camera, colors=_colors(_shown(pose)), background=behind
    )  # fmt: skip
    blended = Image.blend(Image.fromarray(behind), Image.fromarray(drawn), 0.7)
    pen = ImageDraw.Draw(blended)
    for x, y in (found.points * scale).tolist():
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_POINT)
    return blended


def view(pose: Pose, extras: Mapping[str, Any], size: tuple[int, int]) -> View | None:
    """How the camera of a row's image sees its pose; None where extras have neither of these:

    - ``cam_int`` (3, 3) of the image; and the place of the pelvis in the camera frame, by ``joint_cam`` (24, 3) or by the translation, the pose's or
      ``trans_cam``, which belongs to a body of another shape, so the body of the package may be some centimetres off.
    - ``keypoints_2d`` (25 or 44, 3), OpenPose's and the 19 more of 4D-Humans; or ``joint_img`` (24, 2). A camera far away is fitted to them.

    size: width and height of the image. Pixels in extras have (0, 0) in the middle of the first one.
    """
    body, shown = _body(), _shown(pose)
    points, names = _points(extras)
    pelvis, intrinsics = _pelvis(pose, extras), np.asarray(extras.get("cam_int", ()), np.float64)
    width, height = size
    if pelvis is not None and pose.frame == "camera" and intrinsics.shape == (3, 3):
        x, y = (intrinsics[:2, 2] + 0.5).tolist()
        camera = Camera(width, height, float(intrinsics[0, 0]), (x, y))
        place = np.asarray(pelvis - np.asarray(bodies.pelvis(body)), np.float32)
        return View(camera, _vertices(body, shown) + place, points)
    shown = to_frame(shown, "camera")
    wanted, named = points[names >= 0], names[names >= 0]
    if len(named) < 4:
        return None
    joints = np.asarray(bodies.joints(body, shown.rotations), np.float64)[named]
    # wanted = scale * joints + shift
    one = np.ones(len(named))
    left = np.concatenate([np.stack([joints[:, axis], one * (axis == 0), one * (axis == 1)], 1) for axis in (0, 1)])
    scale, *shift = np.linalg.lstsq(left, wanted.T.ravel(), rcond=None)[0].tolist()
    if scale <= 0:
        return None
    focal = _FOCAL * max(size)
    camera = Camera(width, height, focal, (0.0, 0.0), (shift[0] / scale, shift[1] / scale, focal / scale))
    return View(camera, _vertices(body, shown), points)


def _points(extras: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The keypoints that were seen: (K, 2) pixels from the image's corner, and (K,) SMPL's joints at these places, -1 where there is none."""
    points = np.asarray(extras.get("keypoints_2d", ()), np.float64)
    if points.ndim == 2 and points.shape[1] == 3:
        numbers = range(len(points)) if len(points) in (25, 44) else ()
        joints = np.full(len(points), -1)
        joints[list(numbers)] = [_KEYPOINTS.get(number, -1) for number in numbers]
        seen = points[:, 2] > 0
        return points[seen, :2] + 0.5, joints[seen]
    points = np.asarray(extras.get("joint_img", ()), np.float64)
    if points.shape == (24, 2):
        return points + 0.5, np.arange(24)
    return np.empty((0, 2)), np.empty(0, np.int64)


def _pelvis(pose: Pose, extras: Mapping[str, Any]) -> np.ndarray | None:
    """Where the pelvis is in the camera frame, (3,) metres before the camera, or None."""
    has = pose.translation is not None and (pose.has_translation is None or bool(pose.has_translation))
    given = pose.translation if has else extras.get("trans_cam")
    joints, place = np.asarray(extras.get("joint_cam", ()), np.float64), None
    if joints.shape == (24, 3):
        place = joints[0]
    elif given is not None and pose.family in _PELVIS:
        place = np.asarray(given, np.float64) + _PELVIS[pose.family]
    return place if place is not None and place[2] > 0 else None


@functools.cache
def _body() -> BodyModel:
    return load_body()


def _shown(pose: Pose) -> Pose:
    """The pose on the package's body: without betas, which are those of another one, and at the origin. It has no fingers, and its hands count as
    measured where a finger was."""
    plain = pose.replace(**dict.fromkeys(("betas", "translation", "has_betas", "has_translation", "shape_space")))
    shown = to_family(plain, "smpl")
    if pose.hands is not None:
        measured = np.array(known(shown))
        measured[SHARED:] = known(pose)[-HANDS:].reshape(2, -1).any(1)
        shown = shown.replace(measured=measured)
    return shown


def _vertices(body: BodyModel, pose: Pose) -> np.ndarray:
    return np.asarray(bodies.vertices(body, np.asarray(pose.rotations, np.float32)), np.float32)


def _colors(pose: Pose) -> np.ndarray:
    colors, owner = _clothes()
    colors = colors.copy()
    colors[~known(pose)[owner]] = NOT_MEASURED
    return colors


@functools.cache
def _clothes() -> tuple[np.ndarray, np.ndarray]:
    body = _body()
    return render.clothing_colors(body), np.asarray(body.weights).argmax(0)


@functools.cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _cell(pixels: Any, label: str) -> Image.Image:
    """An image within a square, with a label below."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    scale = CELL / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL + 20), "white")
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    ImageDraw.Draw(cell).text((CELL // 2, CELL + 10), label, _GREY, _font(12), anchor="mm")
    return cell


def _band(text: str, color: str) -> Image.Image:
    lines = _wrap(text, 1500)
    band = Image.new(
        "RGB", (max(1000, 40 + round(max(map(_font(_SIZE).getlength, lines)))), 12 + 20 * len(lines)), color
    )
    for number, line in enumerate(lines):
        ImageDraw.Draw(band).text((10, 16 + 20 * number), line, "white", _font(_SIZE), anchor="lm")
    return band


def _words(texts: Sequence[tuple[str, str]], width: int, height: int | None) -> Image.Image:
    """Texts, each with its colour, broken into lines of this width; beyond the height they are cut off, with an ellipsis."""
    lines = [(line, color) for text, color in texts for line in _wrap(text, width)]
    step = _SIZE + 5
    if height is not None and len(lines) > (most := height // step):
        lines = [*lines[: most - 1], (f"{lines[most - 1][0]} …", lines[most - 1][1])]
    image = Image.new("RGB", (width + 40, max(step * len(lines), 1)), "white")
    pen = ImageDraw.Draw(image)
    for number, (line, color) in enumerate(lines):
        pen.text((0, step * number), line, color, _font(_SIZE))
    return image


def _wrap(text: str, width: int) -> list[str]:
    font, lines = _font(_SIZE), []
    for paragraph in text.splitlines() or [""]:
        rest = paragraph
        while font.getlength(rest) > width:
            place = max(1, int(len(rest) * width / font.getlength(rest)))
            place = next(
                (at for at in range(place, 0, -1) if rest[at] == " " and font.getlength(rest[:at]) <= width), place
            )
            lines.append(rest[:place])
            rest = rest[place:].lstrip()
        lines.append(rest)
    return lines


def _beside(images: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(i.width + GAP for i in images) + GAP, max(i.height for i in images) + 2 * GAP), "white")
    x = GAP
    for image in images:
        row.paste(image, (x, GAP))
        x += image.width + GAP
    return row


def _below(images: Sequence[Image.Image]) -> Image.Image:
    width = max(image.width for image in images)
    sheet = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    y = 0
    for image in images:
        if image.height < 60:  # a band
            sheet.paste(image.crop((0, 0, 1, 1)).resize((width, image.height)), (0, y))
        sheet.paste(image, (0, y))
        y += image.height
    return sheet

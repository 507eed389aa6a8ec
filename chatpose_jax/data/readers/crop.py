"""The square crop of 4D-Humans around a person, and its augmentation, for image, keypoints and pose alike.

Pixels are named as OpenCV names them: the centre of the first pixel is (0, 0). Facts from shubham-goel/4D-Humans, ``hmr2/datasets/utils.py`` and
``hmr2/configs_hydra/experiment/default.yaml``. Its training does not smooth images before it shrinks them (``USE_SKIMAGE_ANTIALIAS`` is off),
and neither does this.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image

from chatpose_jax.data.readers.untrusted import image_size
from chatpose_jax.errors import UserError
from chatpose_jax.processing.images import FORMATS, load_image
from smpl_jax.pose import Pose, mirror_pose

ASPECT = (192, 256)
"""Width and height of the crops of ViTPose; 4D-Humans' setting ``BBOX_SHAPE`` makes boxes at least so tall or wide."""
_LEFT_RIGHT = (
    *(
        (2, 5),
        (3, 6),
        (4, 7),
        (9, 12),
        (10, 13),
        (11, 14),
        (15, 16),
        (17, 18),
        (19, 22),
        (20, 23),
        (21, 24),
    ),  # OpenPose
    *((25, 30), (26, 29), (27, 28), (31, 36), (32, 35), (33, 34)),
)


def _twins() -> np.ndarray:
    twins = np.arange(44)
    for right, left in _LEFT_RIGHT:
        twins[[right, left]] = left, right
    return twins


TWINS = _twins()
"""(44,) for each keypoint of 4D-Humans (25 of OpenPose, 19 more), its counterpart on the other side."""


@dataclasses.dataclass(frozen=True)
class Change:
    """An augmentation. Nothing changes by default.

    scale: enlarges the box. turn: degrees by which the box turns clockwise, so that the person turns anticlockwise. flip: left and right change
    places, before anything else. shift: moves the box by these parts of its width and height. colours: factors of red, green and blue.
    """

    scale: float = 1.0
    turn: float = 0.0
    flip: bool = False
    shift: tuple[float, float] = (0.0, 0.0)
    colours: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Change:
        """As 4D-Humans draws it for training, without its "extreme" crops, which cut limbs off."""
        normal = rng.standard_normal(4)
        turns, flips = rng.random(2) < (0.6, 0.5)
        return cls(
            scale=1 + 0.3 * float(normal[0].clip(-1, 1)),
            turn=30 * float(normal[1].clip(-2, 2)) if turns else 0.0,
            flip=bool(flips),
            shift=tuple(0.02 * normal[2:].clip(-1, 1)),
            colours=tuple(rng.uniform(0.8, 1.2, 3)),
        )

    def matrix(self, center: Any, side: float, size: int, width: int) -> np.ndarray:
        """(2, 3) float64: from (x, y, 1) in an image to (x, y) in its crop.

        center, side: middle and side of the box in pixels. size: side of the crop. width: that of the image.
        """
        middle, mirrored = np.asarray(center, np.float64) + side * np.asarray(self.shift), np.eye(3)
        if self.flip:
            middle[0] = width - 1 - middle[0]
            mirrored[0] = -1, 0, width - 1
        cos, sin = np.cos(np.radians(self.turn)), np.sin(np.radians(self.turn))
        linear = np.array([[cos, sin], [-sin, cos]]) * (size / (side * self.scale))
        return np.column_stack([linear, size / 2 - linear @ middle]) @ mirrored

    def pose(self, pose: Pose) -> Pose:
        """The pose in the camera frame that the changed image shows.

        Where the body turns, the translation is dropped, because it turns about the pelvis of a body that is not known here.
        """
        if self.flip:
            pose = mirror_pose(pose)
        if self.turn:
            rotations = np.array(pose.rotations)
            rotations[..., 0, :, :] = self._turned() @ rotations[..., 0, :, :].astype(np.float64)
            pose = pose.replace(rotations=rotations, translation=None, has_translation=None)
        return pose

    def points(self, points: np.ndarray) -> np.ndarray:
        """Keypoints (44, 4) in metres in the camera frame with their confidence, as the changed image shows them."""
        points = np.array(points)
        if self.flip:
            points = points[TWINS] * np.asarray([-1, 1, 1, 1], points.dtype)
        points[:, :3] = points[:, :3] @ self._turned().T.astype(points.dtype)
        return points

    def _turned(self) -> np.ndarray:
        cos, sin = np.cos(np.radians(self.turn)), np.sin(np.radians(self.turn))
        return np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


def box_side(scale: Any, tall: bool = False) -> float:
    """The side in pixels of the square box, ``max(scale) * 200``.

    Args:
        scale: a number or (width, height): the box in units of 200 pixels.
        tall: first widen or heighten the box to ``ASPECT``, as 4D-Humans does for its released model (ViTPose sees that part of the crop).
    """
    width, height = np.broadcast_to(np.asarray(scale, np.float64).ravel(), 2) * 200
    if tall:
        width, height = max(width, height * ASPECT[0] / ASPECT[1]), max(height, width * ASPECT[1] / ASPECT[0])
    return float(max(width, height))


def stored_pixels(data: bytes, where: object) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an encoded image as it is stored: its EXIF orientation is ignored, as by the programs that made the keypoints.

    Raises UserError, which begins with ``where``, as ``load_image`` does.
    """
    image_size(data, where)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.mode == "RGB" and "transparency" not in image.info:  # nearly all: needs no copies
        try:
            return np.asarray(image)
        except Exception as error:  # decoders raise anything for damaged files
            raise UserError(f"{where}: the image is damaged or cut off ({error})") from None
    image.getexif().clear()
    return np.asarray(load_image(image, str(where)))


def warp(pixels: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """The crop (size, size, 3) uint8 of an image (H, W, 3) uint8: bilinear, black beyond the image.

    matrix: (2, 3), from the image to the crop, as of ``Change.matrix``.
    """
    height, width = pixels.shape[:2]
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    x, y = np.arange(size), np.arange(size)[:, None]
    # The image lies in zeros. One pixel beyond the edge it is black, so nothing further away need be looked at.
    columns = (back[0, 0] * x + back[0, 1] * y + back[0, 2]).clip(-1, width)
    rows = (back[1, 0] * x + back[1, 1] * y + back[1, 2]).clip(-1, height)
    left, top = np.floor(columns).astype(np.int32), np.floor(rows).astype(np.int32)
    first, last = (left.min(), top.min()), (left.max() + 2, top.max() + 2)
    part = np.zeros((last[1] - first[1], last[0] - first[0], 4), np.uint8)  # four bytes a pixel are one number to pick
    x0, y0, x1, y1 = max(first[0], 0), max(first[1], 0), min(last[0], width), min(last[1], height)
    part[y0 - first[1] : y1 - first[1], x0 - first[0] : x1 - first[0], :3] = pixels[y0:y1, x0:x1]
    flat, stride = part.reshape(-1).view(np.uint32), part.shape[1]
    at = (top - first[1]) * stride + left - first[0]

    def pick(offset: int) -> np.ndarray:
        return flat[at + offset].view(np.uint8).reshape(size, size, 4).astype(np.float32)

    right, below = (columns - left).astype(np.float32)[..., None], (rows - top).astype(np.float32)[..., None]
    upper, lower = pick(0), pick(stride)
    upper += (pick(1) - upper) * right
    lower += (pick(stride + 1) - lower) * right
    upper += (lower - upper) * below
    return (upper[..., :3] + np.float32(0.5)).astype(np.uint8)


def coloured(pixels: np.ndarray, colours: Any) -> np.ndarray:
    """uint8 pixels (..., 3) with their channels multiplied, at most 255."""
    if tuple(colours) == (1, 1, 1):
        return pixels
    return (pixels * np.asarray(colours, np.float32) + np.float32(0.5)).clip(0, 255).astype(np.uint8)


def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points (..., n) whose first two numbers are pixels of the image, in pixels of the crop, float32. Other numbers stay."""
    points = np.array(points, np.float64)
    points[..., :2] = points[..., :2] @ matrix[:, :2].T + matrix[:, 2]
    return points.astype(np.float32)


def to_jpeg(pixels: np.ndarray) -> bytes:
    """A JPEG of quality 95, with colours at full resolution."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def check_box(center: np.ndarray, side: float, size: tuple[int, int]) -> None:
    """Raises UserError unless a box is finite, at least one pixel wide, and meets the image of this width and height."""
    if not (np.isfinite(center).all() and np.isfinite(side) and 1 <= side <= 1e6):
        raise UserError(f"expected a box of at least one pixel, found {side:.6g} pixels around {center.tolist()}")
    if not meets(center, side, size):
        raise UserError(
            f"expected a box in the image of {size[0]} × {size[1]} pixels, found {side:.6g} pixels around {center.tolist()}"
        )


def meets(center: np.ndarray, side: float, size: tuple[int, int]) -> bool:
    """Whether a square box has a part of the image of this width and height."""
    return bool((np.abs(center - np.array(size) / 2) < (np.array(size) + side) / 2).all())


def to_matrices(axis_angle: np.ndarray, most: float = 100.0) -> np.ndarray:
    """Rotation matrices (..., 3, 3) float32 of axis-angle vectors (..., 3) in radians. NumPy only: processes that read need no JAX device.

    Raises UserError for vectors that are not finite, or not shorter than ``most``: they are in degrees, or no rotations.
    """
    vectors = np.asarray(axis_angle, np.float64)
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    if not (angle < most).all():
        raise UserError(
            f"expected rotations as axis-angle vectors in radians, found one of {angle.max():.3g}; multiply degrees by π/180"
        )
    x, y, z = np.moveaxis(vectors, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    # sin(a)/a and (1 - cos(a))/a², which np.sinc gives at 0 too
    first, second = np.sinc(angle / np.pi), np.sinc(angle / (2 * np.pi)) ** 2 / 2
    return (np.eye(3) + first * cross + second * (cross @ cross)).astype(np.float32)

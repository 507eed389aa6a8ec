"""Descriptions of a person in an image by behaviour, shape, outfit, pose, and all of these, for ``readers.rpe``."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from chatpose_jax.data.build import Item
from chatpose_jax.data.config import Split
from chatpose_jax.data.prepared import Prepared
from chatpose_jax.data.readers.rpe import FILE, TYPES
from chatpose_jax.data.readers.untrusted import image_size
from chatpose_jax.data.record import Record
from chatpose_jax.endpoint import Messages
from chatpose_jax.errors import UserError
from smpl_jax._files import write_whole
from smpl_jax.pose import Pose, known, to_family, to_frame
from smpl_jax.rotations import matrix_to_axis_angle

INSTRUCTIONS = """You see an image with one or more people, and the box of one of them in pixels: left, top, width, height. Describe this \
person so that a reader finds them among the others. Do not mention the box. Write five texts of one or two sentences:
"behaviour": what the person does, to whom or with what. "shape": build, height, age, hair. "outfit": clothes and what is worn or carried. \
"pose": trunk, arms, legs and head, with their directions. "summary": the most telling of these four together.
Answer with a JSON object of these five texts."""


class RpeBuilder:
    """Describes the people of a prepared data set with images, as ChatPose's authors did for 50 images of 3DPW.

    source: a folder that ``chatpose data prepare`` wrote; records with one image and one pose are taken. For images of several people
    prepare 3DPW with ``--set crop=false``. split: of that folder, and of the rows.

    Raises UserError where the folder is not there.
    """

    def __init__(self, source: Path, *, split: Split = "test") -> None:
        if split not in get_args(Split):
            raise UserError(f"split must be one of {', '.join(get_args(Split))}; found {split!r}")
        self.split, self.rows = split, Prepared(source, split)
        if not len(self.rows):
            raise UserError(f"{source} has no rows in split {split!r}; choose another, --set split=train")

    def file(self, row: Mapping[str, Any]) -> str:
        return FILE

    def items(self) -> Sequence[Item]:
        """The records with one image and one pose."""
        seen: set[str] = set()
        items = []
        for index in range(len(self.rows)):
            record = self.rows.record(index)
            if len(record.images) == 1 and len(record.poses) == 1 and record.key not in seen:
                seen.add(record.key)
                items.append(Item(record.key, index))
        if not items:
            raise UserError(
                f"{self.rows.folder} has no record with one image and one pose in split {self.split!r}; expected a data set of images, "
                "for example 3dpw"
            )
        return items

    def names(self) -> Sequence[str]:
        return TYPES

    def messages(self, item: Item) -> Messages:
        record = self.rows.record(item.place)
        return descriptions_of(record.images[0], box_of(record))

    def by_rule(self, item: Item) -> Mapping[str, str]:
        raise UserError(
            "there are no rules that describe a photograph: name a --model that sees images, "
            "or build descriptions of the generated set with --source generated"
        )

    def row(self, item: Item, name: str, text: str, folder: Path) -> dict[str, Any]:
        """A line of ``rpe.jsonl``. The image is written to ``images/``."""
        record = self.rows.record(item.place)
        return {
            "id": item.id,
            "type": name,
            "image": write_image(folder, item.id, record.images[0]),
            "description": text,
            "box": box_of(record),
            **pose_fields(record.poses),
            "split": self.split,
            "group": record.group or item.id,
        }


def descriptions_of(image: bytes, box: Sequence[float]) -> Messages:
    """Asks a model that sees images for the five descriptions of the person in a box."""
    kind = suffix(image).lstrip(".").replace("jpg", "jpeg")
    url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    words = f"The box: {', '.join(str(round(number)) for number in box)}."
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]
    return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": parts}]


def box_of(record: Record) -> list[float]:
    """Left, top, width and height of the person, from what the readers keep (``bbox``; or ``box``, the middle and the side); else the whole image."""
    extras = record.extras
    width, height = image_size(record.images[0], record.key)
    if "bbox" in extras:
        return np.asarray(extras["bbox"], float).round(1).tolist()
    full = tuple(np.asarray(extras.get("image_size", ())).tolist())
    if "box" in extras and full == (width, height):  # the image is not cropped
        x, y, side = np.asarray(extras["box"], float).tolist()
        return [round(number, 1) for number in (x - side / 2, y - side / 2, side, side)]
    return [0.0, 0.0, float(width), float(height)]


def pose_fields(poses: Pose) -> dict[str, Any]:
    """``pose`` and ``measured`` of a line of ``rpe.jsonl``: the first pose, as SMPL's 24 joints in the camera frame."""
    pose = poses.replace(translation=None, has_translation=None)
    pose = to_family(to_frame(pose, "camera"), "smpl")
    angles = np.asarray(matrix_to_axis_angle(np.asarray(pose.rotations[0], np.float32)), float)
    return {"pose": angles.ravel().round(6).tolist(), "measured": np.asarray(known(pose))[0].tolist()}


def write_image(folder: Path, name: str, data: bytes) -> str:
    """Writes an image into ``images/``, unless it is there. Returns the path relative to the folder: ``name`` in safe letters, and a hash of the
    image, because two names may have the same letters."""
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    relative = f"images/{safe}-{hashlib.sha256(data).hexdigest()[:8]}{suffix(data)}"
    if not (folder / relative).is_file():
        write_whole(folder / relative, lambda file: file.write(data))
    return relative


def suffix(data: bytes) -> str:
    """The suffix for the format of an encoded image."""
    for start, name in ((b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"RIFF", ".webp"), (b"BM", ".bmp")):
        if data.startswith(start):
            return name
    return ".jpg"

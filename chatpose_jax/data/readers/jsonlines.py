"""Your own data: conversations, images and poses as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np

from chatpose_jax.data.config import Split
from chatpose_jax.data.example import NO_POSES, Kind
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers.crop import to_matrices
from chatpose_jax.data.readers.json_rows import Rows, read_rows, split_rows
from chatpose_jax.data.readers.json_schema import JsonSchema
from chatpose_jax.data.readers.llava import read_image
from chatpose_jax.data.readers.untrusted import inside, parse_json
from chatpose_jax.data.record import Record
from chatpose_jax.errors import UserError
from chatpose_jax.processing.conversation import POSE, parse_messages
from chatpose_jax.settings import whole
from smpl_jax.pose import Pose, check, stack

MOST_RADIANS = 4 * np.pi
"""A rotation by more is in degrees, or none. Fits have some that are a little above 2π."""


def schema_text() -> str:
    """The JSON Schema of a row, as ``chatpose data schema`` prints it."""
    return (resources.files("chatpose_jax.data.readers") / "row.schema.json").read_text(encoding="utf-8")


class JsonLines:
    """Reads ``train.jsonl``, ``val.jsonl`` and ``test.jsonl``: one row in each line, as the packaged ``row.schema.json`` describes it.

    A row has ``id``, ``messages``, ``poses`` (as axis-angle, 6D or matrices, each with its frame), ``group``, and ``captions`` of its first pose,
    which become the tuple ``caption`` in ``extras``. Paths of images are relative to the
    folder of the files, and cannot leave it. Frames stay as they are. A row that shows poses is of kind "image" or "text", others are
    instructions.

    A line that does not fit is reported with its file, line and field, and left out.

    Beyond the schema: there is one pose for each ``<POSE>`` in the assistant's messages; all poses of a row have one frame and one number of
    joints, and are rotations; user and assistant take turns; images are only in messages of the user, and are there.

    Options: max_side: images whose longer side has more pixels are resized to it and written as JPEG; 0 for none.
    """

    about: ClassVar[About] = About(
        title="Your own rows, as JSON lines",
        licence="your own",
        page="docs/data-sets.md, section jsonlines",
        files=(
            "train.jsonl, val.jsonl, test.jsonl (at least one), with rows as `chatpose data schema` describes them",
            "the images that the rows name",
        ),
    )

    def __init__(self, source: Path, *, max_side: int = 0) -> None:
        self.source, self.max_side = source, whole("max_side", max_side, 0)
        files = [source / f"{split}.jsonl" for split in get_args(Split)]
        if not any(file.is_file() for file in files):
            raise missing(self.about, *files)
        self.schema = JsonSchema(json.loads(schema_text()))

    def parts(self, split: Split) -> Sequence[Rows]:
        """Neighbouring lines of the split's file."""
        file = f"{split}.jsonl"
        return split_rows(self.source, file) if (self.source / file).is_file() else ()

    def read(self, split: Split, part: Rows) -> Iterator[Record | Skipped]:
        """The rows of a part, in their order."""
        for number, line in read_rows(self.source, part):
            key, where = f"{split}#{number}", f"{part.file}, line {number}"
            try:
                row = parse_json(line, where)
            except UserError as error:
                yield Skipped(key, "a damaged line", True, f"{error}")
                continue
            try:
                self.schema.check(row)
                yield self._record(f"{key}/{row['id']}", row)
            except (UserError, OSError) as error:  # OSError: a name that no file can have
                yield Skipped(key, "a row that does not fit", True, f"{where}: {error}")

    def _record(self, key: str, row: Mapping[str, Any]) -> Record:
        paths: list[Path] = []
        messages = tuple(
            {**message, "content": self._content(message["content"], paths)} for message in row["messages"]
        )
        parse_messages([_with_paths(message) for message in messages])
        if not {"assistant", "text"} & {message["role"] for message in messages}:
            raise UserError("messages: expected an answer of the assistant, or a single message of plain text")
        if absent := [path for path in paths if not path.is_file()]:
            raise UserError(f"messages: no image at {absent[0]}")
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        found = sum(text.count(POSE) for content in answers for text in _texts(content))
        poses = row.get("poses", ())
        if found != len(poses):
            raise UserError(
                f"poses: expected one for each of {found} {POSE} in the assistant's messages, found {len(poses)}"
            )
        kind: Kind = "instruction" if not poses else "image" if paths else "text"
        return Record(
            key,
            kind,
            (messages,),
            images=tuple(read_image(path, max_side=self.max_side) for path in paths),
            poses=_poses(poses) if poses else NO_POSES,
            group=row.get("group", ""),
            extras={"caption": tuple(row["captions"])} if row.get("captions") else {},
        )

    def _content(self, content: Any, paths: list[Path]) -> Any:
        """The content of a message as a record has it. The paths of its images are added to ``paths``."""
        if isinstance(content, str):
            return content
        parts = []
        for part in content:
            name = part.get("image") or part.get("image_url", {}).get("url")
            if name:
                paths.append(inside(self.source, name))
            parts.append({"type": "image"} if name else part)
        return parts


def _with_paths(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message for ``parse_messages``, which opens no image."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [{**part, "image": "x"} if part["type"] == "image" else part for part in content]}


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content]


def _poses(rows: Sequence[Mapping[str, Any]]) -> Pose:
    """Raises UserError for poses that do not belong together, or are no rotations."""
    try:
        return check(stack([_pose(row) for row in rows]))
    except (ValueError, OverflowError) as error:
        raise UserError(f"poses: {error}") from None


def _pose(row: Mapping[str, Any]) -> Pose:
    if "axis_angle" in row:
        rotations = to_matrices(np.asarray(row["axis_angle"], np.float64), MOST_RADIANS)
    elif "rotation_6d" in row:
        rotations = _from_6d(np.asarray(row["rotation_6d"], np.float64))
    else:
        rotations = np.asarray(row["matrices"], np.float32)
    given = {name: np.asarray(row[name], np.float32) for name in ("betas", "translation") if name in row}
    measured = np.asarray(row["measured"], bool) if "measured" in row else None
    return Pose(rotations, row["frame"], **given, measured=measured, shape_space=row.get("shape_space"))


def _from_6d(values: np.ndarray) -> np.ndarray:
    """Matrices (J, 3, 3) float32 of their first two columns (J, 6), by Gram-Schmidt."""
    with np.errstate(invalid="ignore", divide="ignore"):
        first = values[:, :3] / np.linalg.norm(values[:, :3], axis=-1, keepdims=True)
        second = values[:, 3:] - (first * values[:, 3:]).sum(-1, keepdims=True) * first
        second /= np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], -1).astype(np.float32)

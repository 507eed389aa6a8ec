"""PoseLLaVA: questions about poses in words, images and pose numbers, each answered with a pose."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers.crop import to_matrices
from chatpose_jax.data.readers.humans4d import H36M
from chatpose_jax.data.readers.json_rows import Rows, json_form, read_rows, split_rows
from chatpose_jax.data.readers.llava import image_names, messages_of, read_image, row_id, row_of
from chatpose_jax.data.readers.posefix import described
from chatpose_jax.data.readers.posescript import exchange, pick
from chatpose_jax.data.readers.untrusted import inside
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.errors import UserError
from chatpose_jax.processing.conversation import POSE
from smpl_jax.pose import SHARED, Pose

INPUT = "<pose>"
"""In the user's words: the pose of ``input_pose``, which their model reads as numbers."""
FEET, HANDS = (10, 11), (22, 23)
_SPLITS = {"test": "test", "eval": "test", "val": "val", "validation": "val"}


class PoseLlava:
    """Reads rows of PoseLLaVA and of its data set PosePart: JSON lists or JSON lines of

    ``{"id", "image"?, "input_pose"?: [72], "target_pose": [72], "conversations": [human, gpt]}``,

    with ``<POSE>`` in the answer, ``<image>`` and ``<pose>`` (the input pose) in the question. Poses are axis-angle of SMPL, with the root in the
    camera frame. There are no betas.

    This package's models do not read pose numbers. So a row with an input pose gets an exchange before it: a description of that pose by this
    package's rules (``data.synthetic.captions``), answered with the pose. ``<pose>`` is taken out of the question, which then speaks of the pose
    before.

    SMPL's two hands are not measured and are set to the identity: rows made from AMASS have constants there (mean angles of two fingers of
    SMPL-H), and Human3.6M has no markers on fingers. A foot whose three numbers are exactly zero in a row is not measured there.

    ``group`` is the subject and action of an image of Human3.6M, as in ``readers.humans4d``. Other rows do not say where they come from.

    ``extras``: ``file`` (its name below the source folder), ``task`` ("generation" without input, "estimation" with an image of Human3.6M,
    "adjustment" otherwise), ``input_pose`` (bool).

    Options:
        split: of all rows. "auto" goes by the words in a file's path below the source folder: test or eval, val or validation, otherwise
            "train".
        images: the folder that names of images are relative to. By default that is ``images`` beside the JSON file.
        seed: of descriptions and words.

    Source: the repository ustcfd/PoseLLaVA (``loaders/custom_dataset/posellava_dataset.py``, ``ds_config/test_dataset``).
    """

    about: ClassVar[About] = About(
        title="PoseLLaVA and PosePart",
        licence="none is stated; the poses are AMASS's, Human3.6M's and PoseScript's, all for non-commercial research only",
        page="https://github.com/ustcfd/PoseLLaVA",
        files=(
            "JSON files of rows at any depth, such as posepart_train.json or ds_config/test_dataset of the repository",
            "the images of a JSON file in a folder images beside it",
        ),
        options=("--set images=FOLDER is the folder of all images",),
    )

    def __init__(
        self,
        source: Path,
        *,
        split: Literal["auto", "train", "val", "test"] = "auto",
        images: str = "",
        seed: int = 0,
    ) -> None:
        self.source, self.split, self.seed = source, split, seed
        self.images = Path(images).expanduser() if images else None
        if self.images and not self.images.is_dir():
            raise missing(self.about, self.images)
        self.files = [file for file in _json_files(source) if file.endswith("l") or json_form(source / file) == "list"]
        if not self.files:
            raise missing(self.about, source / "*.json")

    def parts(self, split: Split) -> Sequence[Rows]:
        """Neighbouring rows of the files, in the order of the names. Each file is read once for this."""
        files = [file for file in self.files if self._split_of(file) == split]
        return [part for file in files for part in split_rows(self.source, file)]

    def read(self, split: Split, part: Rows) -> Iterator[Record | Skipped]:
        """The rows of a part, in their order."""
        for number, data in read_rows(self.source, part):
            key = f"{part.file}#{number}"
            try:
                row = row_of(data, key)
                key = f"{key}/{row_id(row)}"
                yield self._record(key, part.file, row)
            except (UserError, OSError) as error:  # OSError: a name that no file can have
                yield Skipped(key, "a damaged row or image", True, f"{error}")

    def _split_of(self, file: str) -> str:
        words = re.split("[^a-z]+", file.lower())
        found = next((_SPLITS[word] for word in words if word in _SPLITS), "train")
        return found if self.split == "auto" else self.split

    def _record(self, key: str, file: str, row: Mapping[str, Any]) -> Record | Skipped:
        given, targets = (_poses(row, name) for name in ("input_pose", "target_pose"))
        names = image_names(row)
        folder = self.images or (self.source / file).parent / "images"
        paths = [inside(folder, name) for name in names]
        if absent := [path for path in paths if not path.is_file()]:
            return Skipped(key, "an image is not there", detail=f"no {absent[0]}")
        talk = messages_of(row.get("conversations"), len(names))
        if not len(given) and any(INPUT in str(message["content"]) for message in talk[::2]):
            raise UserError(f"a question holds {INPUT}, and there is no input_pose")
        messages = [_without_mark(message) for message in talk]
        found = sum(str(message["content"]).count(POSE) for message in messages[1::2])
        if found != len(targets) or not found:
            raise UserError(f"the answers hold {found} {POSE}, and target_pose {len(targets)} poses of 72 numbers")
        poses = np.concatenate([given, targets])
        rotations = to_matrices(poses)
        measured = np.ones(poses.shape[:2], bool)
        measured[:, FEET] = (poses[:, FEET] != 0).any(-1)
        measured[:, HANDS], rotations[:, HANDS] = False, np.eye(3)
        pose = Pose(rotations, "camera", measured=measured)
        rng = seeded(self.seed, "posellava", key)
        before = [
            message
            for each in pose[: len(given)]
            for message in exchange(
                pick(rng, questions.TEXT_TO_POSE).format(caption=described(rng, each)),
                pick(rng, questions.POSE_ANSWERS),
            )
        ]
        clip = re.search(H36M.group, names[0]) if names else None
        return Record(
            key,
            "image" if names else "text",
            ((*before, *messages),),
            images=tuple(map(read_image, paths)),
            poses=pose,
            group="_".join(clip.groups()) if clip else "",
            extras={
                "file": file,
                "task": "estimation" if clip else "adjustment" if names or len(given) else "generation",
                "input_pose": bool(len(given)),
            },
        )


def _json_files(source: Path) -> list[str]:
    """The JSON files below a folder, by name; links to folders are not followed."""
    return sorted(
        Path(folder, name).relative_to(source).as_posix()
        for folder, _, names in os.walk(source)
        for name in names
        if name.endswith((".json", ".jsonl")) and not name.startswith(".")
    )


def _poses(row: Mapping[str, Any], name: str) -> np.ndarray:
    """Poses (P, 24, 3) of a field; none where it is not there. Raises UserError for anything but 72 finite numbers a pose."""
    try:
        values = np.asarray(() if row.get(name) is None else row[name], np.float64).reshape(-1, 24, 3)
    except (ValueError, TypeError):
        raise UserError(f"{name}: expected 72 numbers for each pose, found {row[name]!r:.100}") from None
    if not np.isfinite(values).all():
        raise UserError(f"{name}: expected finite numbers")
    if not values[:, :SHARED].any(axis=(1, 2)).all():
        raise UserError(f"{name}: all numbers of a pose are zero, which is no pose: the body would stand on its head")
    return values


def _without_mark(message: dict[str, Any]) -> dict[str, Any]:
    """A message of which ``<pose>`` is taken out, if it is the user's."""
    if message["role"] != "user":
        return message
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": _plain(content)}
    return {
        **message,
        "content": [{**part, "text": _plain(part["text"])} if "text" in part else part for part in content],
    }


def _plain(text: str) -> str:
    return text.replace(INPUT, "").strip()

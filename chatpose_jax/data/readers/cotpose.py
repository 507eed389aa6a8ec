"""CoT-Pose: actions in a few words, descriptions of the body in these actions, and poses."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers.amass import Place, to_view, yaw_of
from chatpose_jax.data.readers.crop import to_matrices
from chatpose_jax.data.readers.json_rows import Rows, read_rows, split_rows
from chatpose_jax.data.readers.llava import row_of
from chatpose_jax.data.readers.posescript import Release, exchange, pick
from chatpose_jax.data.readers.untrusted import read_lines
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole
from smpl_jax.frames import Frame
from smpl_jax.pose import SHARED, Pose, stack, to_frame

FEET = (10, 11)
_UPRIGHT = 0.7  # cosine of 45 degrees, rounded down


class CotPose:
    """Reads CoT-Pose's rows: ``{"pose_id", "action", "reasoning", "reasoning_refined", "answer", "pose_param": [66]}``.

    ``action`` is a few words such as "throw the ball", ``reasoning`` a description of the body, ``reasoning_refined`` the same in better words
    (empty in rows of real motion), ``answer`` pose tokens of another model, which are not read. ``pose_param`` is axis-angle of SMPL's first 22
    joints. There are no betas.

    Rows of real motion have the id of a pose of PoseScript V2 in ``pose_id``, and are frames of AMASS as they are: z-up, turned in any direction.
    Other rows ("syn", "syn_test") do not state their frame: it is taken to be the one in which the body is upright; a row
    without such a frame is left out. The yaw of all poses is removed, and they are in the camera frame, as PoseScript's.
    Feet whose numbers are exactly zero are not measured.

    A ``reasoning_refined`` that belongs to several actions of a file is not used: the published code writes the last one of the training rows to
    all test rows.

    ``group``: the AMASS file, with the option ``posescript``; otherwise "".

    ``extras``: ``action``, ``reasoning`` (the one that is used), ``synthetic`` (bool).

    Options:
        question: "action" asks for the pose of the action, as CoT-Pose; "reasoning" gives the description instead.
        answer: "reasoning" gives the description before the pose, as CoT-Pose (not with question "reasoning"); "pose" the pose only.
        posescript: the folder of PoseScript V2, whose table names the AMASS files.
        variants: rows for each row of "train", with other words around them. "val" and "test" have one.
        seed: of the draws.

    Source: the repository JunukCha/cot-pose (``preprocessing.py``, ``train.py``).
    """

    about: ClassVar[About] = About(
        title="CoT-Pose",
        licence="as its page says; the poses are AMASS's, words also PoseScript's and BABEL's, all for non-commercial research only",
        page="https://huggingface.co/datasets/Jucha/cot-poses-data",
        files=(
            "train.jsonl, val.jsonl, test.jsonl (as many as you have). Python writes them: "
            "from datasets import load_dataset; "
            "[rows.to_json(f'{split}.jsonl') for split, rows in load_dataset('Jucha/cot-poses-data').items()]",
        ),
        options=("--set posescript=FOLDER is PoseScript V2, which names the AMASS files of the poses (not necessary)",),
    )

    def __init__(
        self,
        source: Path,
        *,
        question: Literal["action", "reasoning"] = "action",
        answer: Literal["reasoning", "pose"] = "reasoning",
        posescript: str = "",
        variants: int = 1,
        seed: int = 0,
    ) -> None:
        if question == answer:
            raise UserError("with question=reasoning the description is in the question; give answer=pose too")
        self.source, self.question, self.answer = source, question, answer
        self.variants, self.seed = whole("variants", variants, 1), seed
        self.places = Release(self.about, Path(posescript).expanduser(), "v2") if posescript else None
        files = [source / f"{split}.jsonl" for split in get_args(Split)]
        if not any(file.is_file() for file in files):
            raise missing(self.about, *files)
        self._repeated: dict[Split, Collection[str]] = {}

    def parts(self, split: Split) -> Sequence[Rows]:
        """Neighbouring rows of the split's file."""
        file = f"{split}.jsonl"
        return split_rows(self.source, file) if (self.source / file).is_file() else ()

    def read(self, split: Split, part: Rows) -> Iterator[Record | Skipped]:
        """The rows of a part, in their order."""
        if split not in self._repeated:
            self._repeated[split] = _repeated(self.source / part.file)
        for number, data in read_rows(self.source, part):
            key = f"{split}#{number}"
            try:
                yield self._record(split, key, row_of(data, f"{part.file}, line {number}"))
            except UserError as error:
                yield Skipped(key, "a damaged row", True, f"{error}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_repeated": {}}

    def _record(self, split: Split, key: str, row: Mapping[str, Any]) -> Record | Skipped:
        action, plain, refined = (_text(row, name) for name in ("action", "reasoning", "reasoning_refined"))
        reasoning = _sentence(refined if refined and refined not in self._repeated[split] else plain)
        if not action or not reasoning:
            return Skipped(key, "no action, or no reasoning")
        pose_id = str(row.get("pose_id") or "")
        real = bool(re.fullmatch("[0-9]{1,9}", pose_id))
        pose = _pose(row.get("pose_param"), real)
        if pose is None:
            return Skipped(key, "the body stands upright in no known frame")
        talks = []
        for variant in range(self.variants if split == "train" else 1):
            rng = seeded(self.seed, "cotpose", key, variant)
            if self.question == "action":
                asked = pick(rng, questions.MOTION_TO_POSE).format(motion=action.rstrip(" .!?"))
            else:
                asked = pick(rng, questions.TEXT_TO_POSE).format(caption=reasoning)
            answer = pick(rng, questions.POSE_ANSWERS)
            talks.append(exchange(asked, f"{reasoning} {answer}" if self.answer == "reasoning" else answer))
        place = self.places.place(pose_id) if self.places and real else None
        return Record(
            key,
            "text",
            tuple(talks),
            poses=stack([to_view(pose, yaw_of(pose))]),
            group=place.file if isinstance(place, Place) else "",
            extras={"action": action, "reasoning": reasoning, "synthetic": not real},
        )


def _repeated(file: Path) -> Collection[str]:
    """The refined texts of a file that belong to several actions."""
    actions = defaultdict(set)
    for number, line in read_lines(file):
        try:
            row = row_of(line, f"line {number}")
            actions[_text(row, "reasoning_refined")].add(_text(row, "action"))
        except UserError:  # ``read`` reports it
            continue
    return {text for text, some in actions.items() if len(some) > 1}


def _text(row: Mapping[str, Any], name: str) -> str:
    """A field of text, with white space as one space; "" where it is null or not there. Raises UserError for other values."""
    value = row.get(name)
    if not isinstance(value, str | None):
        raise UserError(f"{name}: expected text, found {value!r:.100}")
    return " ".join((value or "").split())


def _sentence(text: str) -> str:
    return text if not text or text[-1] in ".!?" else f"{text}."


def _pose(values: Any, real: bool) -> Pose | None:
    """A pose of 22 joints in the z-up frame; None where its frame is not known. Raises UserError for anything but 66 finite numbers."""
    try:
        vectors = np.asarray(values, np.float64).reshape(SHARED, 3)
    except (ValueError, TypeError):
        raise UserError(f"pose_param: expected {3 * SHARED} numbers, found {values!r:.100}") from None
    if not np.isfinite(vectors).all():
        raise UserError("pose_param: expected finite numbers")
    rotations, measured = to_matrices(vectors), np.ones(SHARED, bool)
    measured[list(FEET)] = (vectors[list(FEET)] != 0).any(-1)
    up = rotations[0, :, 1]
    frames: dict[Frame, bool] = {
        "z-up": real or up[2] > _UPRIGHT,
        "model": up[1] > _UPRIGHT,
        "camera": up[1] < -_UPRIGHT,
    }
    frame = next((name for name, holds in frames.items() if holds), None)
    return None if frame is None else to_frame(Pose(rotations, frame, measured=measured), "z-up")

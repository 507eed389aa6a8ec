"""Systems that are evaluated: what they are asked and what they answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.data.questions import caption_in
from chatpose_jax.data.readers.crop import to_matrices
from chatpose_jax.settings import one_line
from smpl_jax.pose import Pose, check_shapes, no_rotations
from smpl_jax.rotations import matrix_to_axis_angle

ABOUT = (
    "actor",
    "bbox",
    "box",
    "cam_int",
    "description",
    "frame",
    "gender",
    "id",
    "image",
    "image_size",
    "pose_id",
    "question_id",
    "type",
)
"""The extras of a row that a question passes on: names, boxes, cameras. None of them tells the answer."""

NEAR = 0.05
"""How far R Rᵀ of an answered matrix R may be from 1."""

SYSTEMS: dict[str, str] = {
    "chatpose": "chatpose_jax.evaluation.systems.chatpose:ChatPoseSystem",
    "described": "chatpose_jax.evaluation.systems.described:Described",
    "endpoint": "chatpose_jax.evaluation.systems.endpoint:EndpointSystem",
    "function": "chatpose_jax.evaluation.systems.function:FunctionSystem",
    "keypoints": "chatpose_jax.evaluation.systems.keypoints:Keypoints",
    "mean": "chatpose_jax.evaluation.systems.simple:Mean",
    "predictions": "chatpose_jax.evaluation.systems.predictions:Predictions",
    "nearest": "chatpose_jax.evaluation.systems.simple:Nearest",
    "pose_vae": "chatpose_jax.evaluation.systems.pose_vae:TextToPose",
    "ridge": "chatpose_jax.evaluation.systems.simple:Ridge",
}
"""Systems in the package: name -> ``package.module:Class``. Each is called with its options by keyword."""


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A row without its answer.

    key: id of the row. group: the sequence or motion file that it comes from. kind: as in ``Example``. messages: those before the first answer.
    about: those extras of the row that ``ABOUT`` names. wants: what the task scores. A system that is asked for a pose and gives none may ask its
    model again.
    """

    key: str
    group: str
    kind: str
    messages: list[dict[str, Any]]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wants: Literal["pose", "words"] = "pose"

    __repr__ = one_line

    @classmethod
    def of(cls, row: Example) -> Question:
        """The first question of a row. It wants a pose where the row has one."""
        about = {name: row.extras[name] for name in ABOUT if name in row.extras}
        return cls(row.id, row.group, row.kind, first_question(row), about, "pose" if len(row.poses) else "words")


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """An answer of a system.

    text: its words, "" if it has none. pose: a ``Pose`` of batch shape (), in any frame; None if it gives none. joints: positions in metres,
    (K, 3) for each named set of joints (``smpl_jax.keypoints``), along the axes of the camera frame, of a system that gives positions instead of
    a pose or beside it. notes: what the report counts or averages; a bool is counted where it is True, under its name (``scores.counts_of``), such
    as ``{"keypoints not parsed": True}``. boxes: None, or for a system that answers with P people of the image (P, 4) left, top, width and height
    in its pixels; then ``pose`` has the batch shape (P,), and a task looks for the person that was asked for.
    """

    text: str = ""
    pose: Pose | None = None
    joints: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, bool | float | str] = dataclasses.field(default_factory=dict)
    boxes: np.ndarray | None = None

    __repr__ = one_line

    def check(self) -> None:
        """Raises ValueError for a pose or boxes of another shape, numbers that are not finite, and matrices that are far from rotations. Those of a
        network in bfloat16 are near enough; ``to_json`` takes the rotation.
        """
        if not isinstance(self.text, str):
            raise ValueError(f"text must be a str, found {type(self.text).__name__}")
        if self.boxes is not None and np.shape(self.boxes)[1:] != (4,):
            raise ValueError(f"boxes must have the shape (P, 4), found {np.shape(self.boxes)}")
        if self.pose is None:
            return
        check_shapes(self.pose)
        people = () if self.boxes is None else (len(self.boxes),)
        if self.pose.shape != people:
            raise ValueError(f"pose must have the batch shape {people}, found {self.pose.shape}")
        if wrong := no_rotations(self.pose.rotations, NEAR):
            raise ValueError(f"rotations must be rotation matrices; joint {wrong[0][-1]} is none")

    def to_json(self) -> dict[str, Any]:
        """Plain values. Angles are rounded to 1e-7 rad, lengths to 1e-6 m."""
        found: dict[str, Any] = {"text": self.text}
        if self.pose is not None:
            found["pose"] = {"frame": self.pose.frame, "axis_angle": _rounded(_axis_angle(self.pose), 7)}
            for name in ("betas", "translation"):
                has = getattr(self.pose, f"has_{name}")
                if getattr(self.pose, name) is not None and (has is None or np.all(has)):
                    found["pose"][name] = _rounded(getattr(self.pose, name), 6)
            if self.pose.shape_space is not None:
                found["pose"]["shape_space"] = self.pose.shape_space
            if self.pose.measured is not None:
                measured = np.asarray(self.pose.measured)
                found["pose"]["unmeasured"] = np.flatnonzero(~measured.reshape(-1, measured.shape[-1]).all(0)).tolist()
        if self.joints:
            found["joints"] = {name: _rounded(points, 6) for name, points in self.joints.items()}
        if self.notes:
            found["notes"] = dict(self.notes)
        if self.boxes is not None:
            found["boxes"] = _rounded(self.boxes, 2)
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Answer:
        """Reads ``to_json``. Raises KeyError, TypeError or ValueError for anything else."""
        return cls.from_jsons([found])[0]

    @classmethod
    def from_jsons(cls, found: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """``from_json`` of many, which is much faster."""
        given = [each["pose"]["axis_angle"] if each.get("pose") else [] for each in found]
        angles = [np.asarray(each, np.float64).reshape(-1, 3) for each in given]
        matrices = to_matrices(np.concatenate(angles)) if angles else np.empty((0, 3, 3))
        split = np.split(matrices, np.cumsum([len(each) for each in angles])[:-1])
        return [cls._read(each, rotations) for each, rotations in zip(found, split)]

    @classmethod
    def _read(cls, found: Mapping[str, Any], rotations: np.ndarray) -> Answer:
        pose = None
        boxes = np.asarray(found["boxes"], np.float32).reshape(-1, 4) if "boxes" in found else None
        if given := found.get("pose"):
            shape = () if boxes is None else (len(boxes),)
            rotations = rotations.reshape(*shape, -1, 3, 3)
            measured = None
            if "unmeasured" in given:
                measured = np.ones(rotations.shape[:-2], bool)
                measured[..., given["unmeasured"]] = False
            arrays = {name: np.asarray(given[name], np.float32) for name in ("betas", "translation") if name in given}
            pose = Pose(rotations, given["frame"], measured=measured, shape_space=given.get("shape_space"), **arrays)
        joints = {name: np.asarray(points, np.float32) for name, points in found.get("joints", {}).items()}
        return cls(found["text"], pose, joints, found.get("notes", {}), boxes)


class System(Protocol):
    """Something that answers questions: a model, a file of predictions, or a chain of models.

    name: of its row in tables. settings: what its answers depend on, as JSON. Answers that were kept are used again only if these are equal.
    batch_size: how many questions ``answer`` takes at a time; the last batch may be smaller.

    A system may also have ``check_questions``, which is called with all questions of a task before any is asked, and raises UserError if they do
    not fit it; and ``note``, a text that the report shows below its row.
    """

    name: str
    settings: Mapping[str, Any]
    batch_size: int

    def answer(self, questions: Sequence[Question]) -> Sequence[Answer]:
        """One answer to each question. It depends on the questions alone, not on earlier calls. Raises UserError."""
        ...


def first_question(row: Example) -> list[dict[str, Any]]:
    """The messages before the first answer."""
    return row.messages[: next(i for i, message in enumerate(row.messages) if message["role"] == "assistant")]


def words_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message, without its images."""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def images_in(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The images of messages, as parts of messages."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [part for part in parts if part["type"] == "image"]


def asked_words(messages: Sequence[Mapping[str, Any]]) -> str:
    """The words of the last question, without images and without the sentence around a caption (``data.questions.caption_in``)."""
    return caption_in(words_of([message["content"] for message in messages if message["role"] == "user"][-1]))


def answer_all(system: System, questions: Sequence[Question]) -> list[Answer]:
    """The answers of a system that is a part of another, to any number of questions."""
    size = system.batch_size
    return [
        answer for start in range(0, len(questions), size) for answer in system.answer(questions[start : start + size])
    ]


def _axis_angle(pose: Pose) -> np.ndarray:
    return np.asarray(_to_axis_angle(np.asarray(pose.rotations, np.float32)))


_to_axis_angle = jax.jit(matrix_to_axis_angle)  # one call instead of one for each operation


def _rounded(values: Any, digits: int) -> Any:
    return (np.round(np.asarray(values, np.float64), digits) + 0.0).tolist()  # + 0.0: no -0.0

"""A language model writes 2D keypoints, and SMPLify fits a pose to them: LLaVA-S, LLaVA*-S and GPT4-S of the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from chatpose_jax.data.keypoint_text import SCALE, KeypointText
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.spec import Spec, make_system
from chatpose_jax.evaluation.system import Answer, Question, answer_all, images_in
from chatpose_jax.processing.images import upright_size
from chatpose_jax.settings import whole
from smpl_jax import io
from smpl_jax.fit import fit_keypoints
from smpl_jax.pose import Pose

NOT_PARSED = "keypoints not parsed"
"""The note of an answer whose keypoints could not be read."""
PARTLY = "keypoints read in part"
"""The note of an answer of which something that looks like a keypoint was not used."""


class Keypoints:
    """A writer is shown the image and asked for keypoints as text (``data.keypoint_text``). They are read, and ``smpl_jax.fit`` fits a pose.

    A text with fewer than ``least`` keypoints cannot be fitted. Its question gets the pose of the system ``otherwise``, or of a person who stands
    upright with the arms spread and faces the camera, and is counted as "keypoints not parsed". A text of which only a part could be read is fitted
    by this part, and counted as "keypoints read in part".

    Options:
        writer: a system in the form of ``--system``: ``writer="endpoint,model=gpt-4o"``, ``writer="chatpose,model=FOLDER"``.
        points, scale: of ``KeypointText``. asked: "instructions" explains the form of the answer; "question" is the short question of the training
            source ``keypoints``, for a writer that was trained with it.
        otherwise: a system: ``otherwise="mean,data=coco"``.
        least: keypoints that a fit needs.
        camera: "given" uses the intrinsics of the data where there are some (3DPW has them); "assumed" never.
        body: file of the body that is fitted; by default that of the package.
        batch_size: questions at a time.
        name: of the row in tables; by default that of the writer and "-S", as in the paper.

    Raises UserError as these systems do, and for a question without one image.
    """

    def __init__(
        self,
        *,
        writer: str,
        points: str = "coco17",
        scale: int = SCALE,
        asked: Literal["instructions", "question"] = "instructions",
        otherwise: str = "",
        least: int = 6,
        camera: Literal["given", "assumed"] = "given",
        body: str = "",
        batch_size: int = 64,
        name: str = "",
    ) -> None:
        self.batch_size = whole("batch_size", batch_size, 1)
        self.text, self.asked, self.least = KeypointText(points, scale), asked, whole("least", least, 4)
        self.camera = camera
        self.writer = make_system(Spec.parse(writer))
        self.otherwise = make_system(Spec.parse(otherwise)) if otherwise else None
        self.body = io.load_body(body) if body else io.load_body()
        self.name = name or f"{self.writer.name}-S"
        self.settings: Mapping[str, Any] = {
            "writer": {"name": self.writer.name, **self.writer.settings},
            "otherwise": {"name": self.otherwise.name, **self.otherwise.settings} if self.otherwise else "upright",
            "points": points,
            "scale": scale,
            "asked": asked,
            "least": least,
            "camera": camera,
            "body": self.body.fingerprint,
        }

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One pose for each question, in the camera frame. The text is what the writer wrote."""
        sizes = [_image_size(question) for question in questions]
        written = answer_all(self.writer, [self._ask(question) for question in questions])
        read = [self.text.read(answer.text, size) for answer, size in zip(written, sizes)]
        enough = [bool((each.points[:, 2] > 0).sum() >= self.least) for each in read]
        points = np.stack([each.points for each in read])
        fitted = self._fit(points, questions, sizes) if any(enough) else None
        others = iter(self._others([question for question, parsed in zip(questions, enough) if not parsed]))
        answers = []
        for i, (answer, each, parsed) in enumerate(zip(written, read, enough)):
            notes = {**answer.notes, "keypoints": float((each.points[:, 2] > 0).sum())}
            if not parsed:
                notes[NOT_PARSED] = True
            elif each.unread:
                notes[PARTLY] = True
            pose = fitted[i] if fitted is not None and parsed else next(others)
            answers.append(Answer(answer.text, pose, notes=notes))
        return answers

    def _fit(self, points: np.ndarray, questions: Sequence[Question], sizes: Sequence[tuple[int, int]]) -> Pose:
        """(N,) poses for points (N, K, 3) in pixels and with a confidence."""
        cameras = [self._camera(*pair) for pair in zip(questions, sizes)]
        focal, center = (np.array(values, np.float64) for values in zip(*cameras))
        # A full batch is one program for all calls, and a pose that does not depend on the number of others.
        filled = [np.resize(array, (self.batch_size, *array.shape[1:])) for array in (points, focal, center)]
        fitted = fit_keypoints(
            filled[0], self.text.points, image_size=(1, 1), focal=filled[1], center=filled[2], body=self.body
        )
        return fitted.pose[: len(points)].replace(measured=None)  # the prior's guess is an answer too

    def _camera(self, question: Question, size: tuple[int, int]) -> tuple[float, np.ndarray]:
        """Focal length and principal point in pixels of the image. Unknown, they are the image's diagonal and its middle."""
        given = question.about.get("cam_int")
        if given is None or self.camera == "assumed":
            return float(np.hypot(*size)), np.array(size) / 2
        matrix = np.asarray(given, np.float64)
        return float(matrix[[0, 1], [0, 1]].mean()), matrix[:2, 2]

    def _ask(self, question: Question) -> Question:
        said = str(question.about.get("description", ""))
        text = self.text.question(said) if self.asked == "question" else self.text.instructions(said)
        messages = [{"role": "user", "content": [*images_in(question.messages), {"type": "text", "text": text}]}]
        return dataclasses.replace(question, kind="instruction", messages=messages, wants="words")

    def _others(self, questions: Sequence[Question]) -> list[Pose | None]:
        if self.otherwise is None:
            return [upright()] * len(questions)
        return [answer.pose for answer in answer_all(self.otherwise, questions)]


def upright() -> Pose:
    """SMPL's rest pose, of a person who faces the camera; camera frame."""
    rotations = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
    rotations[0] = np.diag([1, -1, -1])
    return Pose(rotations, "camera")


def _image_size(question: Question) -> tuple[int, int]:
    images = images_in(question.messages)
    if len(images) != 1:
        raise UserError(
            f"question {question.key!r} shows {len(images)} images; keypoints need one (the tasks estimation and rpe)"
        )
    return upright_size(images[0]["image"], f"question {question.key!r}")

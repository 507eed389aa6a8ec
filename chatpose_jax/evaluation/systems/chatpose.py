"""A model folder as a system."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from chatpose_jax.chat import Reply, load
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.system import Answer, Question, images_in
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.processing.processor import NO_TOWER
from chatpose_jax.settings import whole
from chatpose_jax.train.fingerprint import fingerprint
from chatpose_jax.weights.paths import by_path

NEW_TOKENS = {"pose": 32, "words": 512}
"""The largest number of tokens in an answer, by what the task scores, unless ``max_new_tokens`` sets another."""
FORCED = "no pose in the first answer, so a pose was forced"
"""The note of an answer whose pose was forced."""


class ChatPoseSystem:
    """Greedy answers of a model. If a task needs a pose and the answer has none, the question is asked again with ``force_pose``, and the answer is
    counted as ``FORCED``.

    Options:
        model: model folder, or the run folder that holds it; or a checkpoint that ``chatpose_jax.load`` reads.
        name: of the row in tables; by default that of the folder.
        head, dtype, body: as for ``chatpose_jax.load``.
        mesh: DATAxFSDPxTENSOR devices of this process, such as 1x8x1. By default all of them along FSDP, and on CPUs one.
        batch_size: questions at a time. max_new_tokens: of an answer; by default ``NEW_TOKENS``.

    Raises UserError as ``load`` does.
    """

    def __init__(
        self,
        *,
        model: str,
        name: str = "",
        head: str | None = None,
        dtype: str | None = None,
        body: str | None = None,
        mesh: str | None = None,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
    ) -> None:
        self.batch_size = whole("batch_size", batch_size, 1)
        self.new_tokens = NEW_TOKENS
        if max_new_tokens is not None:
            self.new_tokens = dict.fromkeys(NEW_TOKENS, whole("max_new_tokens", max_new_tokens, 1))
        self.name = name or _name_of(Path(model))
        self.model = load(model, head=head, dtype=dtype, body=body, mesh=_mesh(mesh))
        processor = self.model.processor
        self.settings: dict[str, Any] = {
            "weights": _digest(fingerprint(by_path(self.model.params))),
            "config": _digest(self.model.config.to_json()),
            "processor": processor.fingerprint,
            "images": processor.images and dataclasses.asdict(processor.images),
            "markers": processor.markers,
            "max_new_tokens": self.new_tokens,
        }

    def check_questions(self, questions: Sequence[Question]) -> None:
        """Raises UserError if a question has an image and the model has no vision tower."""
        seen = [question for question in questions if images_in(question.messages)]
        if seen and self.model.config.vision is None:
            raise UserError(
                f"{self.name}, question {seen[0].key!r}: {NO_TOWER}, and {len(seen)} of {len(questions)} questions have one; choose a task and data "
                "without images"
            )

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The answer to each question, with its first pose."""
        found: dict[int, Answer] = {}
        for wants in ("pose", "words"):
            places = [i for i, question in enumerate(questions) if question.wants == wants]
            replies = self._chat([questions[i] for i in places], wants)
            without = [i for i, reply in zip(places, replies) if wants == "pose" and not reply.poses]
            forced = self._chat([questions[i] for i in without], wants, force_pose=True)
            found |= {i: _answer(reply) for i, reply in zip(places, replies)}
            found |= {i: _answer(reply, {FORCED: True}) for i, reply in zip(without, forced)}
        return [found[i] for i in range(len(questions))]

    def _chat(self, questions: Sequence[Question], wants: str, **options: Any) -> list[Reply]:
        """Batches are filled up, so that few programs are compiled. No answer depends on earlier ones."""
        if not questions:
            return []
        messages = [question.messages for question in questions]
        filled = messages + messages[:1] * (self.batch_size - len(messages))
        self.model.forget()
        replies = self.model.chat(filled, max_new_tokens=self.new_tokens[wants], **options)
        self.model.forget()
        return replies[: len(messages)]


def _answer(reply: Reply, notes: dict[str, bool] | None = None) -> Answer:
    return Answer(reply.text, reply.poses[0].pose if reply.poses else None, notes=notes or {})


def _name_of(folder: Path) -> str:
    folder = folder.absolute()
    return folder.parent.name if folder.name == "model" else folder.name


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _mesh(text: str | None) -> jax.sharding.Mesh | None:
    devices = jax.local_devices()
    if text is None:
        return make_mesh(devices=devices) if len(devices) > 1 and devices[0].platform != "cpu" else None
    try:
        data, fsdp, tensor = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UserError(f"mesh={text}: expected DATAxFSDPxTENSOR, such as 1x8x1") from None
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor > len(devices):
        raise UserError(f"mesh={text}: expected sizes of at least 1, for the {len(devices)} devices of this process")
    return make_mesh(data, fsdp, tensor, devices=devices)

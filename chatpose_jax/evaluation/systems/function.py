"""Any function of messages as a system."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatpose_jax import named
from chatpose_jax.chat import Reply
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.system import Answer, Question
from smpl_jax.pose import Pose


class FunctionSystem:
    """A function of the user's own: ``messages -> reply``. It is called with one question at a time, in the form of ``ChatPose.chat``.

    A reply is a text, a ``Pose`` of batch shape (), a ``chatpose_jax.Reply`` (its text and first pose), or an ``Answer``.

    Options: call: ``package.module:function``. name: of the row in tables; by default that of the function.

    Answers that were kept are asked again if the file of the module changes. Raises UserError for a function that is not found, that raises, or
    that gives something else.
    """

    batch_size = 1

    def __init__(self, *, call: str, name: str = "") -> None:
        self.where = f"function {call!r}"
        self.function = named.find(self.where, call, {})
        self.name = name or call.rpartition(":")[2]
        file = getattr(sys.modules.get(call.partition(":")[0]), "__file__", None)
        source = hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest() if file else ""
        self.settings = {"function": call, "source": source}

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The function's reply to each question."""
        return [self._ask(question) for question in questions]

    def _ask(self, question: Question) -> Answer:
        where = f"{self.where}, question {question.key!r}"
        try:
            reply: Any = self.function(question.messages)
        except Exception as error:
            raise named.raised(where + named.own_line(error), error) from error
        if isinstance(reply, Answer):
            return reply
        if isinstance(reply, str):
            return Answer(reply)
        if isinstance(reply, Reply):
            return Answer(reply.text, reply.poses[0].pose if reply.poses else None)
        if isinstance(reply, Pose) and reply.shape == ():
            return Answer(pose=reply)
        what = f"a Pose of batch shape {reply.shape}" if isinstance(reply, Pose) else type(reply).__name__
        raise UserError(
            f"{where}: expected a str, a Pose of batch shape (), a chatpose_jax.Reply or an Answer, found {what}"
        )

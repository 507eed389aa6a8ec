"""A language model describes a pose, and another system makes a pose of its words: LLaVA-P and GPT4-P of the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from chatpose_jax.data.questions import TEXT_TO_POSE
from chatpose_jax.evaluation.spec import Spec, make_system
from chatpose_jax.evaluation.system import Answer, Question, answer_all, asked_words, images_in

INSTRUCTIONS = (
    "Describe the pose of the body of {whom} in two to four sentences: the posture, then the trunk, arms, legs and head with their directions and "
    "bends. Left and right are those of the person. Write the description alone, without clothes and surroundings."
)
SHOWN = "the person in the middle of the image"
SAID = 'a person of whom this is said: "{words}"'
NOTHING = "A person."
"""The description where the model gives none."""


class Described:
    """A chain of two systems. The writer sees the image of a question, or its words where it has none (``spg``), and describes the pose. The
    second system is asked for the pose of this description, which is also the text of the answer.

    Where the writer gives no words, the second system is asked for the pose of ``NOTHING``, and the answer is counted as "not described".

    Options:
        writer: the first system, in the form of ``--system``: ``writer="endpoint,model=gpt-4o"``, ``writer="chatpose,model=FOLDER"``.
        to: the second one, which makes poses of words: ``to="pose_vae,folder=FOLDER"``.
        name: of the row in tables; by default that of the writer and "-P", as in the paper.

    Raises UserError as these systems do.
    """

    batch_size = 64

    def __init__(self, *, writer: str, to: str, name: str = "") -> None:
        self.writer, self.to = make_system(Spec.parse(writer)), make_system(Spec.parse(to))
        self.name = name or f"{self.writer.name}-P"
        self.settings: Mapping[str, Any] = {
            "writer": {"name": self.writer.name, **self.writer.settings},
            "to": {"name": self.to.name, **self.to.settings},
            "asked": [INSTRUCTIONS, TEXT_TO_POSE[0]],
        }

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The second system's answers, with the descriptions as their texts."""
        written = answer_all(self.writer, [_describe(question) for question in questions])
        captions = [" ".join(answer.text.split()) or NOTHING for answer in written]
        found = answer_all(self.to, [_pose_of(*pair) for pair in zip(questions, captions)])
        return [
            dataclasses.replace(
                answer,
                text=caption,
                notes={**first.notes, **answer.notes, **({} if first.text.strip() else {"not described": True})},
            )
            for first, answer, caption in zip(written, found, captions)
        ]


def _describe(question: Question) -> Question:
    images = images_in(question.messages)
    said = str(question.about.get("description", "")) or ("" if images else asked_words(question.messages))
    text = INSTRUCTIONS.format(whom=SAID.format(words=said) if said else SHOWN)
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
    return dataclasses.replace(question, kind="instruction", messages=messages, wants="words")


def _pose_of(question: Question, caption: str) -> Question:
    asked = TEXT_TO_POSE[0].format(caption=caption if caption[-1] in ".!?" else f"{caption}.")
    return dataclasses.replace(question, kind="text", messages=[{"role": "user", "content": asked}], wants="pose")

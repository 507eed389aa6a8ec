"""Words about a pose: BLEU-4, ROUGE-L, and whether a retriever finds the pose by the words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from chatpose_jax.data.example import Example, LazyImage
from chatpose_jax.data.questions import DESCRIBE
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import features, words
from chatpose_jax.evaluation.features import CAPTIONS
from chatpose_jax.evaluation.retrieval import PRECISION_RULE, RECALLS, compare
from chatpose_jax.evaluation.scores import Scores, counts_of, interval, mean_of
from chatpose_jax.evaluation.subset import Selected
from chatpose_jax.evaluation.system import Answer, Question, first_question, images_in
from chatpose_jax.evaluation.tasks.generation import Generation
from chatpose_jax.posescript.pairs import captions_of
from chatpose_jax.processing.conversation import POSE
from smpl_jax.io import load_body
from smpl_jax.pose import Pose
from smpl_jax.posed import PosedBody

NO_WORDS = "no words in the answer, which counts as an empty text"
TRUE = "true captions"
RULES = {
    "human-first": "human captions, or automatic ones if there are none",
    "human": "human captions",
    "automatic": "automatic captions",
}
"""Rules of ``features.CAPTIONS``, as tables name them."""
KINDS = {
    "captions": "Poses in words",
    "answers": "Questions about images, answered in words",
}
"""Kinds of rows, each a table -> its heading."""


class Describe:
    """A pose in words. Systems are shown an image, because ChatPose does not read pose numbers. There are two kinds of rows, with a table each:

    - "captions": rows with a pose and captions. The question is ``question``, about the images of the row, or about a drawing of the pose where it
      has none. All captions of the kind that is chosen are references, and a retriever looks for the true pose by the answer.
    - "answers": rows that show an image and whose first answer has no pose. They are asked as they stand, and their answer is the reference.

    Other rows are left out. The row "true captions" has what the retriever gives to the first reference of each row.

    Options:
        retriever: its folder; without one there is no retrieval.
        captions: a rule of ``features.CAPTIONS``.
        recalls: k of recall.
        question: asked of the rows with captions.
        size: of drawings, in pixels. body: the file of the body that is drawn; by default that of the package.
        other_retriever: as of ``Generation``.
    """

    name = "describe"

    def __init__(
        self,
        rows: Sequence[Example],
        data: str,
        *,
        retriever: Any = "",
        captions: Literal["human-first", "human", "automatic"] = "human-first",
        recalls: tuple[int, ...] = RECALLS,
        question: str = DESCRIBE[0],
        size: int = 336,
        body: str = "",
        other_retriever: bool = False,
    ) -> None:
        self.data, self.rule, self.recalls, self.asked, self.size = data, captions, recalls, question, size
        self.judge = features.open_judge(retriever) if retriever != "" else None
        self.fits = features.fits(self.judge, Generation.trained, other_retriever) if self.judge else {}
        self.body = load_body(body or None)
        self.settings: Mapping[str, Any] = {
            "captions": captions,
            "question": question,
            "drawing": {"body": self.body.fingerprint, "size": size},
        }
        found = {i: kind for i in range(len(rows)) if (kind := self._kind(rows[i]))}
        self.rows, self.kinds = Selected(rows, list(found)), np.array(list(found.values()))
        if not len(self.rows):
            raise UserError(
                f"none of the {len(rows)} rows of {data} can be described: expected rows with a pose and captions in their extras "
                f"({' or '.join(CAPTIONS[captions])}), or with an image and an answer in words"
            )

    def check(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raises UserError for a system whose settings name this task's retriever."""
        if self.judge:
            features.refuse_same_judge(self.judge, name, settings)

    def question(self, row: Example) -> Question:
        """The row's own, or ``self.asked`` with an image."""
        asked = dataclasses.replace(Question.of(row), wants="words")
        if self._kind(row) == "answers":
            return asked
        pose = row.poses[0]
        shown = images_in(asked.messages) or [
            {"type": "image", "image": LazyImage(lambda: self._drawing(pose), (self.size, self.size, 3))}
        ]
        content = [*shown, {"type": "text", "text": self.asked}]
        return dataclasses.replace(asked, kind="image", messages=[{"role": "user", "content": content}])

    def score(self, answers: Sequence[Answer]) -> list[Scores]:
        """A table for each kind of rows that there is."""
        return [self._table(kind, np.flatnonzero(self.kinds == kind), answers) for kind in KINDS if kind in self.kinds]

    def _table(self, kind: str, places: np.ndarray, answers: Sequence[Answer]) -> Scores:
        rows = [self.rows[i] for i in places.tolist()]
        mine = [answers[i] for i in places]
        texts, groups = [answer.text.strip() for answer in mine], [row.group for row in rows]
        references = [self._references(row) for row in rows]
        samples = {"ROUGE-L": words.rouge_l(texts, references)}
        values = {
            "BLEU-4": words.bleu(texts, references, groups),
            "ROUGE-L": mean_of(samples["ROUGE-L"], groups, better="higher", digits=2),
        }
        facts, true = {}, {}
        if kind == "captions" and self.judge:
            given = np.array([bool(text) for text in texts])
            poses = self.judge.embed_poses(features.bodies([row.poses[0] for row in rows]))
            found = compare(self.judge.embed_texts(texts), poses, with_text=given)
            recall, more = features.recall_values(found, groups, self.recalls)
            values, samples = values | recall, samples | more
            first = self.judge.embed_texts([each[0] for each in references])
            true = {TRUE: features.recall_values(compare(first, poses), groups, self.recalls)[0]}
            facts = {
                **features.facts_of(self.judge),
                **self.fits,
                "gallery": f"{len(rows)} poses",
                "joints": features.JOINTS,
                "R-precision": PRECISION_RULE,
            }
        elif kind == "captions":
            facts = {"retriever": "none given, so the table has no recall"}
        drawn = sum(not features.shows_image(row) for row in rows)
        count = sum(map(len, references))
        silent = sum(not text for text in texts)
        return Scores(
            table=f"{self.name}/{self.data}/{kind}",
            title=f"{KINDS[kind]}, {self.data}",
            facts={
                "question": self.asked if kind == "captions" else "the question of each row",
                "shown": f"images of the rows: {len(rows) - drawn}, drawings of the true poses: {drawn}",
                "references": f"{count / len(rows):.2f} per row"
                + (f", {RULES[self.rule]}" if kind == "captions" else ""),
                "BLEU-4": words.BLEU_RULE,
                "ROUGE-L": words.ROUGE_RULE,
                **facts,
                "samples": str(len(rows)),
                "interval": interval(groups),
            },
            values=values,
            references=true,
            samples={name: _spread(column, places, len(self.rows)) for name, column in samples.items()},
            rank="ROUGE-L",
            better="higher",
            counts={**({NO_WORDS: silent} if silent else {}), **counts_of(mine)},
        )

    def _kind(self, row: Example) -> str:
        if POSE not in _answer(row) and features.shows_image(row):
            return "answers"
        return "captions" if len(row.poses) and features.caption_of(row, self.rule) else ""

    def _references(self, row: Example) -> tuple[str, ...]:
        if self._kind(row) == "answers":
            return (_answer(row),)
        caption = features.caption_of(row, self.rule)
        assert caption is not None
        texts = captions_of(row, caption.kind)  # type: ignore[arg-type]
        return (caption.text, *(text for text in texts if text != caption.text))

    def _drawing(self, pose: Pose) -> np.ndarray:
        """(size, size, 3) uint8, the pose on ``body`` of the mean shape, as its camera sees it."""
        bare = pose.replace(betas=None, has_betas=None, shape_space=None, translation=None, has_translation=None)
        return PosedBody(bare, self.body).render(self.size)


def _answer(row: Example) -> str:
    return str(row.messages[len(first_question(row))]["content"])


def _spread(values: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """(count,), values at some places and NaN elsewhere."""
    found = np.full(count, np.nan)
    found[places] = values
    return found

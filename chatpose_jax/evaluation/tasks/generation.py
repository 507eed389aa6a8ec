"""Poses from words, as in ChatPose's Table 1: a retriever says how well the answered poses fit their words."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.data.questions import TEXT_TO_POSE
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import features
from chatpose_jax.evaluation.features import CAPTIONS, RANK, Caption
from chatpose_jax.evaluation.retrieval import PRECISION_RULE, RECALLS, compare, frechet_distance
from chatpose_jax.evaluation.scores import Scores, Value, counts_of, interval
from chatpose_jax.evaluation.subset import Selected
from chatpose_jax.evaluation.system import Answer, Question
from smpl_jax.pose import Pose

NO_POSE = "no pose in the answer, which counts as a miss and is left out of gallery and FID"
REAL = "real poses"
TEXTS = {
    "human": "human captions",
    "automatic": "automatic captions",
    "caption": "captions",
    "query": "queries",
    "question": "questions",
}
"""Kinds of captions, as tables name them."""


class _Judged:
    """What the tasks of Table 1 share. Subclasses say which text of a row a pose should fit, and what a retriever must have been trained on."""

    name: ClassVar[str]
    title: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        rows: Sequence[Example],
        data: str,
        judge: features.RetrievalJudge,
        recalls: Sequence[int],
        other_retriever: bool,
    ) -> None:
        self.data, self.judge, self.recalls = data, judge, recalls
        self.fits = features.fits(judge, self.trained, other_retriever)
        self.settings: Mapping[str, Any] = {}
        found = {i: self.caption(rows[i]) for i in features.rows_in_words(rows)}
        self.rows = Selected(rows, [i for i, caption in found.items() if caption])
        self.captions = [caption for caption in found.values() if caption]
        self.left_out = len(found) - len(self.captions)

    def caption(self, row: Example) -> Caption | None:
        """The text that the pose should fit, None where the row has none."""
        raise NotImplementedError

    def question(self, row: Example) -> Question:
        """What a system is asked for a row."""
        raise NotImplementedError

    def check(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raises UserError for a system whose settings name this task's retriever."""
        features.refuse_same_judge(self.judge, name, settings)

    @functools.cached_property
    def truth(self) -> tuple[Pose, list[str], np.ndarray, np.ndarray]:
        """The true poses (N,), groups, and the features of texts and true poses (N, D)."""
        rows = [self.rows[i] for i in range(len(self.rows))]
        poses = features.bodies([row.poses[0] for row in rows])
        texts = self.judge.embed_texts([caption.text for caption in self.captions])
        return poses, [row.group for row in rows], texts, self.judge.embed_poses(poses)

    @functools.cached_property
    def real(self) -> dict[str, Value]:
        """The measures of the true poses."""
        _, groups, texts, poses = self.truth
        return features.recall_values(compare(texts, poses), groups, self.recalls)[0]

    def score(self, answers: Sequence[Answer]) -> list[Scores]:
        """One table."""
        poses, groups, texts, real = self.truth
        given = np.array([answer.pose is not None for answer in answers])
        found = self.judge.embed_poses(features.same_joints([answer.pose for answer in answers], poses))
        values, samples = features.recall_values(compare(texts, found, with_pose=given), groups, self.recalls)
        distance = Value(frechet_distance(found[given], real[given]), digits=3)
        kinds = collections.Counter(caption.kind for caption in self.captions)
        return [
            Scores(
                table=f"{self.name}/{self.data}",
                title=f"{self.title}, {self.data}",
                facts={
                    **features.facts_of(self.judge),
                    **self.fits,
                    "texts": ", ".join(f"{count} {TEXTS[kind]}" for kind, count in kinds.items())
                    + ", one for each row",
                    "gallery": f"{len(texts)} pairs of text and pose",
                    "joints": features.JOINTS,
                    "R-precision": PRECISION_RULE,
                    "FID": f"Fréchet distance of the {found.shape[1]} features between answered poses and the true poses of the same rows",
                    "samples": str(len(texts)),
                    "interval": interval(groups),
                },
                values=values | {"FID": distance},
                references={REAL: self.real},
                samples=samples,
                rank=RANK,
                counts={**({NO_POSE: missing} if (missing := int((~given).sum())) else {}), **counts_of(answers)},
            )
        ]


class Generation(_Judged):
    """The pose that a caption describes. A retriever that was trained on real poses judges the answered ones (PoseScript's R/G): recall and
    R-precision with all rows as the gallery, and the Fréchet distance of their features from those of the real poses.

    It uses the rows without images that have a pose and a caption. The row's own question is asked if it holds the chosen caption; otherwise the
    caption is put into the first question of ``TEXT_TO_POSE``. An answer without a pose is a miss.

    The row "real poses" has the values of the true poses with this retriever: those of a system without error.

    Options:
        retriever: its folder.
        captions: a rule of ``features.CAPTIONS``; "human-first" is the paper's.
        recalls: k of recall.
        other_retriever: also accept a retriever whose folder says that it was trained on other texts; the facts say so.
    """

    name, title, trained = "generation", "Poses from words", ("all", "human", "automatic", "caption")

    def __init__(
        self,
        rows: Sequence[Example],
        data: str,
        *,
        retriever: Any = "",
        captions: Literal["human-first", "human", "automatic", "question"] = "human-first",
        recalls: tuple[int, ...] = RECALLS,
        other_retriever: bool = False,
    ) -> None:
        self.rule = captions
        super().__init__(rows, data, features.open_judge(retriever), recalls, other_retriever)
        self.settings = {"captions": captions}
        if not self.captions:
            wanted = " or ".join(CAPTIONS[captions])
            hint = f"a text {wanted} in its extras; --set captions=question takes the words of the question instead"
            raise UserError(f"none of the {len(rows)} rows of {data} fits: expected a pose, no image, and {hint}")

    def caption(self, row: Example) -> Caption | None:
        return features.caption_of(row, self.rule)

    def question(self, row: Example) -> Question:
        asked, caption = dataclasses.replace(Question.of(row), wants="pose"), self.caption(row)
        if caption is None or caption.text in features.question_words(row):
            return asked
        own = {"role": "user", "content": TEXT_TO_POSE[0].format(caption=caption.text)}
        return dataclasses.replace(asked, messages=[own])


class SpeculativeGeneration(_Judged):
    """Speculative pose generation: the pose that a question implies. As ``Generation``, with the complete question as the text of a row, and a
    retriever that was trained on such questions and their poses.

    Options:
        texts: "query" takes the rows that have such a question (``extras["query"]``); "question" the words of the first question of all rows.
        retriever, recalls, other_retriever: as those of ``Generation``.
    """

    name, title, trained = "spg", "Speculative pose generation", ("query",)

    def __init__(
        self,
        rows: Sequence[Example],
        data: str,
        *,
        retriever: Any = "",
        texts: Literal["query", "question"] = "query",
        recalls: tuple[int, ...] = RECALLS,
        other_retriever: bool = False,
    ) -> None:
        self.texts = texts
        super().__init__(rows, data, features.open_judge(retriever), recalls, other_retriever)
        self.settings = {"texts": texts}
        if not self.captions:
            hint = "; --set texts=question takes the words of the questions instead" if texts == "query" else ""
            raise UserError(
                f"none of the {len(rows)} rows of {data} fits: expected a pose, no image, and a {texts}{hint}"
            )

    def caption(self, row: Example) -> Caption | None:
        text = str(row.extras.get("query", "")) if self.texts == "query" else features.question_words(row)
        return Caption(self.texts, text) if text.strip() else None

    def question(self, row: Example) -> Question:
        return dataclasses.replace(Question.of(row), wants="pose")

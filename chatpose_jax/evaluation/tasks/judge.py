"""Answers in words, rated by a language model, as in ChatPose's Table 4 (LLaVA's review of LLaVA-Bench)."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from chatpose_jax.data.build import CHARACTERS_A_TOKEN
from chatpose_jax.data.example import Example
from chatpose_jax.endpoint import Endpoint, Messages
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.endpoints import CACHE, Written, ask_all
from chatpose_jax.evaluation.scores import Scores, Value, counts_of, interval, with_intervals
from chatpose_jax.evaluation.system import Answer, Question
from chatpose_jax.settings import one_line, real, whole

SYSTEM = "You compare answers of assistants. Be helpful and precise."
NEEDED = ("category", "question", "reference", "captions", "boxes", "box_names", "role", "prompt")
"""Extras of a row (``readers.llava_bench``)."""
ALL = "all"
HIGHEST = 10
"""The best score."""
_SCORES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*[\s,;]\s*(\d+(?:\.\d+)?)\s*")
_NO_SCORES = "reviews without two scores"


class Review(NamedTuple):
    """text: what the judge wrote. reference, candidate: its scores, NaN if it gave none."""

    text: str
    reference: float
    candidate: float

    def __repr__(self) -> str:
        return one_line(self)


class Judge:
    """A judge compares each answer with the reference answer; it sees captions and boxes of the image, and gives both a score of 1 to 10.

    A value is 100 · mean score of the answers / mean score of the reference answers, for each category of questions and for all.

    Scores depend on the judge's reviews, which are kept in ``cache``: scoring again asks for none of them, needs no endpoint, and gives the same
    values. A review whose first line is not two scores is asked for again, ``tries`` times in all. A row without scores counts in no value.

    Options:
        judge: name of the judge at the endpoint of ``OPENAI_BASE_URL``, with the key ``OPENAI_API_KEY``.
        swap: "none": the reference stands first, as in LLaVA. "both": the judge is also asked with the answer first, and a row has the means of
            the two reviews; of one of them where the other has no scores.
        tries: reviews that are asked for until one has scores. temperature, max_tokens: of a review. parallel: reviews at a time.
        cache: folder of the reviews.

    Raises UserError where no judge is named, or a row lacks what the judge is shown.
    """

    name = "judge"

    def __init__(
        self,
        rows: Sequence[Example],
        data: str,
        *,
        judge: str = "",
        swap: Literal["none", "both"] = "none",
        tries: int = 3,
        temperature: float = 0.2,
        max_tokens: int = 1024,
        parallel: int = 4,
        cache: str = CACHE,
    ) -> None:
        if not judge:
            raise UserError("name the language model that rates the answers: --set judge=NAME (at OPENAI_BASE_URL)")
        for name, value in (("tries", tries), ("max_tokens", max_tokens), ("parallel", parallel)):
            whole(name, value, 1)
        real("temperature", temperature, lambda number: number >= 0, "at least 0")
        if not len(rows):
            raise UserError(f"{data} has no rows to evaluate")
        if missing := [name for name in NEEDED if name not in rows[0].extras]:
            raise UserError(
                f"{rows[0].place} has no {missing[0]!r}, which the judge needs; expected rows of LLaVA-Bench (--data llava_bench)"
            )
        self.rows, self.data, self.judge, self.swap, self.tries, self.parallel = (
            rows,
            data,
            judge,
            swap,
            tries,
            parallel,
        )
        self.asked: dict[str, Any] = {
            "temperature": temperature,
            "max_tokens": max_tokens,
            "cache": Path(cache).expanduser(),
        }
        self.settings: Mapping[str, Any] = {}

    def question(self, row: Example) -> Question:
        """The row's own."""
        return Question.of(row)

    def score(self, answers: Sequence[Answer]) -> list[Scores]:
        """One table. Reviews that are not in the cache are asked for, after a line on standard error that says how many.

        Raises UserError where there is no endpoint, or it refuses or does not answer. The reviews that came are kept.
        """
        orders = (False, True) if self.swap == "both" else (False,)
        cases = [(row, answer.text, swapped) for swapped in orders for row, answer in zip(self.rows, answers)]
        texts = self._reviews([review_of(*case) for case in cases])
        found = [parsed(text, swapped) for text, (_, _, swapped) in zip(texts, cases)]
        scores = np.array([(review.reference, review.candidate) for review in found])
        scores = scores.reshape(len(orders), len(self.rows), 2)
        counted = np.isfinite(scores).all(2)
        with np.errstate(invalid="ignore"):
            means = np.where(counted[..., None], scores, 0).sum(0) / counted.sum(0)[:, None]
        count = len(self.rows)
        kept = {"review": texts[:count]} | ({"review, answer first": texts[count:]} if texts[count:] else {})
        return [self._table(means, int((~counted).sum()), answers, kept)]

    def _reviews(self, shown: Sequence[Messages]) -> list[str]:
        """The first review of each that has scores; without any, the last one."""
        texts = [""] * len(shown)
        pending = list(range(len(shown)))
        for turn in range(self.tries):
            written = self._ask([shown[i] for i in pending], turn)
            for i, answer in zip(pending, written):
                texts[i] = answer.text or f"({answer.why})"
            pending = [i for i, answer in zip(pending, written) if np.isnan(parsed(answer.text).reference)]
        return texts

    def _ask(self, shown: Sequence[Messages], turn: int) -> list[Written]:
        endpoint = Endpoint("http://localhost/v1", self.judge, **self.asked)  # the cache does not depend on the address
        unknown = [messages for messages in shown if endpoint.known(messages, turn) is None]
        if unknown:
            endpoint = Endpoint.from_environment(self.judge, **self.asked)
            size = sum(len(message["content"]) for messages in unknown for message in messages)
            print(
                f"judge: {len(unknown)} of {len(shown)} reviews are asked of {self.judge!r}, about {round(size / CHARACTERS_A_TOKEN):,} tokens in "
                f"and {200 * len(unknown):,} out",
                file=sys.stderr,
            )
        return ask_all(endpoint, [(messages, turn) for messages in shown], self.parallel)

    def _table(
        self, means: np.ndarray, failed: int, answers: Sequence[Answer], texts: Mapping[str, Sequence[str]]
    ) -> Scores:
        kinds = np.array([str(row.extras["category"]) for row in self.rows])
        names = [*dict.fromkeys(kinds.tolist()), ALL]
        groups = [row.group for row in self.rows]
        counted = np.isfinite(means).all(1)
        sums = [np.where((counted & (kinds == name if name != ALL else True))[:, None], means, 0) for name in names]
        middle, low, high = with_intervals(
            np.concatenate(sums, 1), groups, lambda total: 100 * total[..., 1::2] / total[..., 0::2]
        )
        order = "reference first" if self.swap == "none" else "both orders, averaged"
        facts = {
            "protocol": "LLaVA-Bench: 100 · mean score of answers / mean score of references",
            "judge": f"{self.judge}, temperature {self.asked['temperature']:g}",
            "order of answers": order,
            "samples": f"{len(self.rows):,}" if counted.all() else f"{counted.sum():,} of {len(self.rows):,}",
            "interval": interval(groups, "images"),
        }
        empty = sum(not answer.text.strip() for answer in answers)
        counts = {**counts_of(answers), _NO_SCORES: failed, "answers without words": empty}
        return Scores(
            table=f"{self.name}/{self.data}",
            title=f"Answers in words, rated by {self.judge}, on {self.data}",
            facts=facts,
            values={
                name: Value(float(m), float(lo), float(hi), better="higher")
                for name, m, lo, hi in zip(names, middle, low, high)
            },
            samples={"score": means[:, 1], "score of the reference": means[:, 0]},
            counts={name: count for name, count in counts.items() if count},
            texts=texts,
        )


def review_of(row: Example, answer: str, swapped: bool = False) -> list[dict[str, str]]:
    """What the judge is asked about an answer to a row. The reference is the first of the two answers, or the second if ``swapped``."""
    extras = row.extras
    boxes = "\n".join(f"{name}: {box}" for name, box in zip(extras["box_names"], np.asarray(extras["boxes"]).tolist()))
    role = extras["role"]
    given = (answer, extras["reference"]) if swapped else (extras["reference"], answer)
    parts = [
        "[Context]\n" + "\n".join(extras["captions"]),
        boxes,
        f"[Question]\n{extras['question']}",
        *(
            part
            for number, text in enumerate(given, 1)
            for part in (f"[{role} {number}]\n{text}", f"[End of {role} {number}]")
        ),
        f"[System]\n{extras['prompt']}",
    ]
    content = "".join(f"{part}\n\n" for part in parts)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def first_line(review: str) -> str:
    """The first line that is not empty."""
    return next((line for line in review.splitlines() if line.strip()), "")


def parsed(review: str, swapped: bool = False) -> Review:
    """The scores in the first line of a review: two numbers of at most 10, with a space, comma or semicolon between them."""
    match = _SCORES.fullmatch(first_line(review))
    first, second = map(float, match.groups()) if match else (np.nan, np.nan)
    if not max(first, second) <= HIGHEST:
        first = second = np.nan
    return Review(review, *((second, first) if swapped else (first, second)))

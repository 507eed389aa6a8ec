"""Tasks: what systems are asked, and how their answers are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from chatpose_jax.data.example import Example
from chatpose_jax.evaluation.scores import Scores
from chatpose_jax.evaluation.system import Answer, Question

TASKS: dict[str, str] = {
    "describe": "chatpose_jax.evaluation.tasks.describe:Describe",
    "estimation": "chatpose_jax.evaluation.tasks.estimation:Estimation",
    "generation": "chatpose_jax.evaluation.tasks.generation:Generation",
    "judge": "chatpose_jax.evaluation.tasks.judge:Judge",
    "poses": "chatpose_jax.evaluation.tasks.poses:Poses",
    "rpe": "chatpose_jax.evaluation.tasks.rpe:ReasonedEstimation",
    "spg": "chatpose_jax.evaluation.tasks.generation:SpeculativeGeneration",
}
"""Tasks in the package: name -> ``package.module:Class``. Each is called as ``make(rows, data, **options)``: the rows of a split, the name of
their data set, and its options by keyword. It may leave out rows that it cannot use (``Task.rows``); a subset is drawn from the others, and
the task is made again of these. So making one reads no large files."""


class Task(Protocol):
    """A task over some rows.

    name: key of ``TASKS``. rows: what is evaluated, read row by row. settings: what the questions depend on, as JSON, without the rows.

    A task may have a method ``check(name, settings)``. It gets those of a system before this is asked, and raises UserError for a system that the
    task must not judge.
    """

    name: str
    rows: Sequence[Example]
    settings: Mapping[str, Any]

    def question(self, row: Example) -> Question:
        """What a system is asked for a row. It is called again when answers are read, so images that it draws are ``LazyImage``."""
        ...

    def score(self, answers: Sequence[Answer]) -> list[Scores]:
        """The results, one for each table. answers[i] is the answer to rows[i]. The same answers always give the same results.

        Raises UserError where the answers lack what the task needs, or a file is missing.
        """
        ...

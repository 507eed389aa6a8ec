"""Poses on rows of any data set, by the protocol that needs no licensed file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.pose_arrays import Truths
from chatpose_jax.evaluation.protocols import COLUMNS, PROTOCOLS, Answered, Unmeasured, protocol_errors
from chatpose_jax.evaluation.scores import Scores, counts_of, interval, means_of
from chatpose_jax.evaluation.smpl_files import Files
from chatpose_jax.evaluation.subset import with_poses
from chatpose_jax.evaluation.system import Answer, Question
from chatpose_jax.evaluation.tasks.estimation import evaluation_body, protocol_facts


class Poses:
    """The first pose of each row, of words or images, by protocol C (``Estimation`` has the others). Each kind of row has a table.

    Answers without a pose count in no mean, and the counts say how many there are.

    Options: body: the file of the evaluation body; by default that of the package. unmeasured: as in ``Estimation``.

    Raises UserError where no row has a pose, or nothing of a kind was measured.
    """

    name = "poses"

    def __init__(
        self, rows: Sequence[Example], data: str, *, body: str = "", unmeasured: Unmeasured = "left out"
    ) -> None:
        self.rows, self.data, self.unmeasured, self.body = with_poses(rows), data, unmeasured, evaluation_body(body)
        self.settings: Mapping[str, Any] = {}
        self.protocol = "C" if self.body.num_joints == 24 else "C22"
        if not len(self.rows):
            raise UserError(f"none of the {len(rows)} rows of {data} has a pose")

    def question(self, row: Example) -> Question:
        """The first question of the row."""
        return dataclasses.replace(Question.of(row), wants="pose")

    def score(self, answers: Sequence[Answer]) -> list[Scores]:
        """A table for each kind of row."""
        kinds: list[str] = []
        rows = Truths.gather(_noting(self.rows, kinds))
        given = Answered.gather(answers, rows)
        return [
            self._table(kind, np.flatnonzero(np.array(kinds) == kind), rows, given, answers)
            for kind in dict.fromkeys(kinds)
        ]

    def _table(
        self, kind: str, places: np.ndarray, everything: Truths, given: Answered, answers: Sequence[Answer]
    ) -> Scores:
        """places: the rows of a kind among those of the task."""
        rows, protocol = everything.take(places), PROTOCOLS[self.protocol]
        if not rows.poses.there.any():
            raise UserError(
                f"none of the {len(rows)} {kind} rows of {self.data} has a measured joint, so their poses cannot be compared"
            )
        errors = protocol_errors(protocol, rows, given.take(places), Files(""), self.body, "zero", self.unmeasured)
        samples = {name: np.full(len(answers), np.nan) for name in errors.columns}
        for name, column in errors.columns.items():
            samples[name][places] = column
        facts = protocol_facts(self.protocol, protocol, rows, errors, "zero", self.unmeasured, self.body)
        return Scores(
            table=f"poses/{self.data}/{kind}",
            title=f"Poses of {self.data}, {kind} rows",
            facts=facts | {"interval": interval(rows.groups, "groups")},
            values=means_of(errors.columns, rows.groups, COLUMNS),
            samples=samples,
            rank="PA-MPJPE",
            counts=errors.counts | counts_of([answers[i] for i in places]),
        )


def _noting(rows: Iterable[Example], kinds: list[str]) -> Iterator[Example]:
    """The rows, of which each is read once; adds the kind of each to a list."""
    for row in rows:
        kinds.append(row.kind)
        yield row

"""RPE, reasoning about pose estimation, as in ChatPose's Table 2: the pose of the person whom a sentence describes, by what the sentence is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.data.readers.rpe import TYPES
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import protocols
from chatpose_jax.evaluation.protocols import (
    COLUMNS,
    FITTED,
    LEAST_OVERLAP,
    PROTOCOLS,
    Answered,
    Files,
    Truths,
    Unmeasured,
)
from chatpose_jax.evaluation.scores import Scores, Value, means_of, with_intervals
from chatpose_jax.evaluation.system import Answer, Question
from chatpose_jax.evaluation.tasks.estimation import evaluation_body, protocol_facts

_FITTED = {"MPJPE": "MPJPE, fitted", "PA-MPJPE": "PA-MPJPE, fitted"}
ABOUT: dict[str, dict[str, Any]] = COLUMNS | {new: COLUMNS[old] for old, new in _FITTED.items()}


class ReasonedEstimation:
    """One table for each attribute that the descriptions are about, and first one of the mean over the attributes, in which each counts the same.

    Truths are told apart by their ids, because images repeat. A system that answers with several people and their boxes (``Answer.boxes``) is
    compared by the person whose box has the largest intersection over union with ``bbox`` of the row, at least ``LEAST_OVERLAP``. Where there is
    none, the row counts in no mean, and the counts say how many there are.

    Columns are those of protocol C. Where rows have ``fitted_joint_cam``, there is also RPE-Refined's own measure, "fitted": the first 22 joints of
    the answer on the evaluation body with β = 0 against those of SMPL with the betas of the data.

    Options: body: the file of the evaluation body; by default that of the package. unmeasured: as in ``Estimation``.
    """

    name = "rpe"

    def __init__(
        self, rows: Sequence[Example], data: str, *, body: str = "", unmeasured: Unmeasured = "left out"
    ) -> None:
        if not len(rows):
            raise UserError(f"{data} has no rows to evaluate")
        self.rows, self.data, self.unmeasured, self.body = rows, data, unmeasured, evaluation_body(body)
        self.settings: Mapping[str, Any] = {}
        self.protocol = "C" if self.body.num_joints == 24 else "C22"
        _attribute(rows[0].extras, rows[0].id)

    def question(self, row: Example) -> Question:
        """The row's own."""
        return Question.of(row)

    def score(self, answers: Sequence[Answer]) -> list[Scores]:
        """The mean over the attributes, then each."""
        rows = Truths.gather(self.rows)
        given = Answered.gather(answers, rows)
        about = np.array([_attribute(extras, key) for extras, key in zip(rows.extras, rows.keys)])
        kinds = [kind for kind in TYPES if (about == kind).any()]
        places = {kind: np.flatnonzero(about == kind) for kind in kinds}
        everything = self._errors(rows, given)
        tables = {kind: self._errors(rows.take(at), given.take(at)) for kind, at in places.items()}
        sizes = ", ".join(f"{kind} {len(at)}" for kind, at in places.items())
        return [
            self._scores(
                "mean",
                rows,
                everything,
                _over(everything.columns, about, kinds, rows.groups),
                {"attributes": sizes},
                "PA-MPJPE",
            ),
            *(
                self._scores(kind, rows.take(at), tables[kind], None, {"attribute": kind}, "", (at, len(rows)))
                for kind, at in places.items()
            ),
        ]

    def _errors(self, rows: Truths, given: Answered) -> protocols.Errors:
        found = protocols.protocol_errors(
            PROTOCOLS[self.protocol], rows, given, Files(""), self.body, "zero", self.unmeasured
        )
        if not all(FITTED.extras[0] in extras for extras in rows.extras):
            return found
        fitted = protocols.protocol_errors(FITTED, rows, given, Files(""), self.body, "zero", self.unmeasured).columns
        return found._replace(columns=found.columns | {new: fitted[old] for old, new in _FITTED.items()})

    def _scores(
        self,
        about: str,
        rows: Truths,
        errors: protocols.Errors,
        values: Mapping[str, Value] | None,
        also: Mapping[str, str],
        rank: str,
        at: tuple[np.ndarray, int] | None = None,
    ) -> Scores:
        """at: the places of these rows among those of the task, and how many those are."""
        words = protocol_facts(
            self.protocol, PROTOCOLS[self.protocol], rows, errors, "zero", self.unmeasured, self.body
        )
        words |= {
            "person": f"by box where an answer has several, intersection over union of at least {LEAST_OVERLAP}"
        } | dict(also)
        if _FITTED["MPJPE"] in errors.columns:
            words["fitted"] = "the first 22 joints against those of SMPL with the betas of the data"
        samples = errors.columns
        if at is not None:
            places, count = at
            samples = {name: np.full(count, np.nan) for name in samples}
            for name, column in errors.columns.items():
                samples[name][places] = column
        return Scores(
            table=f"rpe/{self.data}/{about}",
            title=f"Reasoning about pose estimation, {self.data}, {about}",
            facts=words,
            values=values or means_of(errors.columns, rows.groups, ABOUT),
            samples=samples,
            rank=rank,
            counts=errors.counts,
        )


def _attribute(extras: Mapping[str, Any], key: str) -> str:
    if extras.get("type") not in TYPES:
        raise UserError(
            f"row {key!r}: expected a row of RPE, whose extras say in type what it is about ({', '.join(TYPES)}); found {extras.get('type')!r:.60}"
        )
    return str(extras["type"])


def _over(
    columns: Mapping[str, np.ndarray], about: np.ndarray, kinds: Sequence[str], groups: Sequence[str]
) -> dict[str, Value]:
    """For each column the mean of the means over the attributes. Groups are drawn whole, with their rows of all attributes."""
    chosen = np.stack([about == kind for kind in kinds], 1)  # (N, A)
    samples = np.stack(list(columns.values()), 1)[..., None]  # (N, C, 1)
    counted = np.isfinite(samples) & chosen[:, None]
    parts = np.stack([np.where(counted, samples, 0), counted], -1)  # (N, C, A, 2)
    shape = parts.shape[1:]

    def statistic(sums: np.ndarray) -> np.ndarray:
        split = sums.reshape(*sums.shape[:-1], *shape)
        return (split[..., 0] / split[..., 1]).mean(-1)

    middle, low, high = with_intervals(parts.reshape(len(parts), -1), groups, statistic)
    return {
        name: Value(float(middle[i]), float(low[i]), float(high[i]), **ABOUT[name]) for i, name in enumerate(columns)
    }

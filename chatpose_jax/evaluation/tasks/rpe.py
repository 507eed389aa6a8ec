"""RPE, reasoning about pose estimation, as in ChatPose's Table 2: the pose of the person whom a sentence describes, by what the sentence is about."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.data.readers.rpe import TYPES
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.boxes import LEAST_OVERLAP
from chatpose_jax.evaluation.pose_arrays import Truths
from chatpose_jax.evaluation.protocols import (
    COLUMNS,
    FITTED,
    PROTOCOLS,
    Answered,
    Betas,
    Unmeasured,
    protocol_errors,
)
from chatpose_jax.evaluation.scores import Scores, Value, counts_of, with_intervals
from chatpose_jax.evaluation.smpl_files import Files
from chatpose_jax.evaluation.system import Answer, Question
from chatpose_jax.evaluation.tasks.estimation import evaluation_body, protocol_facts

MEAN = "mean"
"""The table of the mean over the attributes."""
_FITTED = {"MPJPE": "MPJPE, fitted", "PA-MPJPE": "PA-MPJPE, fitted"}
_COLUMNS: dict[str, dict[str, Any]] = COLUMNS | {new: COLUMNS[old] for old, new in _FITTED.items()}


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
        """The row's own, for a pose."""
        return dataclasses.replace(Question.of(row), wants="pose")

    def score(self, answers: Sequence[Answer]) -> list[Scores]:
        """The mean over the attributes, then each."""
        rows = Truths.gather(self.rows)
        given = Answered.gather(answers, rows)
        about = np.array([_attribute(extras, key) for extras, key in zip(rows.extras, rows.keys)])
        tables = {MEAN: np.arange(len(rows))}
        tables |= {kind: at for kind in TYPES if len(at := np.flatnonzero(about == kind))}
        return [self._table(name, at, rows.take(at), given.take(at), about[at], answers) for name, at in tables.items()]

    def _table(
        self, name: str, at: np.ndarray, rows: Truths, given: Answered, about: np.ndarray, answers: Sequence[Answer]
    ) -> Scores:
        """at: the places of these rows among those of the task. about: their attributes."""
        protocol = PROTOCOLS[self.protocol]
        rule: tuple[Betas, Unmeasured] = ("zero", self.unmeasured)
        errors = protocol_errors(protocol, rows, given, Files(""), self.body, *rule)
        columns, kinds = dict(errors.columns), [kind for kind in TYPES if (about == kind).any()]
        facts = protocol_facts(self.protocol, protocol, rows, errors, *rule, self.body)
        facts["attributes"] = ", ".join(f"{kind} {(about == kind).sum()}" for kind in kinds)
        facts["person"] = (
            f"if an answer has several, the one whose box overlaps the row's most (intersection over union at least {LEAST_OVERLAP})"
        )
        if all(FITTED.extras[0] in extras for extras in rows.extras):
            fitted = protocol_errors(FITTED, rows, given, Files(""), self.body, *rule).columns
            columns |= {new: fitted[old] for old, new in _FITTED.items()}
            facts["fitted"] = (
                "RPE-Refined's own metric: the first 22 joints at β = 0 against those of SMPL with the betas of the data"
            )
        samples = {column: np.full(len(answers), np.nan) for column in columns}
        for column, values in columns.items():
            samples[column][at] = values
        return Scores(
            table=f"rpe/{self.data}/{name}",
            title=f"Reasoning about pose estimation, {self.data}, {name}",
            facts=facts,
            values=_over(columns, about, kinds, rows.groups),
            samples=samples,
            rank="PA-MPJPE" if name == MEAN else "",
            counts=errors.counts | counts_of([answers[i] for i in at]),
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
        name: Value(float(middle[i]), float(low[i]), float(high[i]), **_COLUMNS[name]) for i, name in enumerate(columns)
    }

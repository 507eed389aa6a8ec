"""Poses on rows of any data set, by the protocol that needs no licensed file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.poses import bare, true_poses
from chatpose_jax.evaluation.scores import Scores, counts_of, mean_of
from chatpose_jax.evaluation.subset import with_poses
from chatpose_jax.evaluation.system import Answer, Question
from smpl_jax.io import load_body
from smpl_jax.metrics import pose_metrics
from smpl_jax.pose import stack

COLUMNS = {
    "mpjpe": ("MPJPE", "mm"),
    "pa_mpjpe": ("PA-MPJPE", "mm"),
    "mpjre": ("MPJRE", ""),
    "geodesic_degrees": ("geodesic", "degrees"),
}
"""Values of ``smpl_jax.metrics.pose_metrics`` -> heading and unit."""
NO_POSE, NO_TRUTH = "no pose in the answer: left out", "nothing of the true pose was measured: left out"
_CHUNK = 4096


class Poses:
    """The first pose of each row: protocol C, 24 joints at β = 0 on both sides, over the joints that were measured. Each kind of row has a table.

    Answers without a pose are left out and counted. Options: body: a file in SMPL's format; by default the body of the package.

    Raises UserError where no row has a pose, or nothing of a kind was measured.
    """

    name = "poses"

    def __init__(self, rows: Sequence[Example], data: str, *, body: str | None = None) -> None:
        self.rows, self.data, self.body = with_poses(rows), data, load_body(body)
        self.settings: Mapping[str, Any] = {}
        if not len(self.rows):
            raise UserError(f"none of the {len(rows)} rows of {data} has a pose")

    def question(self, row: Example) -> Question:
        """The first question of the row."""
        return dataclasses.replace(Question.of(row), wants="pose")

    def score(self, answers: Sequence[Answer]) -> list[Scores]:
        """A table for each kind of row."""
        measure = jax.jit(pose_metrics)
        kinds: list[str] = []
        groups: list[str] = []
        parts: list[dict[str, np.ndarray]] = []
        for start in range(0, len(answers), _CHUNK):
            rows = self.rows[start : start + _CHUNK]
            truth = true_poses(rows)
            given = [answer.pose for answer in answers[start : start + _CHUNK]]
            found = stack([truth[i] if pose is None else bare(pose) for i, pose in enumerate(given)])
            values = jax.device_get(measure(found, truth, self.body))
            absent = np.array([pose is None for pose in given])
            parts.append({name: np.where(absent, np.nan, np.asarray(values[name], np.float64)) for name in COLUMNS})
            kinds += [row.kind for row in rows]
            groups += [row.group for row in rows]
        errors = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
        return [self._table(kind, np.array(kinds) == kind, groups, errors, answers) for kind in dict.fromkeys(kinds)]

    def _table(
        self,
        kind: str,
        chosen: np.ndarray,
        all_groups: Sequence[str],
        errors: Mapping[str, np.ndarray],
        answers: Sequence[Answer],
    ) -> Scores:
        places = np.flatnonzero(chosen).tolist()
        groups = [all_groups[i] for i in places]
        mine = [answers[i] for i in places]
        samples = {title: np.where(chosen, errors[name], np.nan) for name, (title, _) in COLUMNS.items()}
        counted = int(np.isfinite(samples["MPJPE"]).sum())
        without = sum(answer.pose is None for answer in mine)
        if not counted and not without:
            raise UserError(
                f"none of the {len(places)} {kind} rows of {self.data} has a measured joint, so their poses cannot be compared"
            )
        names = {group for group in groups if group}
        left_out = {NO_POSE: without, NO_TRUTH: len(places) - counted - without}
        return Scores(
            table=f"poses/{self.data}/{kind}",
            title=f"Poses of {self.data}, {kind} rows",
            facts={
                "protocol": "C: 24 SMPL joints",
                "pelvis": "joint 0",
                "betas": "0 on both sides",
                "body": self.body.name,
                "samples": f"{counted} of {len(places)}",
                "interval": f"95 % bootstrap over {len(names)} groups"
                if names
                else f"95 % bootstrap over {counted} samples",
            },
            values={title: mean_of(errors[name][places], groups, unit=unit) for name, (title, unit) in COLUMNS.items()},
            samples=samples,
            rank="PA-MPJPE",
            counts={reason: count for reason, count in left_out.items() if count} | counts_of(mine),
        )

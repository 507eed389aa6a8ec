"""Pose estimation from images, as in ChatPose's Table 3, by the protocols of ``evaluation.protocols``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import protocols
from chatpose_jax.evaluation.pose_arrays import Truths
from chatpose_jax.evaluation.protocols import (
    COLUMNS,
    OF_DATA,
    PROTOCOLS,
    Answered,
    Betas,
    Protocol,
    Unmeasured,
)
from chatpose_jax.evaluation.scores import Scores, counts_of, interval, means_of
from chatpose_jax.evaluation.smpl_files import Files, MissingFile
from chatpose_jax.evaluation.subset import with_poses
from chatpose_jax.evaluation.system import Answer, Question
from chatpose_jax.settings import did_you_mean
from smpl_jax import io
from smpl_jax.body import BodyModel
from smpl_jax.pose import family_of


class Estimation:
    """The pose of the person in an image, by several protocols: one table each. Rows without an image or a pose are not asked.

    A system answers with a pose, or with positions of the set that a protocol names (``Protocol.named``), such as ``h36m17`` under A, ``humans44``
    under B and ``smpl24`` under C and D. Columns that need rotations are NaN for answers with positions alone, which the counts say. An answer
    without a pose counts in no mean, and the counts say how many there are.

    Options:
        protocols: keys of ``PROTOCOLS`` with commas between them. By default those of the data set (``OF_DATA``) whose files are all there; the
            facts say which are left out and why. If a file of a named protocol is missing, that is an error. Predicted positions need no file of
            the predicted body: name the protocol for them.
        smpl: the folder of ``FILES``: SMPL's bodies and the regressors.
        betas: of predicted poses under A, B and D, on the neutral SMPL: "own", those of the answer, 0 where it has none; or "zero".
        unmeasured: of joints that the data filled in, such as toes and hands of 3DPW: "left out", their rotations do not count; or "counted", as in
            figures of papers.
        body: the file of the evaluation body, for C; by default the body of the package.
    """

    name = "estimation"

    def __init__(
        self,
        rows: Sequence[Example],
        data: str,
        *,
        protocols: str = "",
        smpl: str = "",
        betas: Betas = "own",
        unmeasured: Unmeasured = "left out",
        body: str = "",
    ) -> None:
        self.rows = rows = with_poses(rows, "image")
        if not len(rows):
            raise UserError(f"no row of {data} shows an image and has a pose")
        self.data, self.betas, self.unmeasured = data, betas, unmeasured
        self.files, self.body = Files(smpl), evaluation_body(body)
        self.settings: Mapping[str, Any] = {}
        names = named_protocols(protocols)
        self.left_out = ""
        if not names:
            of_data = OF_DATA.get(data.partition("-")[0], ("C" if self.body.num_joints == 24 else "C22",))
            absent = {name: self.files.absent(PROTOCOLS[name].files) for name in of_data}
            names = tuple(name for name in of_data if not absent[name])
            if not names:
                raise MissingFile(self.files.missing(absent[of_data[0]]))
            self.left_out = "; ".join(
                f"{name}, which needs {self.files.words(found)}" for name, found in absent.items() if found
            )
        for name in names:
            check_protocol(name, rows[0], self.files, self.body)
        self.protocols = names

    def question(self, row: Example) -> Question:
        """The row's own, for a pose."""
        return dataclasses.replace(Question.of(row), wants="pose")

    def score(self, answers: Sequence[Answer]) -> list[Scores]:
        """A table for each protocol."""
        rows = Truths.gather(self.rows)
        given = Answered.gather(answers, rows)
        found = {
            name: protocols.protocol_errors(
                PROTOCOLS[name], rows, given, self.files, self.body, self.betas, self.unmeasured
            )
            for name in self.protocols
        }
        also = {"left out": self.left_out} if self.left_out else {}
        return [
            Scores(
                table=f"estimation/{self.data}/{name}",
                title=f"Pose estimation, {self.data}, protocol {name}",
                facts=protocol_facts(name, PROTOCOLS[name], rows, errors, self.betas, self.unmeasured, self.body)
                | also,
                values=means_of(errors.columns, rows.groups, COLUMNS),
                samples=errors.columns,
                rank="PA-MPJPE",
                counts=errors.counts | counts_of(answers),
            )
            for name, errors in found.items()
        ]


USED_BY = {
    "A": "SPIN, HMR",
    "A-hips": "GVHMR, PromptHMR",
    "B": "4D-Humans, UniPose",
    "D": "3DPW's official evaluation",
}
ROTATION_RULES = {
    "MPJRE": "100 times the mean absolute difference of the entries of the rotation matrices, joints 1 to 23 (MPJRE-21: 1 to 21)",
    "angle": "mean geodesic distance of the rotations, joints 1 to 23",
}
OFFICIAL_RULES = {
    "PCK@50": "share of 12 joints whose error is at most 50 mm; AUC: area under the curve of this share from 0 to 199 mm",
    "MPJAE": "mean angle between orientations of 9 joints in the camera frame (MPJAE-PA: after the rotation of the Procrustes alignment)",
}
"""Facts for a reader who has only the report: who uses a protocol, and what columns are."""


def named_protocols(words: str) -> tuple[str, ...]:
    """The protocols that an option names. Raises UserError for an unknown one."""
    names = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    for name in names:
        if name not in PROTOCOLS:
            raise UserError(
                f"protocols: expected some of {', '.join(PROTOCOLS)}; found {name!r}{did_you_mean(name, PROTOCOLS)}"
            )
    return names


def check_protocol(name: str, row: Example, files: Files, body: BodyModel) -> None:
    """Raises UserError unless a row has what a protocol needs, and the files of its truth are there."""
    protocol = PROTOCOLS[name]
    if absent := [extra for extra in protocol.extras if extra not in row.extras]:
        raise UserError(
            f"protocol {name} needs {', '.join(absent)} in the extras of a row, which {row.place} has not; "
            "docs/evaluation.md says which data set takes which protocols, and C takes any with poses"
        )
    if protocol.truth == "gendered":
        if absent := files.absent([name for name in protocol.files if name != "neutral"]):
            raise MissingFile(files.missing(absent))
        files.body("male"), files.body("female")
    if (protocol.truth == "body" and len(protocol.points) > body.num_joints) or (name == "C" and body.num_joints != 24):
        raise UserError(
            f"protocol {name} compares SMPL's 24 joints, and the body {body.name!r} has {body.num_joints}; --set protocols=C22"
        )


def evaluation_body(path: str) -> BodyModel:
    """The body of a file, or that of the package for "". Raises UserError."""
    try:
        body = io.load_body(path or None)
        family_of(body.num_joints)
    except ValueError as error:
        raise UserError(f"the evaluation body {path}: {error}" if path not in str(error) else str(error)) from None
    return body


def protocol_facts(
    name: str,
    protocol: Protocol,
    rows: Truths,
    errors: protocols.Errors,
    betas: Betas,
    unmeasured: Unmeasured,
    body: BodyModel,
) -> dict[str, str]:
    """What rows of this table must share to be comparable, in words; and what the columns are."""
    words = {
        "gendered": "SMPL of each person's gender, with the betas of the data",
        "file": "3D keypoints of the data",
        "body": f"the true pose on the body {body.name!r}, fingerprint {body.fingerprint}",
    }
    rule = "0 for true and predicted poses"
    if protocol.on != "body":
        rule = {"zero": "0", "own": "those of the answer, or 0"}[betas] + "; predicted poses on the neutral SMPL"
    count, used = len(rows), int(np.isfinite(errors.columns["PA-MPJPE"]).sum())
    found = {
        "protocol": name,
        **({"protocol used by": USED_BY[name]} if name in USED_BY else {}),
        "points": protocol.words[0],
        "pelvis": protocol.words[1],
        "ground truth": words[protocol.truth],
        "betas": rule,
        "rotations": "the data has none",
        "samples": f"{count:,}" if used == count else f"{used:,} of {count:,}",
        "interval": interval(rows.groups),
    }
    if rows.poses.measured.any():
        if unmeasured == "counted":
            found["rotations"] = "compared at all joints, also those that the data filled in"
        else:
            least, most = (f(rows.poses.measured[rows.poses.there, 1:].sum(1)) for f in (np.min, np.max))
            span = f"{most}" if least == most else f"{least} to {most}"
            found["rotations"] = f"compared at the joints that the data measured, {span} of 23"
        found |= ROTATION_RULES
    if protocol.official:
        found |= OFFICIAL_RULES
        tracks = {(group, extras.get("actor")) for group, extras in zip(rows.groups, rows.extras)}
        found["tracks"] = f"{len(tracks)} tracks of persons; the official evaluation has the 87 of all three splits"
    return found

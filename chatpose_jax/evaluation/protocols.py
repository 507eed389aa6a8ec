"""Protocols of pose estimation: which points are compared, what they are relative to, and on which bodies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import measures
from chatpose_jax.evaluation.boxes import best_overlap, person_box
from chatpose_jax.evaluation.pose_arrays import PoseArrays, Truths, gives_betas
from chatpose_jax.evaluation.scores import is_noted
from chatpose_jax.evaluation.smpl_files import Files
from chatpose_jax.evaluation.system import Answer
from chatpose_jax.settings import one_line
from smpl_jax.body import BodyModel
from smpl_jax.keypoints import KEYPOINT_SETS, Locations, locate
from smpl_jax.pose import SHARED, Pose, family_of, placed, to_family

Betas = Literal["own", "zero"]
Unmeasured = Literal["left out", "counted"]


class Protocol(NamedTuple):
    """A row of ``PROTOCOLS``.

    points: the compared points, of the set ``named``. pelvis: points of this set; truth and
        prediction are each moved so that the mean of these is the origin.
    named: the set of ``smpl_jax.keypoints``, which is also the name under which an answer gives positions (``Answer.joints``).
    truth: "gendered", SMPL of the person's gender with the betas of the data; "file", positions (N, size, 3) in the first of ``extras``, with a
        fourth column of confidence where that is written; "body", the pose of the data on the evaluation body with β = 0.
    on: the body of predicted poses: "neutral", the neutral SMPL; or "body", the evaluation body with β = 0.
    regressor: which the points need, a key of ``FILES``; "" for joints of the body.
    extras: what rows must have. words: of points and pelvis, for the report. official: also the measures of 3DPW's official evaluation.
    """

    points: tuple[int, ...]
    pelvis: tuple[int, ...]
    named: str
    truth: Literal["gendered", "file", "body"]
    on: Literal["neutral", "body"]
    regressor: str
    extras: tuple[str, ...]
    words: tuple[str, str]
    official: bool = False

    @property
    def size(self) -> int:
        """Number of points of the set."""
        return len(KEYPOINT_SETS[self.named])

    @property
    def files(self) -> tuple[str, ...]:
        """Keys of ``FILES`` that truths and predicted poses need. Answers with positions need only those of the truth."""
        bodies = ("male", "female") if self.truth == "gendered" else ()
        neutral = ("neutral",) if self.on == "neutral" else ()
        return (*bodies, *neutral, *((self.regressor,) if self.regressor else ()))


_SOURCES = [point.source for point in KEYPOINT_SETS["h36m17"]]
_LSP = tuple(_SOURCES.index(point.source) for point in KEYPOINT_SETS["lsp14"])
"""LSP's 14 joints among Human3.6M's 17: SPIN's ``H36M_TO_J14``, whose numbers are rows of the regressor, which has the legs in another order."""
_A = Protocol(
    points=_LSP,
    pelvis=(0,),
    named="h36m17",
    truth="gendered",
    on="neutral",
    regressor="h36m",
    extras=("gender", "betas"),
    words=("14 LSP joints, from Human3.6M's regressor", "row 0 of the regressor"),
)
_C = Protocol(
    points=tuple(range(24)),
    pelvis=(0,),
    named="smpl24",
    truth="body",
    on="body",
    regressor="",
    extras=(),
    words=("24 joints of the body", "joint 0"),
)
_FIRST = tuple(range(SHARED))
PROTOCOLS: dict[str, Protocol] = {
    "A": _A,
    "A-hips": _A._replace(pelvis=_LSP[2:4], words=(_A.words[0], "midpoint of the hips")),
    "B": Protocol(
        points=(*range(25, 38), 43),
        pelvis=(39,),
        named="humans44",
        truth="file",
        on="neutral",
        regressor="j19",
        extras=("keypoints_3d",),
        words=("14 of 4D-Humans' 44 keypoints (25 … 37, 43)", "point 39"),
    ),
    "C": _C,
    "C22": _C._replace(points=_FIRST, words=("the first 22 joints of the body", "joint 0")),
    "D": _C._replace(
        truth="gendered",
        on="neutral",
        extras=("gender", "betas", "detected"),
        words=("24 joints of SMPL", "joint 0"),
        official=True,
    ),
}
"""A: SPIN's (nkolot/SPIN ``eval.py``); with the pelvis of GVHMR, "A-hips". B: 4D-Humans' (``hmr2/utils/pose_utils.py``). C: needs no licensed
file. D: 3DPW's official evaluation (aymenmir1/3dpw-eval), whose frames are those with detected keypoints."""

FITTED = _C._replace(
    points=_FIRST, truth="file", extras=("fitted_joint_cam",), words=("the first 22 joints of SMPL", "joint 0")
)
"""RPE-Refined's own measure (jjunsss/RPE-Refined ``evaluate_pose.py``): positions are those of SMPL with the person's betas."""

OF_DATA: dict[str, tuple[str, ...]] = {
    "3dpw": ("A", "C", "D"),
    "3dpw_test": ("A", "B", "C"),
    "h36m_val_p2": ("B",),
}
"""Protocols of a data set by the start of its name, up to a "-" (``3dpw_test-200``); all others have C."""

MAJOR = (1, 2, 4, 5, 7, 8, 16, 17, 18, 19, 20, 21)
ORIENTED = (0, 1, 2, 4, 5, 16, 17, 18, 19)
"""Joints of PCK and AUC, and of MPJAE, in 3DPW's official evaluation."""
ORIENTATIONS = "orientations9"
"""The name in ``Answer.joints`` of (27, 3): the rows of nine matrices, the orientations of ``ORIENTED`` in the camera frame."""

COLUMNS: dict[str, dict[str, Any]] = {
    "MPJPE": {"unit": "mm"},
    "PA-MPJPE": {"unit": "mm"},
    "PCK@50": {"unit": "%", "better": "higher"},
    "AUC": {"better": "higher", "digits": 3},
    "MPJAE": {"unit": "degrees"},
    "MPJAE-PA": {"unit": "degrees"},
    "MPJRE": {},
    "MPJRE-21": {},
    "angle": {"unit": "degrees"},
    "root angle": {"unit": "degrees"},
}
"""Columns of the tables, in order, with what ``scores.Value`` says of them."""
ROTATIONS = ("MPJRE", "MPJRE-21", "angle", "root angle")

# Positions -----------------------------------------------------------------------------------------------------------------------------------------


class Positions(NamedTuple):
    """(N, size, 3) metres of all points of a protocol's set, and (N, size) bool, which are known."""

    points: np.ndarray
    known: np.ndarray

    def __repr__(self) -> str:
        return one_line(self)


def body_points(
    protocol: Protocol, poses: PoseArrays, body: BodyModel, betas: np.ndarray | None, files: Files
) -> Positions:
    """The points of a protocol for poses on a body. Computed by ``smpl_jax`` in float32, which is exact to about 0.0005 mm.

    A point that is not a joint of the body is known only where the whole pose is. A joint is known where all its ancestors were measured.
    betas: (N, 10), or None for zeros.
    """
    try:
        if protocol.regressor:
            regressor = files.regressor(protocol.regressor, body.num_vertices)
            body = body.with_keypoints(regressors={protocol.regressor: regressor})
        located = locate(body, protocol.named, missing="mask")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    shape = np.zeros((len(poses.there), 10)) if betas is None else betas[:, :10]
    arrays = (poses.rotations.astype(np.float32), shape[:, : body.num_betas].astype(np.float32))
    found = _chunked(partial(_located, located), *arrays)
    known = _placed(poses.measured, body.parents)
    if protocol.regressor:
        known = np.repeat(known.all(1, keepdims=True), found.shape[1], 1)
    return Positions(found, known & located.known & poses.there[:, None])


@jax.jit
def _located(located: Locations, rotations: jax.Array, betas: jax.Array) -> jax.Array:
    pose = to_family(Pose(rotations, "camera"), family_of(located.part.num_joints))
    return located(pose.rotations, betas)


_CHUNK = 512


def _chunked(function: Callable[..., jax.Array], *arrays: np.ndarray) -> np.ndarray:
    """A function of arrays (N, …), computed for a fixed number at a time, so that it is compiled once and its memory is bounded."""
    count = len(arrays[0])
    size = min(_CHUNK, 1 << max(count - 1, 0).bit_length())
    found = []
    for start in range(0, count, size):
        parts = [array[start : start + size] for array in arrays]
        short = size - len(parts[0])
        padded = [np.concatenate([part, np.repeat(part[-1:], short, 0)]) if short else part for part in parts]
        found.append(np.asarray(function(*padded), np.float64)[: size - short])
    return np.concatenate(found)


def _placed(measured: np.ndarray, parents: Sequence[int]) -> np.ndarray:
    """(N, 24), joints whose position relative to the pelvis is known, whatever is known of the root."""
    turned = measured.copy()
    turned[:, 0] = measured[:, 1:].any(1)
    whole = np.zeros((len(measured), len(parents)), bool)
    whole[:, : min(24, len(parents))] = turned[:, : len(parents)]
    found = placed(whole, parents)[:, :24]
    return found & found[:, 1:].any(1, keepdims=True)


# Answers and errors --------------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Answered:
    """What N answers give, gathered once. poses: those of the persons that were asked for. joints: ``Answer.joints`` of each.

    unmatched: (N,) bool, answers with people of whom none is the person that was asked for. other_betas: (N,) bool, answers with betas that are
    not SMPL's. noted: (N,) bool, answers whose notes are counted; for one without a pose they say why.
    """

    poses: PoseArrays
    joints: list[Mapping[str, np.ndarray]]
    unmatched: np.ndarray
    other_betas: np.ndarray
    noted: np.ndarray

    __repr__ = one_line

    @classmethod
    def gather(cls, answers: Sequence[Answer], rows: Truths) -> Answered:
        """Of several people of an answer, takes the one whose box ``best_overlap`` finds for the row's ``bbox`` or ``box``."""
        poses, joints = [], []
        unmatched = np.zeros(len(answers), bool)
        for i, answer in enumerate(answers):
            pose, positions = answer.pose, answer.joints
            if answer.boxes is not None:
                person = best_overlap(answer.boxes, person_box(rows.extras[i], rows.keys[i]))
                unmatched[i] = person is None
                pose = None if person is None or pose is None else pose[person]
                positions = {} if person is None else {name: points[person] for name, points in positions.items()}
            poses.append(pose)
            joints.append(positions)
        found = PoseArrays.gather(poses)
        has_betas = np.array([pose is not None and gives_betas(pose) for pose in poses], bool)
        noted = np.array([is_noted(answer) for answer in answers], bool)
        return cls(found, joints, unmatched, has_betas & ~found.has_betas, noted)

    def take(self, rows: np.ndarray) -> Answered:
        """Those at an index (n,)."""
        joints = [self.joints[i] for i in rows]
        masks = (self.unmatched, self.other_betas, self.noted)
        return Answered(self.poses.take(rows), joints, *(mask[rows] for mask in masks))

    def named(self, name: str, size: int, keys: Sequence[str]) -> Positions:
        """Positions (N, size, 3) of a named set, and which there are. Raises UserError for another shape."""
        found, known = np.zeros((len(keys), size, 3)), np.zeros((len(keys), size), bool)
        for i, joints in enumerate(self.joints):
            if name in joints:
                points = np.asarray(joints[name], np.float64)
                if points.shape != (size, 3):
                    raise UserError(
                        f"the answer to row {keys[i]!r}: {name} must have the shape ({size}, 3), found {points.shape}"
                    )
                found[i], known[i] = np.nan_to_num(points), np.isfinite(points).all(-1)
        return Positions(found, known)


class Errors(NamedTuple):
    """columns: (N,) for each of ``COLUMNS`` that applies. counts: rows that are left out of some or all columns, by reason."""

    columns: dict[str, np.ndarray]
    counts: dict[str, int]

    def __repr__(self) -> str:
        return one_line(self)


def protocol_errors(
    protocol: Protocol,
    rows: Truths,
    given: Answered,
    files: Files,
    body: BodyModel,
    betas: Betas,
    unmeasured: Unmeasured,
) -> Errors:
    """Errors of N answers by a protocol.

    Args:
        body: the evaluation body, for protocols whose truth is on it.
        betas: of predicted poses on SMPL: "own", what the answer says, zeros where it says nothing; or "zero".
        unmeasured: whether the rotations of joints that the data filled in count. Their positions count as ``Protocol.truth`` says.

    Raises UserError where a file or a value of a row is missing.
    """
    truth, rooted = true_positions(protocol, rows, files, body)
    found, has_root, posed = predicted_positions(protocol, rows, given, files, body, betas)
    points = list(protocol.points)
    mask = truth.known[:, points]
    there = np.asarray(mask.any(1))
    if protocol.official:
        there &= np.array([bool(extras["detected"]) for extras in rows.extras])
    answered = found.known.any(1)
    whole: np.ndarray = answered & (found.known[:, points] | ~mask).all(1)
    mask = mask & (there & whole)[:, None]
    a, b = found.points[:, points], truth.points[:, points]
    with np.errstate(invalid="ignore"):
        pelvis = list(protocol.pelvis)
        centred = [side.points - side.points[:, pelvis].mean(1, keepdims=True) for side in (found, truth)]
        placed_mask = mask & (rooted & has_root & (truth.known & found.known)[:, pelvis].all(1))[:, None]
        from_pelvis = measures.distances(centred[0][:, points], centred[1][:, points])
        columns = {"MPJPE": measures.mean_over(from_pelvis, placed_mask)}
        after = measures.aligned(a, b, mask)
        columns["PA-MPJPE"] = measures.mean_over(measures.distances(after.points, b), mask)
        if protocol.official:
            columns |= _official(rows, given, from_pelvis, placed_mask, after.rotation, there)
        if rows.poses.measured.any():
            columns |= rotation_errors(rows.poses, given.poses, unmeasured, there)
    empty = there & ~answered & ~given.unmatched
    others = np.array([bool(joints) for joints in given.joints], bool)
    counts = {
        "rows without ground truth": int((~truth.known[:, points].any(1)).sum()),
        "frames without detected keypoints, which the protocol leaves out": int(
            (truth.known[:, points].any(1) & ~there).sum()
        ),
        "the person asked for is not among those of the answer": int((there & given.unmatched).sum()),
        "no pose and no positions in the answer": int((empty & ~others & ~given.noted).sum()),
        "no pose, and positions of other points than the protocol compares": int((empty & others).sum()),
        "the answer lacks some of the points": int((there & answered & ~whole).sum()),
    }
    if protocol.on == "body":
        counts["no pose, only positions, which are of the system's own body"] = int((there & whole & ~posed).sum())
    elif betas == "own":
        counts["betas of another body than SMPL, replaced by 0"] = int((there & posed & given.other_betas).sum())
    if (angle := columns.get("angle")) is not None:
        counts["positions but not all of the compared rotations"] = int(
            (there & whole & np.isnan(angle) & _counted(rows.poses, unmeasured)[:, 1:].any(1)).sum()
        )
    return Errors({name: columns[name] for name in COLUMNS if name in columns}, {k: n for k, n in counts.items() if n})


def true_positions(protocol: Protocol, rows: Truths, files: Files, body: BodyModel) -> tuple[Positions, np.ndarray]:
    """Points (N, size, 3) of the truth, and (N,) whether its root is known."""
    if protocol.truth == "file":
        width = 4 if protocol.regressor else 3
        numbers = rows.numbers(protocol.extras[0], protocol.size, width)
        confident: np.ndarray = np.all(numbers[..., 3:] > 0, axis=-1)
        return Positions(numbers[..., :3], confident), np.ones(len(rows), bool)
    if protocol.truth == "body":
        return body_points(protocol, rows.poses, body, None, files), rows.poses.measured[:, 0]
    shape, found = rows.numbers("betas", 10), np.zeros((len(rows), protocol.size, 3))
    genders = np.array([str(extras.get("gender", "")) for extras in rows.extras])
    if len(unknown := np.flatnonzero(~np.isin(genders, ("male", "female", "neutral")))):
        raise UserError(
            f"row {rows.keys[unknown[0]]!r}: the protocol needs the gender, male, female or neutral, in its extras; found {genders[unknown[0]]!r}"
        )
    for gender in sorted(set(genders)):
        chosen = genders == gender
        found[chosen] = body_points(protocol, rows.poses.take(chosen), files.body(gender), shape[chosen], files).points
    known: np.ndarray = np.broadcast_to(
        rows.poses.there[:, None], found.shape[:2]
    )  # what the fits filled in counts too
    return Positions(found, known), rows.poses.there


def predicted_positions(
    protocol: Protocol, rows: Truths, given: Answered, files: Files, body: BodyModel, betas: Betas
) -> tuple[Positions, np.ndarray, np.ndarray]:
    """Points (N, size, 3) of the answers; (N,) whether their root is known; and (N,) whether they are those of a pose.

    If an answer has both positions and a pose, the pose is used where predicted bodies have β = 0, and else the positions.
    """
    stated = given.named(protocol.named, protocol.size, rows.keys)
    poses = given.poses
    pose_first = protocol.on == "body" or betas == "zero"
    posed = poses.there & _placed(poses.measured, _PARENTS).all(1)
    use = posed if pose_first else posed & ~stated.known.any(1)
    points, known, root = stated.points.copy(), stated.known.copy(), np.ones(len(rows), bool)
    if use.any():
        part = poses.take(use)
        on = body if protocol.on == "body" else files.body("neutral")
        own = None if pose_first else part.betas
        points[use], known[use] = body_points(protocol, part, on, own, files)
        root[use] = part.measured[:, 0]
    return Positions(points, known), root, use


def rotation_errors(
    truth: PoseArrays, found: PoseArrays, unmeasured: Unmeasured, there: np.ndarray
) -> dict[str, np.ndarray]:
    """The columns ``ROTATIONS``, each (N,): over joints 1 … 23, over 1 … 21, and of the root. there: (N,), rows that count.

    An answer that marks one of the compared joints 1 … 21 as not estimated does not count. Hands (22, 23) that it lacks are straight.
    """
    compared = _counted(truth, unmeasured) & (there & found.there)[:, None]
    whole = (found.measured | ~compared)[:, 1:SHARED].all(1)
    body = compared & whole[:, None]
    difference = measures.entries(found.rotations, truth.rotations)
    angle = measures.angles(found.rotations, truth.rotations)
    return {
        "MPJRE": measures.mean_over(difference[:, 1:], body[:, 1:]),
        "MPJRE-21": measures.mean_over(difference[:, 1:SHARED], body[:, 1:SHARED]),
        "angle": measures.mean_over(angle[:, 1:], body[:, 1:]),
        "root angle": np.where(compared[:, 0] & found.measured[:, 0], angle[:, 0], np.nan),
    }


def _counted(truth: PoseArrays, unmeasured: Unmeasured) -> np.ndarray:
    """(N, 24), joints whose rotations are compared."""
    return truth.measured if unmeasured == "left out" else np.repeat(truth.there[:, None], 24, 1)


def _official(
    rows: Truths, given: Answered, from_pelvis: np.ndarray, mask: np.ndarray, turned: np.ndarray, there: np.ndarray
) -> dict[str, np.ndarray]:
    """What 3DPW's evaluation adds. Orientations are those that the answer states, else those of its pose."""
    major = np.where(mask[:, MAJOR], from_pelvis[:, MAJOR], np.nan)
    stated = given.named(ORIENTATIONS, 27, rows.keys)
    oriented = stated.known.all(1) & there
    posed = given.poses.there & given.poses.measured[:, :SHARED][:, list(_PATHS)].all(1) & there
    found, truth = (
        measures.global_rotations(poses.rotations, _PARENTS)[:, ORIENTED] for poses in (given.poses, rows.poses)
    )
    found = np.where(oriented[:, None, None, None], stated.points.reshape(-1, 9, 3, 3), found)
    counts = oriented | posed

    def angle(rotations: np.ndarray) -> np.ndarray:
        return np.where(counts, measures.angles(rotations, truth).mean(1), np.nan)

    return {
        "PCK@50": np.where(np.isnan(major).any(1), np.nan, 100 * (major <= 50).mean(1)),
        "AUC": measures.area_under_pck(major),
        "MPJAE": angle(found),
        "MPJAE-PA": np.where(mask.any(1), angle(turned[:, None] @ found), np.nan),
    }


_PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
_PATHS = (0, 1, 2, 3, 4, 5, 6, 9, 13, 14, 16, 17, 18, 19)
"""``ORIENTED`` and their ancestors."""

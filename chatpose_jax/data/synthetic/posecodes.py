"""Posecodes: properties of a pose, measured on the joints and sorted into named categories.

The idea is PoseScript's (Delmas et al., ECCV 2022). Elementary codes are thresholds on angles, distances, relative positions and heights.
Super-codes are conditions on them. The codes, thresholds and words are this project's own. Arms are measured in the frame of the chest, legs in
that of the pelvis: "in front" and "overhead" then also make sense for a body that lies or bends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from chatpose_jax.data.synthetic import skeleton
from chatpose_jax.data.synthetic.skeleton import INDEX
from chatpose_jax.settings import one_line


@dataclasses.dataclass(frozen=True)
class Scale:
    """How a kind of code sorts values into categories.

    thresholds: ascending. noise: values get uniform noise in ± this before they are sorted. categories: one name more than thresholds; ""
    is never said.
    """

    thresholds: tuple[float, ...]
    noise: float
    categories: tuple[str, ...]

    def sort(self, values: np.ndarray) -> np.ndarray:
        """Category index (N,) int of values (N,): the number of thresholds below the value."""
        return np.searchsorted(np.array(self.thresholds), values, side="left")


_ANGLE = Scale((45, 75, 105, 135, 160), 4, ("folded", "sharply", "right_angle", "half", "slightly", "straight"))
_UPRIGHT = Scale((12, 78), 4, ("vertical", "", "level"))
_NEAR = Scale((0.20,), 0.02, ("close", ""))
KINDS: dict[str, Scale] = {
    # degrees at the middle joint
    "elbow": _ANGLE,
    "knee": _ANGLE,
    # hand relative to the shoulder of its side, in the frame of the chest, metres
    "hand_height": Scale(
        (-0.50, -0.30, -0.12, 0.10, 0.30), 0.03, ("low", "waist", "chest", "shoulder", "head", "overhead")
    ),
    "hand_depth": Scale((-0.10, 0.16, 0.36), 0.03, ("behind", "", "front", "far_front")),
    "hand_side": Scale((-0.12, 0.16, 0.36), 0.03, ("across", "", "out", "far_out")),
    "elbow_height": Scale((-0.17, -0.07, 0.09), 0.02, ("", "lifted", "level", "above")),
    # degrees between a segment and the vertical, 0 to 90
    "forearm": _UPRIGHT,
    "shin": _UPRIGHT,
    # distance of the hand from another joint, metres
    "hand_hand": _NEAR,
    "hand_head": Scale((0.21,), 0.02, ("close", "")),
    "hand_hip": Scale((0.19,), 0.02, ("close", "")),
    "hand_knee": _NEAR,
    "hand_foot": Scale((0.25,), 0.02, ("close", "")),
    "hand_ground": Scale((0.10,), 0.02, ("touching", "")),
    # legs in the frame of the pelvis: hip flexion and abduction in degrees
    "thigh": Scale((-7, 18, 42, 66, 98), 3, ("back", "", "little", "raised", "level", "drawn_up")),
    "thigh_side": Scale((-6, 13, 26), 3, ("crossed", "", "out", "far_out")),
    "knee_ground": Scale((0.10,), 0.02, ("touching", "")),
    "foot_lift": Scale((0.12, 0.32), 0.02, ("", "lifted", "high")),
    "feet_apart": Scale((0.16, 0.30, 0.48), 0.02, ("together", "", "apart", "wide")),
    # trunk and head in degrees
    "trunk_lean": Scale((-18, 14, 38), 3, ("back", "", "forward", "far_forward")),
    "trunk_side": Scale((-8, 8), 2, ("right", "", "left")),
    "trunk_turn": Scale((-11, 11), 2, ("right", "", "left")),
    "back_curve": Scale((28, 48), 3, ("", "curved", "rounded")),
    "head_turn": Scale((-16, 16), 3, ("right", "", "left")),
    "head_nod": Scale((-14, 14), 3, ("up", "", "down")),
}
SIDED = (
    "elbow", "knee", "hand_height", "hand_depth", "hand_side", "elbow_height", "hand_head", "hand_hip", "hand_knee",
    "hand_foot", "hand_ground", "forearm", "shin", "thigh", "thigh_side", "knee_ground", "foot_lift",
)  # fmt: skip
CODES: tuple[tuple[str, str], ...] = tuple(
    (kind, side) for kind in KINDS for side in (("left", "right") if kind in SIDED else ("",))
)

# Shapes of an arm, as conditions on its codes. The first that holds wins. A caption says the shape instead of these codes.
ARM_SHAPES: dict[str, dict[str, tuple[str, ...]]] = {
    "prop": {"hand_ground": ("touching",), "elbow": ("half", "slightly", "straight")},
    "hip": {"hand_hip": ("close",), "elbow": ("sharply", "right_angle", "half"), "elbow_height": ("", "lifted")},
    "head": {"hand_head": ("close",), "elbow": ("folded", "sharply", "right_angle")},
    "up": {"hand_height": ("overhead",), "elbow": ("half", "slightly", "straight")},
    "wave": {
        "hand_height": ("head", "overhead"), "elbow_height": ("level", "above", "lifted"),
        "elbow": ("sharply", "right_angle", "half"),
    },
    "side": {"hand_side": ("far_out",), "elbow": ("half", "slightly", "straight"), "elbow_height": ("level", "above")},
    "forward": {
        "hand_depth": ("far_front",), "elbow": ("half", "slightly", "straight"),
        "elbow_height": ("level", "above", "lifted"),
    },
    "chest": {
        "hand_depth": ("front", "far_front"), "elbow": ("folded", "sharply", "right_angle"),
        "hand_height": ("waist", "chest", "shoulder"),
    },
    "down": {"hand_height": ("low",), "elbow": ("half", "slightly", "straight")},
}  # fmt: skip

POSTURE_NAMES = (
    "stand", "step", "run", "kick", "squat", "lunge", "kneel", "half_kneel", "sit", "floor_sit", "bend", "crawl",
    "supine", "prone", "side", "one_leg",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes of N poses.

    categories: (N, len(CODES)) int, an index into ``KINDS[kind].categories``. posture: (N,) names of ``POSTURE_NAMES``.
    lead: (N,) "left" or "right", the side that a one-sided posture names: the leg in front or raised, or the side that
    the body lies on. shapes: (N, 2) names of ``ARM_SHAPES`` or "".
    """

    categories: np.ndarray
    posture: np.ndarray
    lead: np.ndarray
    shapes: np.ndarray

    __repr__ = one_line

    def named(self, row: int) -> dict[tuple[str, str], str]:
        """The codes of one pose that a caption may say: (kind, side) → category."""
        names = {code: KINDS[code[0]].categories[c] for code, c in zip(CODES, self.categories[row])}
        return {code: name for code, name in names.items() if name}


def code_values(rotations: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """Values (N,) of all codes, metres or degrees, for poses (N, 24, 3, 3) in the body frame with yaw removed."""
    joints, world = skeleton.forward_kinematics(rotations)
    at = {name: joints[:, i] for name, i in INDEX.items()}
    for side in ("left", "right"):  # the palm, a little beyond SMPL's hand joint
        at[f"{side}_palm"] = at[f"{side}_hand"] + 0.3 * (at[f"{side}_hand"] - at[f"{side}_wrist"])
    shoulders = (at["left_shoulder"] + at["right_shoulder"]) / 2
    chest = _frame(at["left_shoulder"] - at["right_shoulder"], at["neck"] - at["spine1"])
    pelvis = world[:, 0]
    ground = (joints[..., 1] - skeleton.FLESH).min(1)
    out: dict[tuple[str, str], np.ndarray] = {}
    for side, other, sign in (("left", "right", 1.0), ("right", "left", -1.0)):

        def joint(name: str, side: str = side) -> np.ndarray:
            return at[f"{side}_{name}"]

        out["elbow", side] = _angle(joint("shoulder"), joint("elbow"), joint("wrist"))
        out["knee", side] = _angle(joint("hip"), joint("knee"), joint("ankle"))
        hand = _within(chest, joint("palm") - joint("shoulder"))
        out["hand_height", side] = hand[:, 1]
        out["hand_depth", side] = hand[:, 2]
        out["hand_side", side] = hand[:, 0] * sign
        out["elbow_height", side] = _within(chest, joint("elbow") - joint("shoulder"))[:, 1]
        out["hand_head", side] = _distance(joint("palm"), at["head"])
        out["hand_hip", side] = _distance(
            joint("palm"), joint("hip") + chest[:, :, 1] * 0.08 + chest[:, :, 0] * 0.06 * sign
        )
        out["hand_knee", side] = np.minimum(
            _distance(joint("palm"), joint("knee")), _distance(joint("palm"), at[f"{other}_knee"])
        )
        out["hand_foot", side] = np.minimum(
            _distance(joint("palm"), joint("ankle")), _distance(joint("palm"), at[f"{other}_ankle"])
        )
        out["hand_ground", side] = joint("palm")[:, 1] - ground
        out["forearm", side] = _to_vertical(joint("wrist") - joint("elbow"))
        out["shin", side] = _to_vertical(joint("ankle") - joint("knee"))
        thigh = _within(pelvis, joint("knee") - joint("hip"))
        out["thigh", side] = np.rad2deg(np.arctan2(thigh[:, 2], -thigh[:, 1]))
        length = np.linalg.norm(thigh, axis=-1)
        out["thigh_side", side] = np.rad2deg(np.arcsin(np.clip(sign * thigh[:, 0] / length, -1, 1)))
        out["knee_ground", side] = joint("knee")[:, 1] - skeleton.FLESH[INDEX["left_knee"]] - ground
        out["foot_lift", side] = np.minimum(joint("foot")[:, 1] - 0.02, joint("ankle")[:, 1] - 0.07) - ground
    out["hand_hand", ""] = _distance(at["left_palm"], at["right_palm"])
    out["feet_apart", ""] = _distance(at["left_ankle"], at["right_ankle"])
    spine = at["neck"] - at["pelvis"]
    out["trunk_lean", ""] = np.rad2deg(np.arctan2(spine[:, 2], spine[:, 1]))
    curve = _within(pelvis, at["neck"] - at["spine1"])
    out["trunk_side", ""] = np.rad2deg(np.arctan2(curve[:, 0], np.hypot(curve[:, 1], curve[:, 2])))
    across = _within(pelvis, at["left_shoulder"] - at["right_shoulder"])
    out["trunk_turn", ""] = np.rad2deg(np.arctan2(-across[:, 2], across[:, 0]))
    out["back_curve", ""] = np.rad2deg(np.arctan2(curve[:, 2], curve[:, 1]))
    gaze = _within(world[:, INDEX["spine3"]], world[:, INDEX["head"], :, 2])
    out["head_turn", ""] = np.rad2deg(np.arctan2(gaze[:, 0], gaze[:, 2]))
    out["head_nod", ""] = -np.rad2deg(np.arcsin(np.clip(gaze[:, 1], -1, 1)))
    # No codes: only the postures need these.
    out["_hip_height", ""] = at["pelvis"][:, 1] - ground
    out["_tilt", ""] = np.rad2deg(np.arccos(np.clip(spine[:, 1] / np.linalg.norm(spine, axis=-1), -1, 1)))
    out["_belly", ""] = chest[:, 1, 2]
    out["_left_up", ""] = chest[:, 1, 0]
    out["_knees", ""] = ((at["left_knee"] + at["right_knee"]) / 2 - at["pelvis"])[:, 1]
    feet = (at["left_ankle"] + at["right_ankle"]) / 2 - at["pelvis"]
    out["_feet_front", ""] = feet[:, 2]
    out["_stride", ""] = np.abs(at["left_ankle"][:, 2] - at["right_ankle"][:, 2])
    out["_reach", ""] = np.linalg.norm(shoulders - at["pelvis"], axis=-1)
    return out


def encode(rotations: np.ndarray, rng: np.random.Generator | None = None) -> Codes:
    """Codes of poses (N, 24, 3, 3) in the body frame with yaw removed. With a generator the values get noise before they are sorted."""
    values = code_values(rotations)
    posture, lead = _postures(values)
    columns = []
    for kind, side in CODES:
        value = values[kind, side]
        if rng is not None:
            value = value + KINDS[kind].noise * rng.uniform(-1, 1, len(value))
        columns.append(KINDS[kind].sort(value))
    categories = np.stack(columns, 1)
    shapes = np.stack([_shapes(categories, side) for side in ("left", "right")], 1)
    # The hands of a body that lies carry nothing, even where they touch the floor.
    lying = np.isin(posture, ("supine", "prone", "side"))
    shapes[lying] = np.stack([_shapes(categories[lying], side, skip=("prop",)) for side in ("left", "right")], 1)
    return Codes(categories, posture, lead, shapes)


def _shapes(categories: np.ndarray, side: str, skip: Sequence[str] = ()) -> np.ndarray:
    out = np.full(len(categories), "", dtype="<U8")
    for name, conditions in reversed(ARM_SHAPES.items()):
        if name in skip:
            continue
        holds = np.ones(len(categories), bool)
        for kind, allowed in conditions.items():
            accepted = [i for i, c in enumerate(KINDS[kind].categories) if c in allowed]
            holds &= np.isin(categories[:, CODES.index((kind, side))], accepted)
        out[holds] = name
    return out


def _postures(v: dict[tuple[str, str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The posture (super-code) and its leading side, by rules in order of precedence."""
    knees = np.stack([v["knee", s] for s in ("left", "right")], 1)
    thighs = np.stack([v["thigh", s] for s in ("left", "right")], 1)
    knee_height = np.stack([v["knee_ground", s] for s in ("left", "right")], 1)
    on_knees = (knee_height < 0.18).all(1) & (v["_feet_front", ""] < 0.1)
    lifted = np.stack([v["foot_lift", s] > 0.10 for s in ("left", "right")], 1)
    height, tilt, belly, stride = v["_hip_height", ""], v["_tilt", ""], v["_belly", ""], v["_stride", ""]
    front = np.argmax(thighs, 1)
    rows, rear = np.arange(len(knees)), 1 - front
    low = height < 0.30
    lead_knee = knees[rows, front]
    up = np.where(lifted.any(1), np.argmax(np.where(lifted, thighs, -999), 1), front)
    kneeling = (knee_height < 0.20).any(1) & ~low & (height < 0.72)
    rules = (
        ("side", (tilt > 55) & (np.abs(v["_left_up", ""]) > 0.6)),
        ("supine", (tilt > 65) & low & (belly > 0)),
        ("prone", (tilt > 65) & low),
        ("floor_sit", low & ~on_knees),
        ("crawl", on_knees & (tilt > 45) & (height > 0.3)),
        ("kneel", on_knees),
        ("half_kneel", kneeling),
        ("bend", (v["trunk_lean", ""] > 45) & (knees.min(1) > 120)),
        ("squat", (knees.max(1) < 105) & (v["_feet_front", ""] < 0.27) & (height < 0.65) & (thighs.min(1) > 50)),
        ("sit", (knees.max(1) < 140) & (thighs.min(1) > 50)),
        ("run", (thighs[rows, front] > 30) & (lead_knee < 140) & (thighs[rows, rear] < 5) & lifted[rows, rear]),
        ("lunge", (stride > 0.55) & (lead_knee < 140) & (thighs[rows, front] > 40) & ~lifted[rows, front]),
        ("kick", lifted[rows, up] & (knees[rows, up] > 140) & (thighs[rows, up] > 40)),
        ("one_leg", lifted[rows, up] & (knees[rows, up] < 140) & (thighs[rows, up] > 25)),
        ("step", (stride > 0.25)),
    )  # fmt: skip
    posture = np.full(len(knees), "stand", dtype="<U10")
    for name, holds in reversed(rules):
        posture[holds] = name
    side = np.where(np.isin(posture, ("kick", "one_leg")), up, front)
    lying = posture == "side"
    side = np.where(lying, np.where(v["_left_up", ""] > 0, 1, 0), side)
    return posture, np.where(side == 0, "left", "right")


def _frame(left: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Axes (N, 3, 3) in columns: x to the left, y up made orthogonal to it, z forward."""
    x = left / np.linalg.norm(left, axis=-1, keepdims=True)
    y = up - (up * x).sum(-1, keepdims=True) * x
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    return np.stack([x, y, np.cross(x, y)], -1)


def _within(frame: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return (np.swapaxes(frame, -1, -2) @ vector[..., None])[..., 0]


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a - b, axis=-1)


def _to_vertical(segment: np.ndarray) -> np.ndarray:
    return np.rad2deg(np.arccos(np.clip(np.abs(segment[:, 1]) / np.linalg.norm(segment, axis=-1), 0, 1)))


def _angle(a: np.ndarray, middle: np.ndarray, b: np.ndarray) -> np.ndarray:
    u, w = a - middle, b - middle
    cosine = (u * w).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(w, axis=-1)
    return np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))

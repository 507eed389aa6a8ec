"""Random human poses: 15 postures, with 8 places for each arm.

A pose is 30 anatomical angles in degrees. A family gives each angle a mean and a standard deviation. Angles are clipped to the limits of human
joints. The legs are correlated. Left and right are exchanged at random. A pose is drawn again if limbs intersect or the body would fall over.
To add a posture or a place for an arm, add a row to ``POSTURES`` or ``ARMS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from chatpose_jax.data.synthetic import skeleton
from chatpose_jax.data.synthetic.skeleton import INDEX, rotation
from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line

TRUNK = {  # name: limits in degrees; positive = forwards, to the body's left
    "pitch": (-100, 100),
    "roll": (-95, 95),
    "trunk_flexion": (-30, 75),
    "trunk_bend": (-30, 30),
    "trunk_turn": (-40, 40),
    "head_flexion": (-45, 45),
    "head_bend": (-35, 35),
    "head_turn": (-70, 70),
}
LIMB = {
    "hip_flexion": (-25, 120),
    "hip_abduction": (-25, 50),
    "hip_rotation": (-35, 45),
    "knee": (0, 140),
    "ankle": (-45, 22),
    "elevation": (0, 175),
    "plane": (-40, 130),
    "twist": (-60, 60),
    "elbow": (0, 145),
    "pronation": (-60, 60),
    "wrist": (-60, 60),
}
COLUMNS = (*TRUNK, *(f"left_{name}" for name in LIMB), *(f"right_{name}" for name in LIMB))
COLUMN = {name: i for i, name in enumerate(COLUMNS)}
LIMITS = np.array([*TRUNK.values(), *LIMB.values(), *LIMB.values()], float)
LIMITS.flags.writeable = False
_SWAP = np.array(
    [COLUMN[c.replace("left_", "right_") if c.startswith("left_") else c.replace("right_", "left_")] for c in COLUMNS]
)
_SIGN = np.where([c in ("roll", "trunk_bend", "trunk_turn", "head_bend", "head_turn") for c in COLUMNS], -1.0, 1.0)

Spread = tuple[float, float]  # mean, standard deviation (degrees)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A place for an arm, in degrees.

    elevation: 0 hangs, 180 is straight up. plane: 0 is to the side, 90 to the front. twist: positive turns the forearm inwards.
    """

    elevation: Spread
    plane: Spread
    twist: Spread
    elbow: Spread


ARMS = {
    "down": Arm((11, 4), (15, 15), (5, 12), (14, 7)),
    "hip": Arm((50, 4), (-28, 6), (56, 3), (91, 6)),
    "forward": Arm((84, 8), (82, 7), (0, 10), (12, 7)),
    "side": Arm((86, 8), (6, 8), (0, 10), (10, 7)),
    "up": Arm((160, 8), (25, 12), (0, 12), (14, 8)),
    "chest": Arm((34, 6), (45, 8), (42, 6), (105, 8)),
    "head": Arm((108, 7), (28, 8), (-48, 7), (130, 6)),
    "wave": Arm((82, 8), (8, 8), (-54, 5), (82, 9)),
    # Only for postures in which the hands carry the body, so not in FREE_ARMS.
    "prop": Arm((80, 5), (82, 5), (0, 8), (9, 5)),
}
FREE_ARMS = tuple(name for name in ARMS if name != "prop")


@dataclasses.dataclass(frozen=True)
class Leg:
    flexion: Spread
    knee: Spread
    abduction: Spread = (4, 3)
    rotation: Spread = (6, 6)


@dataclasses.dataclass(frozen=True)
class Posture:
    """A posture, in degrees.

    lead, other: the two legs; which of them is the left one is random.
    shin: forward lean of the other leg's shin. The pitch of the pelvis follows from it, so that the foot stands on the ground.
    pitch: of the pelvis, where no foot carries the body.
    on_floor: the legs lie on the ground, so hip flexion follows from the knee.
    ankle: None for a flat foot.
    support: what carries the body: "ground", "seat" (the pelvis too), or "moving", for which balance is not tested.
    """

    lead: Leg
    other: Leg
    shin: Spread = (3, 2)
    pitch: Spread | None = None
    roll: float = 0.0
    trunk: Spread = (4, 5)
    on_floor: bool = False
    ankle: Spread | None = None
    support: str = "ground"
    arms: Sequence[str] = FREE_ARMS
    head: Spread = (4, 6)


_STRAIGHT = Leg((3, 3), (6, 4), (5, 4))
_SQUAT = Leg((106, 7), (112, 9), (16, 6), (16, 7))
_KNEEL = Leg((6, 6), (94, 6), (8, 4))
_SIT = Leg((86, 5), (86, 10), (8, 5))
_FLOOR = Leg((80, 4), (30, 28), (10, 6))
_BEND = Leg((62, 8), (9, 5), (6, 4))
_CRAWL = Leg((84, 6), (94, 5))
_LIE = Leg((5, 5), (34, 32), (8, 5))
POSTURES = {
    "stand": Posture(_STRAIGHT, _STRAIGHT),
    "step": Posture(Leg((24, 4), (8, 5)), Leg((-14, 4), (10, 5)), shin=(20, 3)),
    "run": Posture(
        Leg((60, 7), (80, 9)), Leg((-14, 5), (50, 12)), pitch=(12, 4), trunk=(6, 4), ankle=(-8, 8), support="moving"
    ),
    "kick": Posture(Leg((72, 9), (12, 7)), Leg((2, 3), (8, 4)), shin=(2, 2), trunk=(2, 5), support="moving"),
    "squat": Posture(_SQUAT, _SQUAT, shin=(25, 3), trunk=(18, 6)),
    "lunge": Posture(Leg((64, 7), (70, 7)), Leg((-16, 4), (34, 7)), pitch=(4, 3), ankle=(4, 8)),
    "kneel": Posture(_KNEEL, _KNEEL, shin=(90, 3), ankle=(-38, 5)),
    "half_kneel": Posture(Leg((88, 5), (90, 6)), Leg((2, 5), (92, 5)), shin=(90, 3), ankle=(-4, 4)),
    "sit": Posture(_SIT, _SIT, pitch=(-2, 4), support="seat"),
    "floor_sit": Posture(
        _FLOOR, _FLOOR, pitch=(-14, 5), trunk=(14, 6), on_floor=True, ankle=(-12, 10), support="seat"
    ),
    "bend": Posture(
        _BEND, _BEND, shin=(-6, 2), trunk=(34, 8), head=(-2, 10), arms=("down", "hip", "forward", "side", "prop")
    ),
    "crawl": Posture(
        _CRAWL, _CRAWL, shin=(88, 2), trunk=(0, 5), ankle=(-38, 5), head=(-15, 8), arms=("prop",)
    ),
    "supine": Posture(
        _LIE, _LIE, pitch=(-88, 2), trunk=(2, 3), on_floor=True, ankle=(-20, 8),
        arms=("down", "side", "up", "chest", "head", "forward"),
    ),
    "side": Posture(
        Leg((48, 12), (62, 14), (2, 3)), Leg((24, 12), (34, 14), (2, 3)), pitch=(0, 3), roll=-88, trunk=(8, 5),
        ankle=(-15, 8), arms=("forward", "chest", "up", "down"),
    ),
    "one_leg": Posture(Leg((66, 12), (88, 14), (6, 6)), Leg((2, 3), (8, 4), (2, 2)), shin=(2, 2), trunk=(3, 4)),
}  # fmt: skip

_SAME_ARMS = 0.4  # the share of poses with both arms in one family
_TRIES = 64


@dataclasses.dataclass(frozen=True)
class PoseSet:
    """N poses in the body frame: x to the body's left, y up, facing +z.

    rotations: (N, 24, 3, 3) float32, joint 0 the global orientation. joints: (N, 24, 3) metres, pelvis at the origin.
    angles: (N, 30) degrees, columns ``COLUMNS``. family: (N,) names of ``POSTURES``. arms: (N, 2) names of ``ARMS``,
    left and right.
    """

    rotations: np.ndarray
    joints: np.ndarray
    angles: np.ndarray
    family: np.ndarray
    arms: np.ndarray

    __repr__ = one_line

    def __len__(self) -> int:
        return len(self.rotations)

    def __getitem__(self, rows: slice | np.ndarray) -> PoseSet:
        """A subset of the poses (a slice or an index array)."""
        return PoseSet(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def sample_poses(
    n: int, seed: int | Sequence[int], family: str | None = None, arms: tuple[str | None, str | None] = (None, None)
) -> PoseSet:
    """Draws ``n`` plausible poses. The same arguments give the same poses.

    family: a name of ``POSTURES``; None draws one. arms: names of ``ARMS`` for the left and the right arm; None draws one.

    Raises UserError for an unknown name, and for a combination that gives no plausible pose.
    """
    for name, table in ((family, POSTURES), (arms[0], ARMS), (arms[1], ARMS)):
        if name is not None and name not in table:
            raise UserError(f"Unknown pose family {name!r}: choose one of {', '.join(table)}.")
    rng = np.random.default_rng(seed)
    parts: list[PoseSet] = []
    missing = n
    for _ in range(_TRIES):
        if missing <= 0:
            break
        drawn = _draw(int(missing * 1.6) + 8, rng, family, arms)
        drawn = drawn[plausible(drawn)][:missing]
        parts.append(drawn)
        missing -= len(drawn)
    if missing > 0:
        raise UserError(f"No plausible pose of family {family!r} with arms {arms}: choose other arms.")
    return PoseSet(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(PoseSet)))


def from_angles(angles: np.ndarray, family: np.ndarray, arms: np.ndarray) -> PoseSet:
    """Poses of anatomical angles (N, 30), clipped to the joints' limits."""
    angles = np.clip(angles, LIMITS[:, 0], LIMITS[:, 1])
    rotations = _rotations(angles)
    joints, _ = skeleton.forward_kinematics(rotations)
    return PoseSet(rotations.astype(np.float32), joints.astype(np.float32), angles, family, arms)


def draw_arm(name: str, rng: np.random.Generator) -> np.ndarray:
    """Angles (6,) of one arm of a family: elevation, plane, twist, elbow, pronation, wrist."""
    return _draw_arms(np.array([name]), rng)[0]


def _draw(n: int, rng: np.random.Generator, family: str | None, arms: tuple[str | None, str | None]) -> PoseSet:
    families = np.full(n, family) if family else rng.choice(list(POSTURES), n)
    left, right = (np.empty(n, object) for _ in range(2))
    same = rng.random(n) < _SAME_ARMS
    pick = rng.random((n, 2))
    angles = np.zeros((n, len(COLUMNS)))
    for name in np.unique(families):
        rows = np.flatnonzero(families == name)
        posture = POSTURES[str(name)]
        allowed = np.array(posture.arms, object)
        left[rows] = allowed[(pick[rows, 0] * len(allowed)).astype(int)]
        right[rows] = np.where(same[rows], left[rows], allowed[(pick[rows, 1] * len(allowed)).astype(int)])
        angles[rows] = _draw_posture(posture, len(rows), rng)
    flip = rng.random(n) < 0.5
    angles[flip] = angles[flip][:, _SWAP] * _SIGN
    left, right = (np.full(n, fixed) if fixed else drawn for fixed, drawn in zip(arms, (left, right)))
    if family and (arms[0] or arms[1]):  # of a fixed arm the other one need not be the same
        left, right = left.astype(object), right.astype(object)
    for side, names in (("left", left), ("right", right)):
        start = COLUMN[f"{side}_elevation"]
        angles[:, start : start + 6] = _draw_arms(names, rng)
    return from_angles(angles, families.astype(str), np.stack([left, right], 1).astype(str))


def _draw_posture(posture: Posture, n: int, rng: np.random.Generator) -> np.ndarray:
    """Angles (n, 30) of everything but the arms, lead leg on the left."""
    out = np.zeros((n, len(COLUMNS)))

    def normal(spread: Spread) -> np.ndarray:
        return spread[0] + spread[1] * rng.standard_normal(n).clip(-2, 2)

    out[:, COLUMN["trunk_flexion"]] = normal(posture.trunk)
    out[:, COLUMN["trunk_bend"]] = normal((0, 4))
    out[:, COLUMN["trunk_turn"]] = normal((0, 6))
    out[:, COLUMN["head_flexion"]] = normal(posture.head)
    out[:, COLUMN["head_bend"]] = normal((0, 4))
    out[:, COLUMN["head_turn"]] = normal((0, 14))
    shared = rng.standard_normal((n, 4))
    legs = {}
    for side, leg in (("left", posture.lead), ("right", posture.other)):
        noise = (0.6 * shared + 0.8 * rng.standard_normal((n, 4))).clip(-2, 2)
        spreads = (leg.flexion, leg.abduction, leg.rotation, leg.knee)
        legs[side] = np.stack([mean + sd * noise[:, i] for i, (mean, sd) in enumerate(spreads)], 1)
        legs[side][:, 3] = np.abs(legs[side][:, 3])
    pitch = (
        legs["right"][:, 0] - legs["right"][:, 3] + normal(posture.shin)
        if posture.pitch is None
        else normal(posture.pitch)
    )
    out[:, COLUMN["pitch"]] = pitch
    out[:, COLUMN["roll"]] = posture.roll
    for side, angles in legs.items():
        if (
            posture.on_floor
        ):  # thigh and shin have about the same length, so the thigh rises by half the angle of the knee
            angles[:, 0] = 90 + pitch + angles[:, 3] / 2
        shin = pitch - angles[:, 0] + angles[:, 3]
        start = COLUMN[f"{side}_hip_flexion"]
        out[:, start : start + 4] = angles
        out[:, start + 4] = shin if posture.ankle is None else normal(posture.ankle)
    return out


def _draw_arms(names: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Angles (n, 6) of arms: elevation, plane, twist, elbow, pronation, wrist."""
    table = [
        (arm.elevation, arm.plane, arm.twist, arm.elbow, (0.0, 12.0), (0.0, 8.0))
        for arm in (ARMS[str(a)] for a in names)
    ]
    spread = np.array(table).reshape(-1, 6, 2)
    return spread[..., 0] + spread[..., 1] * rng.standard_normal(spread.shape[:2]).clip(-2, 2)


def _rotations(angles: np.ndarray) -> np.ndarray:
    """Anatomical angles (N, 30) to rotations (N, 24, 3, 3) relative to the T-pose (x left, y up, z forward)."""
    out = np.tile(np.eye(3), (len(angles), 24, 1, 1))

    def column(name: str) -> np.ndarray:
        return angles[:, COLUMN[name]]

    out[:, 0] = rotation("x", column("pitch")) @ rotation("z", column("roll"))
    for part, names, shares in (
        ("trunk", ("spine1", "spine2", "spine3"), (0.4, 0.35, 0.25)),
        ("head", ("neck", "head"), (0.45, 0.55)),
    ):
        for name, share in zip(names, shares):
            turn = rotation("z", -share * column(f"{part}_bend")) @ rotation("y", share * column(f"{part}_turn"))
            out[:, INDEX[name]] = rotation("x", share * column(f"{part}_flexion")) @ turn
    for side, sign in (("left", 1.0), ("right", -1.0)):  # the right side is the mirror image: y and z change sign
        hip, knee, ankle, elevation, plane, twist, elbow, pronation, wrist = (
            column(f"{side}_{name}")
            for name in ("hip_flexion", "knee", "ankle", "elevation", "plane", "twist", "elbow", "pronation", "wrist")
        )
        spread = rotation("z", sign * column(f"{side}_hip_abduction")) @ rotation(
            "y", sign * column(f"{side}_hip_rotation")
        )
        out[:, INDEX[f"{side}_hip"]] = rotation("x", -hip) @ spread
        out[:, INDEX[f"{side}_knee"]] = rotation("x", knee)
        out[:, INDEX[f"{side}_ankle"]] = rotation("x", -ankle)
        # The arm hangs first and then rises in its plane. Started from the T-pose, its twist would be undefined.
        raised = rotation("y", -sign * plane) @ rotation("z", sign * elevation) @ rotation("y", sign * plane)
        swing = raised @ rotation("z", np.full(len(angles), -90.0 * sign))
        collar = skeleton.rotation_power(swing, 0.25)
        out[:, INDEX[f"{side}_collar"]] = collar
        out[:, INDEX[f"{side}_shoulder"]] = np.swapaxes(collar, -1, -2) @ swing @ rotation("x", twist)
        half = rotation("x", pronation / 2)
        out[:, INDEX[f"{side}_elbow"]] = rotation("y", -sign * elbow) @ half
        out[:, INDEX[f"{side}_wrist"]] = half @ rotation("z", -sign * wrist)
    return out


# Limbs as capsules for the self-intersection test: (from, to, radius in metres).
_CAPSULES = {
    "torso": ("pelvis", "spine3", 0.11),
    "chest": ("spine3", "neck", 0.10),
    "head": ("neck", "head", 0.085),
    "left_upper_arm": ("left_shoulder", "left_elbow", 0.04),
    "right_upper_arm": ("right_shoulder", "right_elbow", 0.04),
    "left_forearm": ("left_elbow", "left_hand", 0.03),
    "right_forearm": ("right_elbow", "right_hand", 0.03),
    "left_thigh": ("left_hip", "left_knee", 0.06),
    "right_thigh": ("right_hip", "right_knee", 0.06),
    "left_shin": ("left_knee", "left_ankle", 0.045),
    "right_shin": ("right_knee", "right_ankle", 0.045),
    "left_sole": ("left_ankle", "left_foot", 0.035),
    "right_sole": ("right_ankle", "right_foot", 0.035),
}
_TOUCHING = {"torso", "chest"}


def _capsule_pairs() -> np.ndarray:
    names = list(_CAPSULES)
    rows = []
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            joints_a, joints_b = set(_CAPSULES[a][:2]), set(_CAPSULES[b][:2])
            neighbours = bool(joints_a & joints_b) or {a, b} <= _TOUCHING | {"head"}
            shoulder = a.endswith("upper_arm") and b in _TOUCHING | {"head"}
            hip = a.endswith("thigh") and (b in _TOUCHING or b.endswith("thigh"))
            if not (neighbours or shoulder or hip):
                rows.append((i, j))
    return np.array(rows)


_PAIRS = _capsule_pairs()
_ENDS = np.array([[INDEX[a], INDEX[b]] for a, b, _ in _CAPSULES.values()])
_RADII = np.array([r for *_, r in _CAPSULES.values()])
# Shares of body mass at the joints, rounded from the usual anthropometric tables.
_SHARES = {
    "pelvis": 0.14, "spine2": 0.14, "spine3": 0.16, "head": 0.08, "hip": 0.06, "knee": 0.08, "ankle": 0.03,
    "foot": 0.01, "shoulder": 0.02, "elbow": 0.025, "wrist": 0.015,
}  # fmt: skip
_MASS = np.array([_SHARES.get(name.removeprefix("left_").removeprefix("right_"), 0.0) for name in skeleton.NAMES])
_MASS /= _MASS.sum()
_CONTACT = 0.10  # metres above the lowest skin that count as touching the ground
_MARGIN = 0.10  # metres that a foot or a hip reaches beyond its joint


def plausible(poses: PoseSet) -> np.ndarray:
    """(N,) bool: no limbs of the pose intersect, and its centre of mass lies above what carries it."""
    joints = poses.joints
    support = np.array([POSTURES[f].support for f in poses.family])
    return ~_intersects(joints) & ((support == "moving") | _balanced(joints, support == "seat"))


def _intersects(joints: np.ndarray) -> np.ndarray:
    along = np.linspace(0, 1, 6)[:, None]
    a, b = joints[:, _ENDS[:, 0]], joints[:, _ENDS[:, 1]]
    points = a[:, :, None] * (1 - along) + b[:, :, None] * along
    first, second = points[:, _PAIRS[:, 0]], points[:, _PAIRS[:, 1]]
    squared = (
        (first**2).sum(-1)[..., None] + (second**2).sum(-1)[..., None, :] - 2 * first @ np.swapaxes(second, -1, -2)
    )
    gap = np.sqrt(squared.min((-1, -2)).clip(0)) - _RADII[_PAIRS].sum(1)
    return (gap < 0).any(1)


def _balanced(joints: np.ndarray, seated: np.ndarray) -> np.ndarray:
    bottom = joints[..., 1] - skeleton.FLESH
    carries = bottom - bottom.min(1, keepdims=True) < _CONTACT
    carries[seated, INDEX["pelvis"]] = True
    flat = joints[..., [0, 2]]
    weight = carries / carries.sum(1, keepdims=True)
    centre = (flat * weight[..., None]).sum(1)
    reach = np.where(carries, np.linalg.norm(flat - centre[:, None], axis=-1), 0).max(1)
    mass = (flat * _MASS[:, None]).sum(1)
    return np.linalg.norm(mass - centre, axis=-1) < reach + _MARGIN

"""The default body's skinning weights, joint regressor, shape directions and pose correctives.

All functions take vertices in the floor frame of `skeleton` (floor at y = 0, x = body's left, y up, z forward, metres)
and return exactly symmetric results. `twin` (V,) is the index of each vertex's mirror image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smpl_jax.default_body.mesh import neighbours
from smpl_jax.default_body.skeleton import JOINT_NAMES, MIRROR_JOINTS, PARENTS
from smpl_jax.pose import JOINTS

Array = NDArray[np.float64]

_ID = {name: k for k, name in enumerate(JOINT_NAMES)}
_FLIP = np.array([-1.0, 1.0, 1.0])
_COUNT = JOINTS["smpl"]


def _ramp(t: Array, reach: float) -> Array:
    """0 below -reach, 1 above +reach, twice differentiable between."""
    s = (t / reach * 0.5 + 0.5).clip(0, 1)
    return s * s * s * (s * (6 * s - 15) + 10)


# skinning ------------------------------------------------------------------------------------------------------------


def skinning_weights(vertices: Array, faces: NDArray[np.int64], twin: NDArray[np.int64]) -> Array:
    """(V, 24) weights, multiples of 1/65535, at most four a vertex, summing to 1.

    Each joint's weight fades across planes that follow the creases of a body. Then the weights are smoothed over the mesh.
    """
    limbs = _left_limbs(vertices) + _left_limbs(vertices * _FLIP)[:, MIRROR_JOINTS]
    w = limbs + _trunk(vertices) * (1 - limbs.sum(1, keepdims=True))
    average = neighbours(faces, len(vertices))
    for _ in range(6):
        w = 0.5 * w + 0.5 * (average @ w)
    w = (w + w[twin][:, MIRROR_JOINTS]) / 2
    # Four weights stay: those above the fifth largest. Where left and right tie, on the midline, both stay or both go.
    fifth = np.sort(w, 1)[:, -5:-4]
    w = np.where((w > fifth + 1e-12) & (w > 0.004), w, 0)
    w /= w.sum(1, keepdims=True)
    whole = np.rint(w * 65535).astype(np.int64)
    whole[np.arange(len(w)), whole.argmax(1)] += 65535 - whole.sum(1)
    return whole / 65535


def _left_limbs(p: Array) -> Array:
    x, y, z = p.T
    leg = _ramp(x, 0.02) * _ramp(0.835 + 0.62 * x.clip(0, 0.2) - 0.20 * (-z).clip(0, 0.2) - y, 0.065)
    knee = _ramp(0.492 - y, 0.055)
    ankle = _ramp(0.086 + 0.30 * (z + 0.02).clip(0, 0.1) - y, 0.032)
    toes = _ramp(z - 0.112, 0.026)
    # Beside the chest only what is level with the shoulder follows the arm; further out everything does.
    outside = _ramp(x - 0.215, 0.02)
    arm = _ramp(x - 0.174, 0.062) * np.maximum(_ramp(y - 1.315, 0.055), outside)
    shoulder_girdle = np.maximum(_ramp(x - 0.088, 0.062) * _ramp(y - 1.315, 0.075), arm)
    elbow = _ramp(x - 0.440, 0.05)
    wrist = _ramp(x - 0.690, 0.030)
    # The thumb leaves the hand before the knuckles and stays with the wrist.
    fingers = _ramp(x - 0.776, 0.016) * (1 - _ramp(z - 0.045, 0.006))
    w = np.zeros((len(p), _COUNT))
    for name, value in {
        "left_hip": leg * (1 - knee),
        "left_knee": leg * knee * (1 - ankle),
        "left_ankle": leg * knee * ankle * (1 - toes),
        "left_foot": leg * knee * ankle * toes,
        "left_collar": shoulder_girdle - arm,
        "left_shoulder": arm * (1 - elbow),
        "left_elbow": arm * elbow * (1 - wrist),
        "left_wrist": arm * wrist * (1 - fingers),
        "left_hand": arm * wrist * fingers,
    }.items():
        w[:, _ID[name]] = value
    return w


def _trunk(p: Array) -> Array:
    """The chain from pelvis to head, as if there were no limbs; rows sum to 1."""
    _, y, z = p.T
    steps = {
        "spine1": _ramp(y - 1.045, 0.055),
        "spine2": _ramp(y - 1.160, 0.055),
        "spine3": _ramp(y - 1.240, 0.050),
        "neck": _ramp(y - 1.462 + 0.35 * (z + 0.02), 0.035),
        # The chin belongs to the head, the nape as high as the ears to the neck.
        "head": _ramp(y - 1.532 + 0.70 * (z - 0.004), 0.034),
    }
    w = np.zeros((len(p), _COUNT))
    reached, last = np.ones(len(p)), "pelvis"
    for name, step in steps.items():
        w[:, _ID[last]] = reached * (1 - step)
        reached, last = reached * step, name
    w[:, _ID[last]] = reached
    return w


# joints --------------------------------------------------------------------------------------------------------------


def joint_regressor(vertices: Array, weights: Array, joints: Array, twin: NDArray[np.int64]) -> Array:
    """(24, V) non-negative weights, rows summing to 1, that give each joint's position from the vertices around it.

    Non-negative least squares over the vertices that the joint shares with its parent, slightly regularised towards
    equal weights, so that many vertices contribute.
    """
    from scipy.optimize import nnls

    regressor = np.zeros((_COUNT, len(vertices)))
    for j in range(_COUNT):
        if MIRROR_JOINTS[j] < j:
            regressor[j] = regressor[MIRROR_JOINTS[j]][twin]
            continue
        parent = PARENTS[j] if j else _ID["spine1"]
        shared = np.minimum(weights[:, j], weights[:, parent])
        distance = np.linalg.norm(vertices - joints[j], axis=1)
        (near,) = np.nonzero(
            shared > 0.12 if j else (weights[:, 0] > 0.5) & (np.abs(vertices[:, 1] - joints[0, 1]) < 0.06)
        )
        near = near[np.argsort(distance[near], kind="stable")][:160]
        pull = 2e-3
        rows = np.concatenate(
            [vertices[near].T - joints[j][:, None], np.ones((1, len(near))), pull * np.eye(len(near))]
        )
        solution, _ = nnls(rows, np.concatenate([[0, 0, 0, 1], np.full(len(near), pull / len(near))]))
        regressor[j, near] = solution / solution.sum()
        if MIRROR_JOINTS[j] == j:
            regressor[j] = (regressor[j] + regressor[j][twin]) / 2
    return regressor


# shape ---------------------------------------------------------------------------------------------------------------

SHAPE_NAMES = (
    "stature",
    "girth",
    "shoulders_over_hips",
    "leg_length",
    "arm_length",
    "belly",
    "chest",
    "hips",
    "muscle",
    "head_size",
)


def shape_directions(vertices: Array, faces: NDArray[np.int64], weights: Array, joints: Array) -> Array:
    """(V, 3, 10) metres per unit, in the order of `SHAPE_NAMES`. They are smooth symmetric functions of the position."""
    x, y, z = vertices.T
    side = np.sign(x)
    off_axis = vertices - _nearest_on_bones(vertices, weights, joints)
    average = neighbours(faces, len(vertices))
    for _ in range(12):  # the nearest bone changes abruptly where limbs meet the trunk
        off_axis = average @ off_axis
    limbs = {n: weights[:, [_ID[f"left_{n}"], _ID[f"right_{n}"]]].sum(1) for n in ("wrist", "hand", "ankle", "foot")}
    soft = 1 - sum(limbs.values()) - 0.7 * weights[:, _ID["head"]]

    def bump(center: tuple[float, float, float], size: tuple[float, float, float]) -> Array:
        d = (np.stack([np.abs(x), y, z], 1) - center) / size
        return np.exp(-0.5 * (d * d).sum(1))

    def along(component: int, amount: Array) -> Array:
        out = np.zeros_like(vertices)
        out[:, component] = amount
        return out

    level = 0.018 * (_ramp(y - 1.17, 0.22) - 0.5) * 2
    reach = np.minimum(np.abs(x) / 0.16, 1)
    muscle = (
        0.10 * bump((0.30, 1.398, -0.02), (0.07, 0.08, 0.08))
        + 0.10 * bump((0.53, 1.398, -0.02), (0.05, 0.08, 0.08))
        + 0.09 * bump((0.10, 0.72, 0.0), (0.10, 0.10, 0.12))
        + 0.10 * bump((0.10, 0.34, -0.02), (0.10, 0.07, 0.10))
        + 0.06 * bump((0.10, 1.33, 0.0), (0.10, 0.07, 0.12))
        - 0.06 * bump((0.0, 1.08, 0.0), (0.2, 0.06, 0.2))
    )
    stretched = (np.abs(x) - 0.18).clip(0) * _ramp(np.abs(x) - 0.19, 0.02)
    directions = [
        0.03 * (vertices - [0, 0.945, 0]),
        0.09 * off_axis * soft[:, None],
        along(0, side * reach * level * (0.35 + 0.65 * _ramp(y - 0.5, 0.4))),
        along(1, 0.05 * np.minimum(y - 0.90, 0) * _ramp(0.90 - y, 0.10)),
        along(0, side * 0.05 * stretched),
        0.022 * bump((0, 1.07, 0.10), (0.10, 0.085, 0.10))[:, None] * [0, -0.15, 1]
        + along(0, 0.010 * side * reach * bump((0.14, 1.06, 0.0), (0.08, 0.06, 0.12))),
        0.016 * bump((0.075, 1.285, 0.10), (0.050, 0.045, 0.06))[:, None] * [0, -0.25, 1],
        along(0, 0.016 * side * reach * bump((0.17, 0.92, -0.02), (0.09, 0.10, 0.12)))
        + along(2, -0.012 * bump((0.08, 0.90, -0.12), (0.08, 0.08, 0.06))),
        off_axis * muscle[:, None],
        0.04 * weights[:, _ID["head"]][:, None] * (vertices - joints[_ID["head"]]),
    ]
    return np.stack(directions, -1)


def _nearest_on_bones(vertices: Array, weights: Array, joints: Array) -> Array:
    """The nearest point on each bone, averaged over the bones by skinning weight, for each vertex."""
    ends = {
        "pelvis": "spine1", "spine1": "spine2", "spine2": "spine3", "spine3": "neck", "neck": "head",
        **{f"{s}_{a}": f"{s}_{b}" for s in ("left", "right") for a, b in (
            ("hip", "knee"), ("knee", "ankle"), ("ankle", "foot"), ("collar", "shoulder"), ("shoulder", "elbow"),
            ("elbow", "wrist"), ("wrist", "hand"))},
    }  # fmt: skip
    out = np.zeros_like(vertices)
    for name, j in _ID.items():
        a = joints[j]
        b = joints[_ID[ends[name]]] if name in ends else a
        t = ((vertices - a) @ (b - a) / max((b - a) @ (b - a), 1e-12)).clip(0, 1)
        out += weights[:, j : j + 1] * (a + t[:, None] * (b - a))
    return out


# pose correctives ----------------------------------------------------------------------------------------------------


_RIDGE = 2e-3


def pose_correctives(
    vertices: Array,
    faces: NDArray[np.int64],
    weights: Array,
    joints: Array,
    twin: NDArray[np.int64],
    samples: int = 160,
) -> Array:
    """(V, 3, 207) rest-frame offsets, linear in R - I of joints 1 to 23 (row-major), that correct the errors of linear blend skinning.

    One joint rotates at a time, over the human range of motion. The target rotates each vertex about the joint by a
    *fraction of the rotation* instead of blending matrices. This keeps its distance from the joint, so elbows do not
    collapse and wrists do not pinch. Ridge regression of the difference of the posed vertices gives the directions. The
    fit uses only that range, because a linear function of R - I fitted to all rotations bulges.
    """
    directions = np.zeros((len(vertices), 3, _COUNT - 1, 3, 3))
    descends = _descendants()
    for j in range(1, _COUNT):
        if MIRROR_JOINTS[j] < j:
            continue
        share = weights[:, descends[j]].sum(1)
        (active,) = np.nonzero((share > 1e-6) & (share < 1 - 1e-6))
        if not len(active):
            continue
        rotations = sample_rotations(JOINT_NAMES[j], samples)
        features = (rotations - np.eye(3)).reshape(len(rotations), 9)
        for part in np.array_split(active, max(1, len(active) // 400)):
            arms, s = vertices[part] - joints[j], share[part]
            blend = np.eye(3) + s[:, None, None] * (rotations[:, None] - np.eye(3))
            target = np.stack([np.einsum("vab,vb->va", _power(r, s), arms) for r in rotations])
            missing = target - np.einsum("kvab,vb->kva", blend, arms)
            # A vertex's 27 unknowns d solve  blend_k (features_k · d) = missing_k  over the samples k.
            rows = np.einsum("kvab,kf->vkabf", blend, features).reshape(len(part), -1, 27)
            gram = np.swapaxes(rows, 1, 2) @ rows + _RIDGE * len(rotations) * np.eye(27)
            found = np.linalg.solve(gram, np.swapaxes(rows, 1, 2) @ missing.swapaxes(0, 1).reshape(len(part), -1, 1))
            directions[part, :, j - 1] = found.reshape(-1, 3, 3, 3)
    average = neighbours(faces, len(vertices))
    flat = directions.reshape(len(vertices), -1)
    for _ in range(2):
        flat = 0.5 * flat + 0.5 * (average @ flat)
    directions = flat.reshape(directions.shape)
    # Mirror: offsets change sign in x, and so does each entry of R with exactly one index on x.
    sign = _FLIP[:, None] * _FLIP
    for j in range(1, _COUNT):
        k = int(MIRROR_JOINTS[j])
        image = directions[twin][:, :, k - 1] * _FLIP[:, None, None] * sign
        directions[:, :, j - 1] = (
            image if k < j else (directions[:, :, j - 1] + image) / 2 if k == j else directions[:, :, j - 1]
        )
    return directions.reshape(len(vertices), 3, -1)


def _descendants() -> list[list[int]]:
    below: list[list[int]] = [[j] for j in range(_COUNT)]
    for j in range(_COUNT - 1, 0, -1):
        below[PARENTS[j]] += below[j]
    return below


def _rotation(vector: Array) -> Array:
    """Rodrigues, (N, 3) to (N, 3, 3)."""
    angle = np.linalg.norm(vector, axis=-1)[:, None, None]
    x, y, z = (vector / np.maximum(angle[:, :, 0], 1e-12)).T
    o = np.zeros_like(x)
    k = np.stack([np.stack([o, -z, y], -1), np.stack([z, o, -x], -1), np.stack([-y, x, o], -1)], -2)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)


def _power(rotation: Array, s: Array) -> Array:
    """(N, 3, 3) the rotation by a fraction s (N,) of one rotation's angle."""
    angle = np.arccos(((np.trace(rotation) - 1) / 2).clip(-1, 1))
    axis = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    norm = np.linalg.norm(axis)
    return _rotation(s[:, None] * (axis * (angle / norm) if norm > 1e-9 else np.zeros(3)))


# Ranges of motion in degrees about the body's axes, (from, to) for x, y, z, of the left side and the midline.
_RANGES = {
    "hip": ((-125, 25), (-35, 35), (-15, 60)),
    "knee": ((0, 145), (-10, 10), (-6, 6)),
    "ankle": ((-25, 45), (-20, 20), (-20, 20)),
    "foot": ((-50, 30), (0, 0), (0, 0)),
    "spine1": ((-20, 45), (-25, 25), (-22, 22)),
    "spine2": ((-20, 40), (-25, 25), (-22, 22)),
    "spine3": ((-20, 35), (-20, 20), (-18, 18)),
    "neck": ((-35, 40), (-40, 40), (-30, 30)),
    "head": ((-30, 35), (-40, 40), (-25, 25)),
    "collar": ((-10, 10), (-28, 20), (-15, 35)),
    "shoulder": ((-60, 60), (-120, 30), (-85, 85)),
    "elbow": ((-50, 80), (-145, 5), (-8, 8)),
    "wrist": ((-35, 35), (-25, 25), (-70, 70)),
    "hand": ((-5, 5), (-10, 10), (-80, 20)),
}


def sample_rotations(joint: str, count: int) -> Array:
    """(count, 3, 3) rotations of a left or midline joint over its range: a deterministic, evenly spread set of Euler angles."""
    ranges = np.radians(np.array(_RANGES[joint.removeprefix("left_")], np.float64))
    golden = np.array([0.8191725133961645, 0.6710436067037893, 0.5497004779019703])  # R3 sequence of M. Roberts
    unit = (0.5 + np.arange(1, count + 1)[:, None] * golden) % 1
    angles = ranges[:, 0] + unit * (ranges[:, 1] - ranges[:, 0])
    # Three quarters of the samples rotate about one axis only, as bodies mostly do.
    angles[::4, [1, 2]] = 0
    angles[1::4, [0, 2]] = 0
    angles[2::4, [0, 1]] = 0
    about = [_rotation(np.eye(3)[k] * angles[:, k : k + 1]) for k in range(3)]
    return about[2] @ about[1] @ about[0]

"""Retargets a clip's motion to SMPL's skeleton: every limb points in the direction of the clip's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from smpl_jax import io
from smpl_jax.body import BodyModel
from smpl_jax.errors import PoseFileError
from smpl_jax.mocap.clip import Clip
from smpl_jax.pose import JOINTS, Pose

# SMPL's joint on the left (or in the middle) -> the skeleton's joint that rotates the same bone. {L} is the skeleton's word for left.
_LIMBS = ("hip", "knee", "ankle", "shoulder", "elbow", "wrist")
_SCHEMES: dict[str, tuple[tuple[str, str], dict[str, str]]] = {
    # Acclaim, with the names of CMU's database
    "acclaim": (("l", "r"), {
        "pelvis": "root", "hip": "{L}femur", "knee": "{L}tibia", "ankle": "{L}foot", "foot": "{L}toes",
        "collar": "{L}clavicle", "shoulder": "{L}humerus", "elbow": "{L}radius", "wrist": "{L}hand",
        "neck": "lowerneck", "head": "head",
    }),
    # MotionBuilder, Mixamo, FAIR's captures, cgspeed's BVH of CMU
    "motionbuilder": (("Left", "Right"), {
        "pelvis": "Hips", "hip": "{L}UpLeg", "knee": "{L}Leg", "ankle": "{L}Foot", "foot": "{L}ToeBase",
        "collar": "{L}Shoulder", "shoulder": "{L}Arm", "elbow": "{L}ForeArm", "wrist": "{L}Hand",
        "neck": "Neck", "head": "Head",
    }),
    # Poser, and many free BVH files
    "poser": (("Left", "Right"), {
        "pelvis": "Hips", "hip": "{L}Hip", "knee": "{L}Knee", "ankle": "{L}Ankle", "foot": "{L}Toe",
        "collar": "{L}Collar", "shoulder": "{L}Shoulder", "elbow": "{L}Elbow", "wrist": "{L}Wrist",
        "neck": "Neck", "head": "Head",
    }),
}  # fmt: skip
_SPINE = ("spine1", "spine2", "spine3")
_ELBOW = np.array([0.0, -0.966, 0.259])
"""Axis about which SMPL's elbows bend at rest, for both sides. Its sign is undetermined."""
_KNEE = np.array([1.0, 0.0, 0.0])
SWING_TO_COLLAR = 0.25
"""Fraction of an arm's swing that its collar takes, because captures do not measure collar bones."""
TWIST_TO_ELBOW = 0.5
"""Fraction of the forearm's twist that the elbow takes, because a forearm twists between elbow and wrist."""
SKEWED = 0.85
"""Smallest allowed cosine between the axes of a skeleton at rest and those of its file."""


def retarget(clip: Clip, body: BodyModel | None = None) -> Pose:
    """SMPL's 24 rotations for all frames of a clip.

    The rest poses are aligned bone by bone: thigh, shin, upper arm, forearm and hand of the body point exactly in the directions of the clip's. Hips,
    spine, neck, head and feet rotate as the clip's joints do, except for the spread of the legs at rest. A rule splits an arm's rotation between
    collar and shoulder (``SWING_TO_COLLAR``), and a forearm's between elbow and wrist (``TWIST_TO_ELBOW``).

    body: the body whose bones are aligned, with SMPL's joint names; by default the default body.

    Returns:
        A ``Pose`` of batch shape (T,), float32 NumPy arrays, in the frame "model". ``translation`` (T, 3) is in metres, scaled by the length of the
        legs so that feet stay on the ground. ``measured`` (T, 24) is False for joints that the skeleton does not have; their rotation
        is the identity. SMPL's two rigid hands are always among them.

    Raises:
        PoseFileError: the skeleton's names are unknown, or its rest pose is not upright with straight arms and legs (a T-pose or an A-pose).
    """
    rest_body, order = _body_joints(body)
    joints, spine = _joints(clip)
    basis = _basis(clip, joints)
    world = basis @ clip.world @ basis.T
    rest = clip.rest @ basis.T
    frames = len(clip)
    turned: dict[str, NDArray[np.float64]] = {}  # world rotations of SMPL's joints, in its rest frame

    def direction(start: str, end: str) -> NDArray[np.float64]:
        return _unit(rest[joints[end]] - rest[joints[start]])

    def body_direction(start: str, end: str) -> NDArray[np.float64]:
        return _unit(rest_body[end] - rest_body[start])

    for name in ("pelvis", "neck", "head"):
        if name in joints:
            turned[name] = world[:, joints[name]]
    for name, joint in spine.items():
        turned[name] = world[:, joint]
    chest = next(turned[name] for name in (*reversed(_SPINE), "pelvis") if name in turned)
    collars, elbow_twists = {}, {}
    for side in ("left", "right"):
        hip, knee, ankle, foot = (f"{side}_{part}" for part in ("hip", "knee", "ankle", "foot"))
        collar, shoulder, elbow, wrist, hand = (
            f"{side}_{part}" for part in ("collar", "shoulder", "elbow", "wrist", "hand")
        )
        hinge = _hinge(clip.rotations[:, joints[knee]], basis)
        for start, end in ((hip, knee), (knee, ankle)):
            turned[start] = world[:, joints[start]] @ _align(
                body_direction(start, end), _KNEE, direction(start, end), hinge
            )
        flat = np.array([1.0, 1.0, 0.0])  # a foot follows the spread of the legs in the frontal plane
        spread = _swing(_unit(body_direction(hip, ankle) * flat), _unit(direction(hip, ankle) * flat))
        for name in (ankle, foot):
            if name in joints:
                turned[name] = world[:, joints[name]] @ spread

        hinge = _hinge(clip.rotations[:, joints[elbow]], basis)
        for start, end in ((shoulder, elbow), (elbow, wrist)):
            turned[start] = world[:, joints[start]] @ _align(
                body_direction(start, end), _ELBOW, direction(start, end), hinge
            )
        tip = _tip(clip, joints[wrist])
        pointing = direction(elbow, wrist) if tip is None else _unit(rest[tip] - rest[joints[wrist]])
        turned[wrist] = world[:, joints[wrist]] @ _swing(body_direction(wrist, hand), pointing)

        arm = body_direction(shoulder, elbow)
        inside = np.swapaxes(chest, -1, -2) @ turned[shoulder]
        collars[collar] = chest @ _power(_swing(arm, inside @ arm), SWING_TO_COLLAR)
        forearm = body_direction(elbow, wrist)
        twist = _twist(np.swapaxes(turned[elbow], -1, -2) @ turned[wrist], forearm)
        elbow_twists[elbow] = _about(forearm, TWIST_TO_ELBOW * twist)
    turned |= collars
    for elbow, twist in elbow_twists.items():
        turned[elbow] = turned[elbow] @ twist

    rotations = np.tile(np.eye(3), (frames, JOINTS["smpl"], 1, 1))
    measured = np.zeros(JOINTS["smpl"], bool)
    filled: list[NDArray[np.float64]] = []
    for joint, (name, parent) in enumerate(order):
        above = np.eye(3) if parent < 0 else filled[parent]
        measured[joint] = name in turned
        filled.append(turned.get(name, above))
        rotations[:, joint] = np.swapaxes(above, -1, -2) @ filled[-1]
    scale = _leg(rest_body) / _leg({n: rest[j] for n, j in joints.items()})
    return Pose(
        rotations=rotations.astype(np.float32),
        frame="model",
        translation=(scale * clip.translation @ basis.T - rest_body["pelvis"]).astype(np.float32),
        measured=np.tile(measured, (frames, 1)),
    )


def _body_joints(body: BodyModel | None) -> tuple[dict[str, NDArray[np.float64]], list[tuple[str, int]]]:
    """Rest positions of SMPL's joints by name, and (name, parent) in order."""
    model = io.load_body() if body is None else body
    names = model.joint_names[: JOINTS["smpl"]]
    places = np.asarray(model.joint_template, np.float64)
    if model.joint_names[:22] != io.load_body().joint_names[:22]:
        raise ValueError(f"expected a body whose first 22 joints have SMPL's names; found {names}")
    return dict(zip(names, places)), list(zip(names, model.parents[: JOINTS["smpl"]]))


def _joints(clip: Clip) -> tuple[dict[str, int], dict[str, int]]:
    """Maps SMPL's joints to the clip's: limbs, pelvis, neck, head; and the joints of the trunk."""
    plain = {name.rpartition(":")[2]: joint for joint, name in reversed(list(enumerate(clip.names)))}
    wanting: dict[str, list[str]] = {}
    for scheme, ((left, right), table) in _SCHEMES.items():
        found, missing = {}, []
        for ours, theirs in table.items():
            sides = (("left_", left), ("right_", right)) if "{L}" in theirs else (("", ""),)
            for prefix, word in sides:
                name = theirs.format(L=word)
                if name in plain:
                    found[f"{prefix}{ours}"] = plain[name]
                elif ours in _LIMBS or ours == "pelvis":
                    missing.append(name)
        if not missing:
            return found, _trunk(clip, found)
        wanting[scheme] = missing
    scheme, missing = min(wanting.items(), key=lambda item: len(item[1]))
    raise PoseFileError(
        f"{clip.path}: unknown joint names; the most similar known names are those of {scheme}, of which "
        f"{', '.join(missing):.200} are missing. Found {', '.join(clip.names):.300}"
    )


def _trunk(clip: Clip, joints: Mapping[str, int]) -> dict[str, int]:
    """Distributes SMPL's three spine joints over the clip's joints between hips and arms; fewer if the clip has fewer."""

    def upwards(joint: int) -> list[int]:
        chain = []
        while joint >= 0:
            chain.append(joint)
            joint = int(clip.parents[joint])
        return chain

    left, right = upwards(joints["left_shoulder"]), upwards(joints["right_shoulder"])
    hips = {*upwards(joints["left_hip"])} & {*upwards(joints["right_hip"])}
    chain = [joint for joint in reversed(left) if joint in right and joint not in hips]
    chain = [joint for joint in chain if joint != joints.get("neck")]
    places = [-(-(k + 1) * len(chain) // 3) - 1 for k in range(3)] if chain else []
    return {
        name: chain[place] for k, (name, place) in enumerate(zip(_SPINE, places)) if k == 0 or place != places[k - 1]
    }


def _basis(clip: Clip, joints: Mapping[str, int]) -> NDArray[np.float64]:
    """Rotation (3, 3) from the file's axes to SMPL's (x left, y up, z forward), estimated from the skeleton at rest."""

    def nearest(vector: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        unit = _unit(vector)
        axis = np.zeros(3)
        axis[np.argmax(np.abs(unit))] = np.sign(unit[np.argmax(np.abs(unit))])
        return axis, float(axis @ unit)

    at = {name: clip.rest[joint] for name, joint in joints.items()}
    shoulders, hips = at["left_shoulder"] + at["right_shoulder"], at["left_hip"] + at["right_hip"]
    left, straight = nearest(at["left_hip"] - at["right_hip"])
    up, upright = nearest(shoulders - hips)
    signs = [straight, upright]
    for side, sign in (("left", 1), ("right", -1)):
        ankle, hip, wrist, shoulder = (at[f"{side}_{part}"] for part in ("ankle", "hip", "wrist", "shoulder"))
        signs.append(float(-up @ _unit(ankle - hip)))
        arm = _unit(wrist - shoulder)
        signs.append(
            float(np.hypot(max(float(sign * left @ arm), 0.0), float(up @ arm)))
        )  # the arm points sideways or hangs
    if abs(left @ up) > 0 or min(signs) < SKEWED:
        raise PoseFileError(
            f"{clip.path}: expected a rest pose that is upright with straight arms and legs (a T-pose or an A-pose); found another"
        )
    return np.stack([left, up, np.cross(left, up)])


def _hinge(rotations: NDArray[np.float64], basis: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The unit axis, at rest and in SMPL's axes, about which a joint (T, 3, 3) rotates in all frames; None if it rotates about several, or hardly
    at all.
    """
    skew = rotations - np.swapaxes(rotations, -1, -2)
    axes = np.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], -1) / 2  # axis times the sine of the angle
    _, sizes, rows = np.linalg.svd(axes, full_matrices=False)
    steady = len(sizes) < 2 or sizes[1] < 1e-3 * sizes[0]
    return basis @ rows[0] if steady and np.linalg.norm(axes, axis=-1).max() > np.sin(np.deg2rad(5)) else None


def _align(
    bone: NDArray[np.float64],
    axis: NDArray[np.float64],
    target: NDArray[np.float64],
    hinge: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """Rotation (3, 3) from a bone of SMPL at rest to the direction ``target``. If ``hinge`` is known, the axis of bending goes to it."""
    swing = _swing(bone, target)
    if hinge is None:
        return swing

    def across(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        return _unit(vector - (vector @ target) * target)

    start, end = across(swing @ axis), across(hinge)
    end = end * (1.0 if start @ end >= 0 else -1.0)
    angle = np.arctan2(np.cross(start, end) @ target, start @ end)
    return _about(target, angle) @ swing


def _tip(clip: Clip, joint: int) -> int | None:
    """The child of a joint that is farthest from it, not at the same position: the direction of a hand."""
    children = np.flatnonzero(clip.parents == joint)
    lengths = np.linalg.norm(clip.offsets[children], axis=-1)
    return int(children[lengths.argmax()]) if len(children) and lengths.max() > 1e-6 else None


def _leg(at: Mapping[str, NDArray[np.float64]]) -> float:
    parts = (("hip", "knee"), ("knee", "ankle"))
    return float(sum(np.linalg.norm(at[f"{s}_{a}"] - at[f"{s}_{b}"]) for s in ("left", "right") for a, b in parts))


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normalises vectors (..., 3)."""
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)


def _about(axis: NDArray[np.float64], angle: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Rotations (..., 3, 3) about unit axes (..., 3) by radians (...), by Rodrigues' formula."""
    x, y, z = np.moveaxis(np.asarray(axis, float), -1, 0)
    zero = np.zeros_like(x)
    skew = np.stack([np.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))], -2)
    angle = np.asarray(angle, float)[..., None, None]
    return np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * (skew @ skew)


def _swing(start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smallest rotations (..., 3, 3) of a unit vector (3,) onto unit vectors (..., 3); about y if they are opposite."""
    normal = np.cross(start, end)
    sine = np.linalg.norm(normal, axis=-1)
    cosine = end @ start
    axis = np.where((sine > 1e-9)[..., None], normal / np.maximum(sine, 1e-12)[..., None], np.array([0.0, 1.0, 0.0]))
    return _about(axis, np.arctan2(sine, cosine))


def _power(rotations: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Rotations (..., 3, 3) with their angles scaled by a fraction."""
    skew = rotations - np.swapaxes(rotations, -1, -2)
    axis = np.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1) / 2
    sine = np.linalg.norm(axis, axis=-1)
    angle = np.arctan2(sine, (np.trace(rotations, axis1=-2, axis2=-1) - 1) / 2)
    return _about(_unit(axis), share * angle)


def _twist(rotations: NDArray[np.float64], axis: NDArray[np.float64]) -> NDArray[np.float64]:
    """Twist angles (...) in radians of rotations (..., 3, 3) about a unit axis (3,), without the swing of the axis."""
    swing = _swing(axis, rotations @ axis)
    rest = np.swapaxes(swing, -1, -2) @ rotations
    across = _unit(np.cross(axis, [0.3, 0.5, 0.8]))
    moved = rest @ across
    return np.arctan2(np.cross(across, moved) @ axis, moved @ across)

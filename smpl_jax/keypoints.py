"""Named sets of keypoints, and where a body has them.

Detectors and data sets have keypoints of their own, in an order of their own. ``KEYPOINT_SETS`` lists the points of each set and says what each is
on a body: a kinematic joint, a named vertex, or a row of a regressor. :func:`locate` finds them on a body, as one matrix over its joints and the
few vertices that are needed::

    points = locate(body, "openpose25")
    points(rotations, betas, translation)    # (..., 25, 3) metres

A point that a body lacks is an error, or it is masked. It is never replaced silently: ``near=True`` allows the stand-ins that the table names.
"""

import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from smpl_jax import body as bodies
from smpl_jax.body import BodyModel

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Keypoint:
    """One point of a set.

    name: unique in its set; left and right are those of the person.
    source: what it is on a body: "left_hip" (a joint), "@nose" (a named vertex) or "h36m[4]" (row 4 of a regressor).
    near: what may stand in for it on a body that lacks the source, a few centimetres away; in order of preference.
    """

    name: str
    source: str
    near: tuple[str, ...] = ()


def _points(text: str) -> tuple[Keypoint, ...]:
    """Words "name", "name=source" or "name=source~near~near". Without a source, a point is the joint of its name."""
    points = []
    for word in text.split():
        name, _, sources = word.partition("=")
        source, *near = (sources or name).split("~")
        points.append(Keypoint(name, source, tuple(near)))
    return tuple(points)


_OPENPOSE = """
    nose=@nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist
    mid_hip=pelvis right_hip right_knee right_ankle left_hip left_knee left_ankle
    right_eye=@right_eye left_eye=@left_eye right_ear=@right_ear left_ear=@left_ear
    left_big_toe=@left_big_toe left_small_toe=@left_small_toe left_heel=@left_heel
    right_big_toe=@right_big_toe right_small_toe=@right_small_toe right_heel=@right_heel
"""
KEYPOINT_SETS: dict[str, tuple[Keypoint, ...]] = {
    "coco17": _points("""
        nose=@nose left_eye=@left_eye right_eye=@right_eye left_ear=@left_ear right_ear=@right_ear
        left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist
        left_hip right_hip left_knee right_knee left_ankle right_ankle
    """),
    "coco18": _points("""
        nose=@nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist
        right_hip right_knee right_ankle left_hip left_knee left_ankle
        right_eye=@right_eye left_eye=@left_eye right_ear=@right_ear left_ear=@left_ear
    """),
    "openpose25": _points(_OPENPOSE),
    "smpl24": _points("""
        pelvis left_hip right_hip spine1 left_knee right_knee spine2 left_ankle right_ankle spine3 left_foot right_foot neck
        left_collar right_collar head left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_hand right_hand
    """),
    "h36m17": _points("""
        pelvis=h36m[0]~pelvis
        right_hip=h36m[4]~right_hip right_knee=h36m[5]~right_knee right_ankle=h36m[6]~right_ankle
        left_hip=h36m[1]~left_hip left_knee=h36m[2]~left_knee left_ankle=h36m[3]~left_ankle
        spine=h36m[7]~spine2 thorax=h36m[8]~neck jaw=h36m[9] head=h36m[10]
        left_shoulder=h36m[11]~left_shoulder left_elbow=h36m[12]~left_elbow left_wrist=h36m[13]~left_wrist
        right_shoulder=h36m[14]~right_shoulder right_elbow=h36m[15]~right_elbow right_wrist=h36m[16]~right_wrist
    """),
    "lsp14": _points("""
        right_ankle=h36m[6]~right_ankle right_knee=h36m[5]~right_knee right_hip=h36m[4]~right_hip
        left_hip=h36m[1]~left_hip left_knee=h36m[2]~left_knee left_ankle=h36m[3]~left_ankle
        right_wrist=h36m[16]~right_wrist right_elbow=h36m[15]~right_elbow right_shoulder=h36m[14]~right_shoulder
        left_shoulder=h36m[11]~left_shoulder left_elbow=h36m[12]~left_elbow left_wrist=h36m[13]~left_wrist
        neck=h36m[8]~neck head_top=h36m[10]~@head_top
    """),
    "humans44": _points(
        _OPENPOSE
        + """
        lsp_right_ankle=j19[0]~right_ankle lsp_right_knee=j19[1]~right_knee lsp_right_hip=j19[2]~extra[0]~right_hip
        lsp_left_hip=j19[3]~extra[1]~left_hip lsp_left_knee=j19[4]~left_knee lsp_left_ankle=j19[5]~left_ankle
        lsp_right_wrist=j19[6]~right_wrist lsp_right_elbow=j19[7]~right_elbow lsp_right_shoulder=j19[8]~right_shoulder
        lsp_left_shoulder=j19[9]~left_shoulder lsp_left_elbow=j19[10]~left_elbow lsp_left_wrist=j19[11]~left_wrist
        lsp_neck=j19[12]~extra[2]~neck lsp_head_top=j19[13]~extra[3]~@head_top
        mpii_pelvis=j19[14]~extra[4]~pelvis mpii_thorax=j19[15]~extra[5]~neck
        h36m_spine=j19[16]~extra[6]~spine2 h36m_jaw=j19[17]~extra[7] h36m_head=j19[18]~extra[8]
    """
    ),
}
"""Sets of keypoints by name: the points in the order of the set.

"coco17" is COCO's, which YOLO, ViTPose and MMPose predict too; "coco18" is OpenPose's earlier model, with the neck, as in 3DPW and RPE; "openpose25"
is OpenPose's BODY_25; "smpl24" are SMPL's joints; "h36m17" has the order of Human3.6M (right leg first); "lsp14" are the 14 points that SPIN's
protocol takes from Human3.6M's 17; "humans44" are 4D-Humans' 44, OpenPose's and 19 more.

Which joint or vertex a point is follows SPIN and 4D-Humans. The regressors are files of others that ``BodyModel.with_keypoints`` adds to a body:
"h36m" is SPIN's ``J_regressor_h36m.npy`` (17, V), left leg in rows 1 to 3; "j19" is 4D-Humans' ``SMPL_to_J19.pkl`` (19, V); "extra" is SPIN's
``J_regressor_extra.npy`` (9, V).
"""

SMPL_VERTICES = {
    "nose": 332, "right_eye": 6260, "left_eye": 2800, "right_ear": 4071, "left_ear": 583,
    "left_big_toe": 3216, "left_small_toe": 3226, "left_heel": 3387,
    "right_big_toe": 6617, "right_small_toe": 6624, "right_heel": 6787, "head_top": 411,
}  # fmt: skip
"""Vertices of the mesh of SMPL and SMPL-H (6890 vertices), whose files name none: ``body.with_keypoints(vertex_ids=SMPL_VERTICES)``. They are
those that smplx appends to the joints, and the top of the head that SMPLify uses. On any other mesh they mean nothing."""

_LIMBS = (("hip", "knee", "ankle"), ("shoulder", "elbow", "wrist"))


def keypoint_set(name: str) -> tuple[Keypoint, ...]:
    """The points of a set. Raises a ValueError that lists the sets if there is none of this name."""
    if not isinstance(name, str) or name not in KEYPOINT_SETS:
        known = ", ".join(f"{key} ({len(points)})" for key, points in KEYPOINT_SETS.items())
        raise ValueError(f"the set of keypoints must be one of {known}; found {name!r:.60}")
    return KEYPOINT_SETS[name]


def keypoint_twins(name: str) -> np.ndarray:
    """(K,) for each point of a set, its counterpart on the other side of the body; itself in the middle."""
    names = [point.name for point in keypoint_set(name)]
    sides = {"left": "right", "right": "left"}
    other = [re.sub(r"(?<![a-z])(left|right)(?![a-z])", lambda side: sides[side[0]], one) for one in names]
    return np.array([names.index(one) for one in other])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["part", "weights"],
    meta_fields=["set_name", "points", "sources"],
)
@dataclasses.dataclass(frozen=True)
class Locations:
    """Where the points of a set are on a body; :func:`locate` makes it. A pytree, so it may be an argument of ``jax.jit``.

    sources: for each point what it is on this body (``Keypoint.source`` or one of its stand-ins), or None if the body lacks it.
    """

    part: BodyModel  # the body with the needed vertices only
    weights: jax.Array  # (K, J + N) of the joints and vertices of `part`
    set_name: str
    points: tuple[Keypoint, ...]
    sources: tuple[str | None, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """(K) names of the points."""
        return tuple(point.name for point in self.points)

    @property
    def known(self) -> np.ndarray:
        """(K,) bool: the points that this body has."""
        return np.array([source is not None for source in self.sources])

    @property
    def exact(self) -> np.ndarray:
        """(K,) bool: the points that this body has, without those where another point stands in."""
        return np.array([source == point.source for source, point in zip(self.sources, self.points)])

    def __repr__(self) -> str:
        return f"Locations({self.set_name!r}, {self.known.sum()} of {len(self.points)} points on {self.part.name!r})"

    def __call__(
        self,
        rotations: ArrayLike,
        betas: ArrayLike | None = None,
        translation: ArrayLike | None = None,
        *,
        expression: ArrayLike | None = None,
    ) -> jax.Array:
        """The points (..., K, 3) in metres, in the frame of the root rotation; zeros where ``known`` is False. Arguments as ``smpl_jax.joints``."""
        if self.part.num_vertices:
            out = bodies.forward(self.part, rotations, betas, translation, expression=expression)
            given = jnp.concatenate([out.joints, out.vertices], axis=-2)
        else:
            given = bodies.joints(self.part, rotations, betas, translation, expression=expression)
        return jnp.einsum("kn,...nc->...kc", self.weights, given, precision=_HIGHEST)


def locate(body: BodyModel, name: str, *, near: bool = False, missing: Literal["error", "mask"] = "error") -> Locations:
    """Finds the points of a set on a body.

    Args:
        body: any body, with named vertices and regressors as its file or ``with_keypoints`` gives them.
        name: one of ``KEYPOINT_SETS``.
        near: allow the stand-ins of the table for points that the body lacks: SMPL's ankle for the ankle that a regressor would give. Right for
            fitting, wrong for an evaluation whose numbers are to be compared.
        missing: what to do about points that the body still lacks: "error", or "mask" (``Locations.known`` is False there).

    Raises:
        ValueError: no such set; a point is missing; the body has none of them; or a regressor has the legs or arms of the other side.
    """
    points = keypoint_set(name)
    if missing not in ("error", "mask"):
        raise ValueError(f"missing must be 'error' or 'mask'; found {missing!r:.60}")
    rows: dict[str, dict[str, np.ndarray]] = {}
    for point in points:
        found = ((source, _row(body, source)) for source in (point.source, *(point.near if near else ())))
        rows[point.name] = next(({source: row} for source, row in found if row is not None), {})
    lost = [point for point in points if not rows[point.name]]
    if lost and (missing == "error" or len(lost) == len(points)):
        raise ValueError(_lacks(body, name, lost, near))
    width = body.num_joints + body.num_vertices
    weights = np.stack([next(iter(rows[point.name].values()), np.zeros(width)) for point in points])
    sources = tuple(next(iter(rows[point.name]), None) for point in points)
    _check_sides(body, name, dict(zip((point.name for point in points), zip(sources, weights))))
    needed = np.flatnonzero(weights[:, body.num_joints :].any(axis=0))
    kept = np.concatenate([np.arange(body.num_joints), body.num_joints + needed])
    return Locations(body.subset(needed), jnp.asarray(weights[:, kept], body.dtype), name, points, sources)


def locate_vertices(body: BodyModel, vertices: Sequence[str | int]) -> Locations:
    """Vertices of a body as a set of points of its own, such as markers on the skin.

    vertices: names of vertices of the body (``BodyModel.vertex_ids``) or numbers.

    Raises:
        ValueError: a name is unknown, a number is out of range, or a vertex is given twice.
    """
    if isinstance(vertices, str) or not len(vertices):
        raise ValueError(f"vertices must be a list of names or numbers of vertices; found {vertices!r:.60}")
    ids = [body.vertex_id(v) if isinstance(v, str) else v for v in vertices]
    part = body.subset(np.asarray(ids))
    weights = np.concatenate([np.zeros((len(ids), body.num_joints)), np.eye(len(ids))], axis=1)
    points = tuple(Keypoint(str(v), f"@{v}") for v in vertices)
    return Locations(part, jnp.asarray(weights, body.dtype), "vertices", points, tuple(p.source for p in points))


def _row(body: BodyModel, source: str) -> np.ndarray | None:
    """The point as weights (J + V,) of the body's joints and vertices, or None if the body lacks it."""
    weights = np.zeros(body.num_joints + body.num_vertices)
    if source.startswith("@"):
        number = dict(body.vertex_ids).get(source[1:])
        if number is None:
            return None
        weights[body.num_joints + number] = 1
    elif match := re.fullmatch(r"(\w+)\[(\d+)\]", source):
        regressor, row = body.regressors.get(match[1]), int(match[2])
        if regressor is None or row >= len(regressor):
            return None
        weights[body.num_joints :] = regressor[row]
    elif source in body.joint_names:
        weights[body.joint_names.index(source)] = 1
    else:
        return None
    return weights


def _lacks(body: BodyModel, name: str, lost: list[Keypoint], near: bool) -> str:
    sources = sorted({re.sub(r"\[\d+\]", "", point.source) for point in lost})
    named = ", ".join(f"{point.name} ({point.source})" for point in lost[:6]) + (", …" if len(lost) > 6 else "")
    advice = []
    if any(source.startswith("@") for source in sources):
        smpl = body.name in ("smpl", "smplh") and body.num_vertices == 6890
        ours = "smpl_jax.keypoints.SMPL_VERTICES" if smpl else "{name: number}"
        advice.append(f"name the vertices: body.with_keypoints(vertex_ids={ours})")
    for regressor in (source for source in sources if any(f"{source}[" in point.source for point in lost)):
        advice.append(f"add the regressor: body.with_keypoints(regressors={{{regressor!r}: weights}})")
    if not near and any(point.near for point in lost):
        advice.append("allow the joints nearby: near=True")
    advice.append("leave these points out: missing='mask'")
    return f"body {body.name!r} lacks points of {name}: {named}. " + "; or ".join(advice)


def _check_sides(body: BodyModel, name: str, found: dict[str, tuple[str | None, Any]]) -> None:
    """Two regressors of Human3.6M's joints circulate whose legs have opposite sides. Raises if a whole limb is on the other side of the body at rest
    than the body's own joints."""
    rest = np.concatenate([np.asarray(body.joint_template), np.asarray(body.template).T])[:, 0]
    joints = dict(zip(body.joint_names, rest))
    prefixes = sorted({point.removesuffix("left_hip") for point in found if point.endswith("left_hip")})
    for prefix in prefixes:
        for limb in _LIMBS:
            pairs = [(f"left_{part}", f"right_{part}") for part in limb]
            if not all(prefix + point in found and point in joints for pair in pairs for point in pair):
                continue
            sources = [source for pair in pairs for point in pair if (source := found[prefix + point][0])]
            if len(sources) < 6 or not any("[" in source for source in sources):
                continue
            own = [joints[left] > joints[right] for left, right in pairs]
            theirs = [found[prefix + left][1] @ rest > found[prefix + right][1] @ rest for left, right in pairs]
            if all(own) and not any(theirs):
                raise ValueError(
                    f"on body {body.name!r} the points {', '.join(limb)} of {name} ({', '.join(sources)}) lie on the other side than the "
                    "body's joints: left and right change places in this regressor. Two regressors of Human3.6M's joints are in use; expected "
                    "SPIN's J_regressor_h36m.npy, whose rows 1 to 3 are the left leg. For the other, swap rows 1-3 with rows 4-6"
                )

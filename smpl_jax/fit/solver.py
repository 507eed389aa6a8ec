"""Fits one person from many initial poses: these in closed form, then Levenberg–Marquardt, then limbs that are flipped in depth.

Everything is of static shape and without branches on values, so that ``jax.vmap`` over people is one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smpl_jax import body as bodies
from smpl_jax.body import BodyModel
from smpl_jax.fit.prior import PosePrior
from smpl_jax.frames import turn
from smpl_jax.keypoints import Locations
from smpl_jax.metrics import procrustes
from smpl_jax.pose import SHARED
from smpl_jax.printing import one_line
from smpl_jax.rotations import axis_angle_to_matrix, matrix_to_axis_angle

_HIGHEST = jax.lax.Precision.HIGHEST
_ANGLES = 3 * (SHARED - 1)
_FOLLOWED = 2.0  # noise of the points / what is left of it after a fit: measured, docs/fit.md
NEAREST = 0.1  # metres: points nearer to the camera than this project as if they were there

# SMPL's (upper joint, lower joint, tip) of each limb, and the axis about which the lower joint bends at rest; (joint, axis, sign) of bending.
_LIMBS = ((16, 18, 20), (17, 19, 21), (1, 4, 7), (2, 5, 8))
_AXES = np.array([[0, -1, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]], np.float32)
_FLIPS = ((-1, 1), (1, -1), (-1, -1))  # of upper and lower bone; -1 is the other depth
LANES = 1 + len(_LIMBS) * len(_FLIPS)
"""Fits of one person that run side by side: starts, then the best of them and its flips."""
_HINGES = np.array([3 * (18 - 1) + 1, 3 * (19 - 1) + 1, 3 * (4 - 1), 3 * (5 - 1)])
_HINGE_SIGNS = np.array([1, -1, -1, -1], np.float32)
_HINGE_SLOPE = 4.0  # a radian of bending the wrong way costs e^4, as much as a radian costs e^-4 the right way
_YAWS, _PITCHES = (
    tuple(range(0, 360, 30)),
    (-70, -35, 0, 35, 70),
)  # degrees: views of the library of starts from 2D points
_STARTS_3D = 6
_UPRIGHT = 0.01  # square metres a square radian: how much the roll of a start counts beside its distance to the points


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """Numbers of the fit. The defaults are those that docs/fit.md was measured with.

    steps: Levenberg–Marquardt steps of each stage of many fits (starts coarse, starts fine, each round of flips), and of each round at the end.
    flips: rounds in which the limbs of the best fit are flipped in depth (2D only). rounds: how often the noise is estimated at the end.
    coarse: metres, the noise that the first stage assumes. noise: metres, the noise that flips and end begin with. least: metres, the least
    noise that is assumed. Pixels count as metres at the person's depth.
    robust: metres; points farther off than this lose their weight (Geman–McClure); the first stage takes three times this.
    pose, shape, bend: weights of the pose prior, of the betas, and of the prior against knees and elbows that bend the wrong way.
    """

    steps: tuple[int, int] = (7, 6)
    flips: int = 2
    rounds: int = 4
    coarse: float = 0.03
    noise: float = 0.01
    least: float = 0.0005
    robust: float = 0.15
    pose: float = 0.1
    shape: float = 1.0
    bend: float = 0.1

    def __post_init__(self) -> None:
        whole = {"steps": min(self.steps), "rounds": self.rounds, "flips": self.flips + 1}
        for name, value in whole.items():
            if value < 1:
                raise ValueError(f"FitSettings: {name} is too small: {getattr(self, name)!r}")
        for name in ("coarse", "noise", "least", "robust", "pose", "shape", "bend"):
            if not getattr(self, name) > 0:
                raise ValueError(f"FitSettings: {name} must be positive, found {getattr(self, name)!r}")


class Observed(NamedTuple):
    """What is known of one person.

    points: (K, 2) on the plane one metre before the camera, or (K, 3) metres. weights: (K,) from 0 to 1. betas: (n,) where the fit begins;
    fit_betas: () 1 to fit them, 0 to keep them. noise: () metres, or 0 to estimate it.
    """

    points: Any
    weights: Any
    betas: Any
    fit_betas: Any
    noise: Any

    def __repr__(self) -> str:
        return one_line(self)


class State(NamedTuple):
    """A body, (...) of them. place: its translation (3,); for 2D points x/z, y/z and z."""

    root: jax.Array  # (3, 3)
    place: jax.Array  # (3,)
    angles: jax.Array  # (63,)
    betas: jax.Array  # (n,)

    def __repr__(self) -> str:
        return one_line(self)


class Solution(NamedTuple):
    """The fitted body. points: (K, 3) metres. errors: (K,) metres at the person's depth, of all points. fall: relative decrease of the energy in
    the last step. noise: metres, as assumed at the end."""

    rotations: Any
    betas: Any
    translation: Any
    points: Any
    errors: Any
    energy: Any
    fall: Any
    noise: Any

    def __repr__(self) -> str:
        return one_line(self)


class _Stage(NamedTuple):
    noise: jax.Array
    robust: jax.Array
    unit: jax.Array  # metres that one unit of the observed points means


@partial(jax.jit, static_argnames="settings")
def solve(located: Locations, prior: PosePrior, observed: Observed, settings: FitSettings) -> Solution:
    """Fits people one by one: every field of `observed` has a leading axis (P,), and so has the result."""
    library = _library(located, prior, flat=observed.points.shape[-1] == 2)
    return jax.vmap(lambda one: _solve(located, prior, library, one, settings))(observed)


def _solve(located: Locations, prior: PosePrior, library: State, observed: Observed, settings: FitSettings) -> Solution:
    flat = observed.points.shape[-1] == 2
    seen = observed.weights.sum()
    states, unit = (_starts_2d if flat else _starts_3d)(located, library, observed)

    def descend(states: State, noise: jax.Array, robust: jax.Array, steps: int) -> tuple[State, jax.Array, jax.Array]:
        stage = _Stage(noise, robust, unit)
        return jax.vmap(lambda one: _descend(located, prior, observed, settings, stage, one, steps))(states)

    given = observed.noise > 0
    coarse, fine = (jnp.maximum(observed.noise, x) for x in (settings.coarse, settings.noise))
    wide, robust = jnp.asarray(3 * settings.robust), jnp.asarray(settings.robust)
    flips = settings.flips if flat else 0

    # A scan, so that the descent is compiled once.
    def broad(carry: tuple[State, State], stage: tuple[jax.Array, ...]) -> tuple[tuple[State, State], None]:
        states, best = carry
        noise, robust, flip = stage
        if flat:
            states = jax.tree.map(partial(jnp.where, flip), _flipped(located.part, best), states)
        states, energies, _ = descend(states, noise, robust, settings.steps[0])
        return (states, _take(states, jnp.argmin(energies))), None

    stages = (
        jnp.stack([coarse, *[fine] * (1 + flips)]),
        jnp.stack([wide, *[robust] * (1 + flips)]),
        jnp.arange(2 + flips) >= 2,
    )
    (_, best), _ = jax.lax.scan(broad, (states, _take(states, 0)), stages)

    def refine(carry: tuple[State, jax.Array], _: None) -> tuple[tuple[State, jax.Array], tuple[jax.Array, jax.Array]]:
        best, noise = carry
        errors = _errors(located, observed, unit, best)[0]
        spread = jnp.sqrt(jnp.sum(observed.weights * jnp.minimum(errors, robust) ** 2) / jnp.maximum(2 * seen, 1))
        # A fit follows its points, so the noise is larger than what is left of it.
        estimate = jnp.minimum(jnp.maximum(_FOLLOWED * spread, settings.least), noise)
        noise = jnp.where(given, observed.noise, estimate)
        states, energies, falls = descend(jax.tree.map(lambda x: x[None], best), noise, robust, settings.steps[1])
        return (_take(states, 0), noise), (energies[0], falls[0])

    (best, noise), (energies, falls) = jax.lax.scan(refine, (best, fine), None, length=settings.rounds)
    errors, points = _errors(located, observed, unit, best)
    rotations, translation = _posed(located.part, best, flat)
    return Solution(rotations, best.betas, translation, points, errors, energies[-1], falls[-1], noise)


def _take(states: State, index: jax.Array | int) -> State:
    return jax.tree.map(lambda x: x[index], states)


def _posed(body: BodyModel, state: State, flat: bool) -> tuple[jax.Array, jax.Array]:
    """Rotations (J, 3, 3) and translation (3,). Joints beyond the body's 21 are at rest."""
    angles = axis_angle_to_matrix(state.angles.reshape(-1, 3))
    rest = jnp.broadcast_to(jnp.eye(3), (body.num_joints - SHARED, 3, 3))
    z = state.place[2]
    translation = jnp.stack([state.place[0] * z, state.place[1] * z, z]) if flat else state.place
    return jnp.concatenate([state.root[None], angles, rest]), translation


def _offsets(located: Locations, observed: Observed, state: State) -> tuple[jax.Array, jax.Array]:
    """Differences (K, 2 or 3) to the observed points in their units, and the body's points (K, 3)."""
    flat = observed.points.shape[-1] == 2
    rotations, translation = _posed(located.part, state, flat)
    points = located(rotations, state.betas, translation)
    shown = points[:, :2] / jnp.maximum(points[:, 2:], NEAREST) if flat else points
    return shown - observed.points, points


def _errors(located: Locations, observed: Observed, unit: jax.Array, state: State) -> tuple[jax.Array, jax.Array]:
    offsets, points = _offsets(located, observed, state)
    return jnp.sqrt(jnp.sum(offsets**2, axis=-1)) * unit, points


def _descend(
    located: Locations,
    prior: PosePrior,
    observed: Observed,
    settings: FitSettings,
    stage: _Stage,
    state: State,
    steps: int,
) -> tuple[State, jax.Array, jax.Array]:
    """Minimises the energy from one state; returns the state, its energy, and by what part the energy fell in the last step."""
    flat = observed.points.shape[-1] == 2

    def moved(step: jax.Array) -> State:
        turned, place, angles, betas = jnp.split(step, (3, 6, 6 + _ANGLES))
        if flat:
            place = jnp.append(state.place[:2] + place[:2] / stage.unit, state.place[2] * jnp.exp(place[2]))
        else:
            place = state.place + place
        root = jnp.matmul(axis_angle_to_matrix(turned), state.root, precision=_HIGHEST)
        return State(root, place, state.angles + angles, state.betas + observed.fit_betas * betas)

    def residuals(step: jax.Array) -> jax.Array:
        there = moved(step)
        offsets = _offsets(located, observed, there)[0] * stage.unit
        square = jnp.sum(offsets**2, axis=-1, keepdims=True)
        robust = offsets * jax.lax.rsqrt(1 + square / stage.robust**2)  # its square is Geman and McClure's function
        bending = _HINGE_SLOPE * _HINGE_SIGNS * there.angles[_HINGES]
        kept = step[6 + _ANGLES :] * (1 - observed.fit_betas)  # betas that are not fitted stay, and the matrix regular
        return jnp.concatenate(
            [
                (observed.weights[:, None] * robust / stage.noise).reshape(-1),
                jnp.sqrt(settings.pose) * prior.residuals(there.angles),
                jnp.sqrt(settings.shape) * (there.betas * observed.fit_betas + kept),
                jnp.sqrt(2 * settings.bend) * jnp.exp(0.5 * jnp.clip(bending, -20, 10)),
            ]
        )

    start = jnp.zeros(6 + _ANGLES + len(state.betas))
    step, energy, fall = levenberg_marquardt(residuals, start, steps)
    there = moved(step)
    # Fewer than a full turn, so that angles mean what the prior was fitted to.
    wrapped = matrix_to_axis_angle(axis_angle_to_matrix(there.angles.reshape(-1, 3))).reshape(-1)
    return there._replace(angles=wrapped), energy, fall


def levenberg_marquardt(
    residuals: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Minimises half the sum of squares of `residuals` (n,) → (m,) by a fixed number of steps. A step is taken only if it lowers the energy, so
    nothing that is not finite is ever taken.

    Returns:
        The best point (n,), its energy, and the relative decrease of the energy in the last step.
    """
    jacobian = jax.jacfwd(lambda x: (lambda r: (r, r))(residuals(x)), has_aux=True)

    def step(carry: tuple[Any, ...], nothing: None) -> tuple[tuple[Any, ...], None]:
        x, energy, damping, _ = carry
        slopes, left = jacobian(x)
        gradient = jnp.matmul(left, slopes, precision=_HIGHEST)
        matrix = jnp.matmul(slopes.T, slopes, precision=_HIGHEST)
        matrix = matrix + jnp.diag(damping * jnp.diagonal(matrix) + 1e-4)
        move = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix, symmetrize_input=False), True), gradient)
        there = x - move
        lower = 0.5 * jnp.sum(residuals(there) ** 2)
        good = lower < energy
        fall = jnp.where(good, (energy - lower) / energy, 0.0)
        damping = jnp.clip(jnp.where(good, damping / 5, damping * 4), 1e-6, 1e6)
        return (jnp.where(good, there, x), jnp.where(good, lower, energy), damping, fall), None

    energy = 0.5 * jnp.sum(residuals(start) ** 2)
    (x, energy, _, fall), _ = jax.lax.scan(
        step, (start, energy, jnp.asarray(1e-2), jnp.asarray(0.0)), None, length=steps
    )
    return x, energy, fall


def _library(located: Locations, prior: PosePrior, flat: bool) -> State:
    """Poses that fits start from: the means of the prior, for 2D points seen from all sides."""
    means = prior.means
    upright = jnp.asarray(turn("model", "camera"), jnp.float32)
    pitches, yaws = (_turns(axis, angles) for axis, angles in ((0, _PITCHES), (1, _YAWS)))
    views = jnp.matmul(upright @ pitches[:, None], yaws).reshape(-1, 3, 3) if flat else jnp.eye(3)[None]
    count = len(means) * len(views)
    return State(
        jnp.tile(views, (len(means), 1, 1)),
        jnp.zeros((count, 3)),
        jnp.repeat(means, len(views), axis=0),
        jnp.zeros((count, located.part.num_betas)),
    )


def _turns(axis: int, degrees: tuple[int, ...]) -> jax.Array:
    return axis_angle_to_matrix(jnp.deg2rad(jnp.asarray(degrees, jnp.float32))[:, None] * jnp.eye(3)[axis])


def _starts_2d(located: Locations, library: State, observed: Observed) -> tuple[State, jax.Array]:
    """The states of the library nearest to the points, each with the distant camera and the roll that fit best, and the metres of a unit."""
    body = located.part
    betas = jnp.broadcast_to(observed.betas, library.betas.shape)
    rotations = jax.vmap(lambda state: _posed(body, state, flat=True)[0])(library)
    pelvis = bodies.pelvis(body, observed.betas)
    points = located(rotations, betas, -pelvis)
    weight = (observed.weights / jnp.maximum(observed.weights.sum(), 1e-6))[:, None]
    middle, aim = jnp.sum(weight * points[..., :2], axis=1), jnp.sum(weight * observed.points, axis=0)
    x, y = points[..., :2] - middle[:, None], observed.points - aim
    # Complex numbers: y ≈ scale · x, where the angle of the scale is the roll.
    along = jnp.sum(weight * x * y, axis=(1, 2))
    across = jnp.sum(weight[:, 0] * (x[..., 0] * y[..., 1] - x[..., 1] * y[..., 0]), axis=1)
    norm = jnp.maximum(jnp.hypot(along, across), 1e-12)
    extent = jnp.maximum(jnp.sum(weight * x**2, axis=(1, 2)), 1e-9)
    scale = jnp.clip(norm / extent, 1e-3, 1e1)  # of the plane at one metre: the body is 0.1 to 1000 m away
    apart = (jnp.sum(weight * y**2) - norm**2 / extent) / scale**2
    roll = jnp.arctan2(across, along)
    order = jax.lax.top_k(-(apart + _UPRIGHT * roll**2), LANES)[1]
    scale, cosine, sine = scale[order], jnp.cos(roll)[order], jnp.sin(roll)[order]
    zero, one = jnp.zeros(LANES), jnp.ones(LANES)
    rolls = jnp.stack(
        [jnp.stack(row, -1) for row in ([cosine, -sine, zero], [sine, cosine, zero], [zero, zero, one])], -2
    )
    root = jnp.matmul(rolls, library.root[order], precision=_HIGHEST)
    shift = aim - scale[:, None] * jnp.einsum("cij,cj->ci", rolls[:, :2, :2], middle[order], precision=_HIGHEST)
    translation = jnp.concatenate([shift / scale[:, None], 1 / scale[:, None]], -1) - pelvis
    z = jnp.maximum(translation[:, 2:], NEAREST)
    place = jnp.concatenate([translation[:, :2] / z, z], -1)
    return State(root, place, library.angles[order], betas[order]), z[0, 0]


def _starts_3d(located: Locations, library: State, observed: Observed) -> tuple[State, jax.Array]:
    """The states of the library nearest to the points, each moved onto them."""
    body = located.part
    betas = jnp.broadcast_to(observed.betas, library.betas.shape)
    rotations = jax.vmap(lambda state: _posed(body, state, flat=False)[0])(library)
    pelvis = bodies.pelvis(body, observed.betas)
    points = located(rotations, betas, -pelvis)
    seen = observed.weights > 0
    aim = jnp.where(seen[:, None], observed.points, 0)
    mask = jnp.broadcast_to(seen, points.shape[:-1])
    root = procrustes(points, jnp.broadcast_to(aim, points.shape), mask).rotation
    root = jnp.where(jnp.isfinite(root), root, jnp.eye(3))
    turned = jnp.einsum("cij,ckj->cki", root, points, precision=_HIGHEST)
    weight = (seen / jnp.maximum(seen.sum(), 1))[:, None]
    shift = jnp.sum(weight * (aim - turned), axis=1)
    apart = jnp.sum(weight * (turned + shift[:, None] - aim) ** 2, axis=(1, 2))
    order = jax.lax.top_k(-apart, min(_STARTS_3D, len(apart)))[1]
    return State(root[order], (shift - pelvis)[order], library.angles[order], betas[order]), jnp.asarray(1.0)


def _flipped(body: BodyModel, state: State) -> State:
    """The state, and for each limb the states whose upper bone, lower bone or both go the other way in depth, with the same image; the elbow or
    knee bends the way that it can. Leading axis (1 + 4 · 3)."""
    rotations, translation = _posed(body, state, flat=True)
    orientation, positions = bodies.chain(body, rotations, state.betas)
    positions = positions + translation
    rest, parents = body.joint_template, jnp.asarray(body.parents)

    def flipped(limb: jax.Array, axis: jax.Array, signs: jax.Array) -> jax.Array:
        upper, lower, tip = limb
        bone = _unit(rest[lower] - rest[upper])
        side = _unit(axis - jnp.dot(axis, bone) * bone)
        thigh = _mirrored(positions[lower] - positions[upper], positions[upper], signs[0])
        shin = _mirrored(positions[tip] - positions[lower], positions[upper], signs[1])
        # A straight limb keeps the axis that it has.
        normal = jnp.cross(thigh, shin) + 0.05 * jnp.sum(orientation[upper] * side, axis=-1)
        normal = _unit(normal - jnp.dot(normal, thigh) * thigh)
        there = jnp.stack([thigh, normal, jnp.cross(thigh, normal)], -1)
        turned = _product(there, jnp.stack([bone, side, jnp.cross(bone, side)]))
        bend = jnp.arctan2(jnp.dot(jnp.cross(thigh, shin), normal), jnp.dot(thigh, shin))
        above = matrix_to_axis_angle(_product(orientation[parents[upper]].T, turned))
        angles = state.angles.reshape(-1, 3).at[upper - 1].set(above)
        return angles.at[lower - 1].set(bend * side).reshape(-1)

    limbs, axes = (jnp.asarray(np.repeat(x, len(_FLIPS), axis=0)) for x in (_LIMBS, _AXES))
    many = jax.vmap(flipped)(limbs, axes, jnp.asarray(np.tile(_FLIPS, (len(_LIMBS), 1))))
    angles = jnp.concatenate([state.angles[None], many])
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (LANES, *x.shape)), state)._replace(angles=angles)


def _mirrored(bone: jax.Array, seen_at: jax.Array, sign: jax.Array) -> jax.Array:
    """The direction of a bone, with the other depth where `sign` is -1."""
    ray = _unit(seen_at)
    return _unit(bone - (1 - sign) * jnp.dot(bone, ray) * ray)


def _unit(vector: jax.Array) -> jax.Array:
    return vector / jnp.sqrt(jnp.maximum(jnp.sum(vector**2), 1e-12))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)

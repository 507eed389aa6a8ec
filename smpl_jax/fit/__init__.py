"""Bodies from points: SMPLify in JAX.

:func:`fit_keypoints` takes keypoints in images, :func:`fit_joints` joints in space, and :func:`fit_markers` points on the skin. All take any
number of people at once and give a :class:`Fit`, whose ``pose`` is a :class:`smpl_jax.Pose`.

The method is that of SMPLify (Bogo et al., ECCV 2016): a robust distance of the points, a mixture of Gaussians as pose prior, the betas' prior, and
a penalty against joints that bend the wrong way, in stages from coarse to fine. Each person is fitted from several initial poses: those of the
prior seen from all sides, each with the camera that fits it best, found in closed form. Then the bones of each limb are flipped in depth, which
leaves the image unchanged, and the fit goes on from there. Only the points are posed, never the whole mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from smpl_jax.body import BodyModel
from smpl_jax.fit.prior import PosePrior, load_prior
from smpl_jax.fit.solver import NEAREST, FitSettings, Observed, Solution, solve
from smpl_jax.frames import Frame
from smpl_jax.io import load_body
from smpl_jax.keypoints import Locations, locate, locate_vertices
from smpl_jax.pose import SHARED, Pose
from smpl_jax.printing import one_line
from smpl_jax.rotations import matrix_to_axis_angle

__all__ = ["Fit", "FitSettings", "PosePrior", "fit_joints", "fit_keypoints", "fit_markers", "load_prior"]

FEWEST = 6
"""Points that a person needs; a fit to fewer has not converged."""
_FAR, _SHARE = 0.1, 0.8  # a fit has not converged unless this share of its points is nearer than this many metres
# Seventeen points anywhere in an image can be met by a body that is bent past all likelihood or that surrounds the camera.
_CLOSEST = 0.3  # metres before the camera, of the nearest point of a fit to an image
_LIKELY = 600.0  # the pose's energy under the prior, and 10 times that of its betas
_SETTLED = 0.01  # relative decrease of the energy in the last step
_CHUNK = 64  # people fitted at a time
_SKIN = 0.05  # a joint moves a vertex if it has at least this share of it


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """Fitted people, of any batch shape (...). All arrays are NumPy's, and all numbers are finite.

    pose: rotations, betas and translation. ``measured`` is False for joints that no seen point depends on: the prior filled them in.
    points: (..., K, 3) metres in the pose's frame, the fitted points.
    errors: (..., K) distances of the fitted points to the given ones, in pixels (``fit_keypoints``) or metres; 0 for points that were not seen.
    seen: (..., K) bool, the points that counted.
    converged: (...) bool. False if fewer than ``FEWEST`` points were seen, a fifth of the seen points is farther off than 10 cm (at the person's
        depth), or the last step still changed much; for keypoints in images also if a seen point is nearer to the camera than 30 cm, or pose and
        betas together are very unlikely under the priors. Such a pose is a guess. True is no promise: a few points fit many poses.
    energy: (...) of the fit: the smaller, the better. It can be compared between fits to the same points with the same settings.
    noise: (...) standard deviation of the points, in the unit of ``errors``, that was given or estimated.
    reasons: (...) text, why a fit has not converged; empty for those that have.
    names: (K,) of the points.
    """

    pose: Pose
    points: NDArray[np.float32]
    errors: NDArray[np.float32]
    seen: NDArray[np.bool_]
    converged: NDArray[np.bool_]
    energy: NDArray[np.float32]
    noise: NDArray[np.float32]
    reasons: NDArray[np.str_]
    names: tuple[str, ...]

    __repr__ = one_line


def fit_keypoints(
    keypoints: ArrayLike,
    name: str,
    *,
    image_size: tuple[float, float],
    focal: ArrayLike | None = None,
    center: ArrayLike | None = None,
    confidence: ArrayLike | None = None,
    body: BodyModel | None = None,
    betas: ArrayLike | None = None,
    noise: float | None = None,
    prior: PosePrior | None = None,
    settings: FitSettings | None = None,
) -> Fit:
    """Fits bodies to keypoints in images.

    Args:
        keypoints: (..., K, 2) pixels, x right and y down, or (..., K, 3) with a confidence from 0 to 1. A point of confidence 0, or one that is not a
            finite number, was not seen; points outside the image count like others.
        name: the set, one of ``smpl_jax.keypoints.KEYPOINT_SETS``: "coco17", "openpose25" …. Points that the body lacks do not count; joints nearby
            stand in for points of regressors (``locate(near=True)``).
        image_size: width and height of the images in pixels.
        focal: (...) focal length in pixels. Unknown, it is taken as the diagonal of the image, a field of view of 53° along it. A wrong
            one moves the person along the view and changes the pose little, unless the person is near.
        center: (..., 2) principal point in pixels; the middle of the image by default.
        confidence: (..., K), if keypoints have two columns.
        body: the body to fit, with 10 betas at most used; by default that of the package.
        betas: (n,) or (..., n): the known shape, which is then kept. None fits it.
        noise: standard deviation of the keypoints in pixels. None estimates it for each person.
        prior: of the pose; ``load_prior()`` by default.
        settings: numbers of the method.

    Returns:
        The fits, with poses in the frame "camera".

    Raises:
        ValueError: a shape does not fit, an argument is out of range, or the body lacks all points of the set.
    """
    body = load_body() if body is None else body
    located = locate(body, name, near=True, missing="mask")
    points = _array("keypoints", keypoints, (len(located.names), None))
    if points.shape[-1] not in (2, 3):
        raise ValueError(
            f"keypoints of {name} must have shape (..., {len(located.names)}, 2 or 3); found {points.shape}"
        )
    if points.shape[-1] == 3:
        if confidence is not None:
            raise ValueError("keypoints with three columns have their confidence in the third; confidence must be None")
        points, confidence = points[..., :2], points[..., 2]
    batch = points.shape[:-2]
    size = np.asarray(image_size, np.float64)
    if size.shape != (2,) or not (np.isfinite(size) & (size > 0)).all():
        raise ValueError(f"image_size must be width and height in pixels; found {image_size!r:.60}")
    focals = _spread("focal", np.hypot(*size) if focal is None else focal, batch, ())
    if not (focals > 0).all():
        raise ValueError("focal must be positive")
    centers = _spread("center", size / 2 if center is None else center, batch, (2,))
    on_plane = (points - centers[..., None, :]) / focals[..., None, None]
    solution, seen = _fitted(
        located,
        on_plane,
        confidence,
        betas,
        None if noise is None else (noise, 1 / focals),
        prior,
        settings or FitSettings(),
        body,
    )
    pose = _pose(located, body, solution, seen, "camera")
    z = np.maximum(solution.points[..., 2:], NEAREST)
    shown = solution.points[..., :2] / z * focals[..., None, None] + centers[..., None, :]
    errors = np.where(seen, np.linalg.norm(shown - np.where(seen[..., None], points, 0), axis=-1), 0)
    depth = np.maximum(solution.translation[..., 2], NEAREST)
    prior = load_prior() if prior is None else prior
    angles = np.asarray(matrix_to_axis_angle(jnp.asarray(solution.rotations[..., 1:SHARED, :, :])))
    effort = prior.energy(angles.reshape(*batch, -1)) + 5 * (solution.betas**2).sum(-1) * (betas is None)
    unlikely = [
        (
            (seen & (solution.points[..., 2] < _CLOSEST)).any(-1),
            f"the body is nearer to the camera than {_CLOSEST:g} m",
        ),
        (np.asarray(effort) > _LIKELY, "only a very unlikely pose or shape fits the points"),
    ]
    return _fit(located, pose, solution, errors, seen, focals / depth, unlikely)


def fit_joints(
    joints: ArrayLike,
    name: str = "smpl24",
    *,
    frame: Frame = "camera",
    confidence: ArrayLike | None = None,
    body: BodyModel | None = None,
    betas: ArrayLike | None = None,
    noise: float | None = None,
    prior: PosePrior | None = None,
    settings: FitSettings | None = None,
) -> Fit:
    """Fits bodies to joints in space.

    joints: (..., K, 3) metres, or (..., K, 4) with a confidence from 0 to 1; points of confidence 0, or that are not finite numbers, were not seen.
    frame: of the joints, and of the poses of the result. noise: of the joints in metres; None estimates it. The rest as :func:`fit_keypoints`.
    """
    body = load_body() if body is None else body
    located = locate(body, name, near=True, missing="mask")
    return _fit_3d(located, body, joints, "joints", frame, confidence, betas, noise, prior, settings)


def fit_markers(
    markers: ArrayLike,
    vertices: Sequence[str | int],
    *,
    frame: Frame = "camera",
    confidence: ArrayLike | None = None,
    body: BodyModel | None = None,
    betas: ArrayLike | None = None,
    noise: float | None = None,
    prior: PosePrior | None = None,
    settings: FitSettings | None = None,
) -> Fit:
    """Fits bodies to points on the skin, such as markers.

    markers: (..., K, 3) metres, or (..., K, 4) with a confidence. vertices: (K,) the vertex of each, by its name or number on the body; a marker that
    stands off the skin is taken to lie on it. The rest as :func:`fit_joints`.
    """
    body = load_body() if body is None else body
    located = locate_vertices(body, vertices)
    return _fit_3d(located, body, markers, "markers", frame, confidence, betas, noise, prior, settings)


def _fit_3d(
    located: Locations,
    body: BodyModel,
    given: ArrayLike,
    what: str,
    frame: Frame,
    confidence: ArrayLike | None,
    betas: ArrayLike | None,
    noise: float | None,
    prior: PosePrior | None,
    settings: FitSettings | None,
) -> Fit:
    points = _array(what, given, (len(located.names), None))
    if points.shape[-1] not in (3, 4):
        raise ValueError(f"{what} must have shape (..., {len(located.names)}, 3 or 4); found {points.shape}")
    if points.shape[-1] == 4:
        if confidence is not None:
            raise ValueError(f"{what} with four columns have their confidence in the fourth; confidence must be None")
        points, confidence = points[..., :3], points[..., 3]
    solution, seen = _fitted(
        located,
        points,
        confidence,
        betas,
        None if noise is None else (noise, 1.0),
        prior,
        settings or FitSettings(),
        body,
    )
    pose = _pose(located, body, solution, seen, frame)
    errors = np.where(seen, np.linalg.norm(solution.points - np.where(seen[..., None], points, 0), axis=-1), 0)
    return _fit(located, pose, solution, errors, seen, np.ones(pose.shape), [])


def _fitted(
    located: Locations,
    points: np.ndarray,
    confidence: ArrayLike | None,
    betas: ArrayLike | None,
    noise: tuple[float, Any] | None,
    prior: PosePrior | None,
    settings: FitSettings,
    body: BodyModel,
) -> tuple[Solution, np.ndarray]:
    """The solution in NumPy arrays of batch shape (...), and the seen points (..., K)."""
    batch, count = points.shape[:-2], len(located.names)
    weights = np.ones((*batch, count)) if confidence is None else _array("confidence", confidence, (count,))
    if weights.shape != (*batch, count):
        raise ValueError(f"confidence must have shape {(*batch, count)}; found {weights.shape}")
    weights = np.where(np.isfinite(weights), weights, 0)
    if not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(f"confidence must be from 0 to 1; found {weights.min():g} to {weights.max():g}")
    # Numbers that float32 cannot square are no points either.
    seen = (weights > 0) & (np.abs(np.where(np.isfinite(points), points, np.inf)) < 1e6).all(-1) & located.known
    points, weights = np.where(seen[..., None], points, 0), np.where(seen, weights, 0)
    width = located.part.num_betas
    shape = np.zeros((*batch, width))
    if betas is not None:
        known = np.asarray(betas, np.float64)
        if known.ndim == 0 or known.shape[-1] > width or not np.isfinite(known).all():
            raise ValueError(f"betas must be finite numbers of shape (..., n) with n <= {width}; found {known.shape}")
        shape[..., : known.shape[-1]] = _spread("betas", known, batch, known.shape[-1:])
    assumed = np.zeros(batch)
    if noise is not None:
        if not (math.isfinite(noise[0]) and noise[0] > 0):
            raise ValueError(f"noise must be a positive number or None; found {noise[0]!r}")
        assumed = assumed + noise[0] * np.asarray(noise[1])
    people = math.prod(batch)
    flat = Observed(
        points.reshape(people, count, -1),
        weights.reshape(people, count),
        shape.reshape(people, width),
        np.full(people, float(betas is None)),
        assumed.reshape(people),
    )
    prior = load_prior() if prior is None else prior
    solutions = [
        _chunk(located, prior, Observed(*(x[at : at + _CHUNK] for x in flat)), settings)
        for at in range(0, max(people, 1), _CHUNK)
    ]
    joined = Solution(*(np.concatenate(parts) for parts in zip(*solutions)))
    return Solution(*(np.reshape(x, (*batch, *x.shape[1:])) for x in joined)), seen


def _chunk(located: Locations, prior: PosePrior, observed: Observed, settings: FitSettings) -> Solution:
    """Solves some people, padded to a power of two, so that few programs are compiled."""
    people = len(observed.points)
    size = 1 << max(people - 1, 0).bit_length()
    padded = Observed(
        *(jnp.asarray(np.concatenate([x, np.zeros((size - people, *x.shape[1:]))]), jnp.float32) for x in observed)
    )
    return Solution(*(np.asarray(x)[:people] for x in solve(located, prior, padded, settings)))


def _pose(located: Locations, body: BodyModel, solution: Solution, seen: np.ndarray, frame: Frame) -> Pose:
    return Pose(
        solution.rotations,
        frame,
        betas=solution.betas,
        translation=solution.translation,
        measured=(seen[..., None] & _moves(located)).any(-2),
        shape_space=body.shape_space,
    )


def _moves(located: Locations) -> np.ndarray:
    """(K, J) bool: whether a point depends on a joint's rotation."""
    body, weights = located.part, np.asarray(located.weights)
    joints = body.num_joints
    above = np.zeros((joints, joints), bool)  # the joints whose rotation moves this joint
    for joint, parent in enumerate(body.parents):
        if parent >= 0:
            above[joint] = above[parent]
            above[joint, parent] = True
    skin = (np.asarray(body.weights).T > _SKIN) @ (above | np.eye(joints, dtype=bool))
    moved = ((weights[:, :joints] > _SKIN) @ above) | ((weights[:, joints:] > 0) @ skin)
    return moved & (np.arange(joints) < SHARED)


def _fit(
    located: Locations,
    pose: Pose,
    solution: Solution,
    errors: np.ndarray,
    seen: np.ndarray,
    per_metre: np.ndarray,
    unlikely: list[tuple[np.ndarray, str]],
) -> Fit:
    """per_metre: (...) units of `errors` that are a metre at the person. unlikely: more reasons (...) against a fit."""
    near, count = (errors < _FAR * per_metre[..., None]) & seen, seen.sum(-1)
    against = [
        (count < FEWEST, f"fewer than {FEWEST} points were seen"),
        (near.sum(-1) < np.maximum(_SHARE * count, FEWEST), "too many points are far off"),
        *unlikely,
        (~(solution.fall < _SETTLED), "the last step still changed much"),
    ]
    reasons = np.full(count.shape, "")
    for found, text in reversed(against):
        reasons = np.where(found, text, reasons)
    return Fit(
        pose,
        np.asarray(solution.points, np.float32),
        errors.astype(np.float32),
        seen,
        np.asarray(reasons == ""),
        np.asarray(solution.energy),
        np.asarray(solution.noise * per_metre, np.float32),
        reasons,
        located.names,
    )


def _array(name: str, value: ArrayLike, shape: tuple[int | None, ...]) -> np.ndarray:
    array = np.asarray(value, np.float64)
    tail = array.shape[max(array.ndim - len(shape), 0) :]
    if array.ndim < len(shape) or any(n is not None and n != m for n, m in zip(shape, tail)):
        expected = ", ".join(["...", *("D" if n is None else str(n) for n in shape)])
        raise ValueError(f"{name} must have shape ({expected}); found {array.shape}")
    return array


def _spread(name: str, value: ArrayLike, batch: tuple[int, ...], tail: tuple[int, ...]) -> np.ndarray:
    """A value for each of a batch."""
    array = np.asarray(value, np.float64)
    try:
        spread = np.broadcast_to(array, (*batch, *tail))
    except ValueError:
        raise ValueError(
            f"{name} must have a shape that broadcasts to {(*batch, *tail)}; found {array.shape}"
        ) from None
    if not np.isfinite(spread).all():
        raise ValueError(f"{name} must be finite numbers")
    return spread

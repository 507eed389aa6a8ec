"""The terms of ``train.pose_loss``: distances between predicted poses and their targets.

A term is a row of ``TERMS`` with named parts. Each part has an array of errors, and a mask of the errors that count because the target measured
them. The value of a part is the mean of these, over all poses of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.models.heads import head_loss, head_output
from chatpose_jax.train.config import PoseTerm
from smpl_jax import body as bodies
from smpl_jax import io
from smpl_jax.body import BodyModel
from smpl_jax.pose import Pose, known, placed, to_family
from smpl_jax.rotations import geodesic_distance


class LossPart(NamedTuple):
    """A named part of a term.

    error: (predicted, target, body) -> (..., n), differentiable. It must be finite even where ``measured`` is false.
    measured: (target, body) -> (..., n) bool, the errors that count.
    """

    error: Callable[[Pose, Pose, Any], jax.Array]
    measured: Callable[[Pose, Any], jax.Array]


def _entries(predicted: Pose, target: Pose, body: Any) -> jax.Array:
    return jnp.abs(predicted.rotations - target.rotations).mean(axis=(-2, -1))


def _angles(predicted: Pose, target: Pose, body: Any) -> jax.Array:
    return geodesic_distance(predicted.rotations, target.rotations)


def _joints(error: Callable[[Pose, Pose, Any], jax.Array], joints: slice) -> LossPart:
    return LossPart(
        lambda predicted, target, body: error(predicted, target, body)[..., joints],
        lambda target, body: known(target)[..., joints],
    )


def _positions(predicted: Pose, target: Pose, body: BodyModel) -> jax.Array:
    """(..., 23) distances in metres between predicted and true joints, relative to the root; all joints but the root."""
    predicted, target = (to_family(pose, "smpl") for pose in (predicted, target))  # betas of SMPL-X are dropped
    has, betas = _known_betas(target), target.betas
    ours = (
        betas
        if predicted.betas is None or betas is None
        else jnp.where(has[..., None], _as_many(predicted.betas, betas), betas)
    )

    def place(pose: Pose, betas: jax.Array | None) -> jax.Array:
        positions = bodies.joints(body, pose.rotations, betas)
        return positions[..., 1:, :] - positions[..., :1, :]

    square = jnp.sum((place(predicted, ours) - place(target, betas)) ** 2, axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)  # the square root has no gradient at 0


def _placed(target: Pose, body: BodyModel) -> jax.Array:
    measured = to_family(target.replace(measured=known(target)), "smpl").measured
    return placed(measured, body.parents)[..., 1:]  # type: ignore[no-any-return]


def _shape_error(predicted: Pose, target: Pose, body: Any) -> jax.Array:
    return jnp.abs(_as_many(predicted.betas, target.betas) - target.betas)


def _as_many(betas: jax.Array, like: jax.Array) -> jax.Array:
    """Betas truncated or zero-padded to the number of those in ``like``."""
    betas = betas[..., : like.shape[-1]]
    return jnp.pad(betas, [(0, 0)] * (betas.ndim - 1) + [(0, like.shape[-1] - betas.shape[-1])])


def _known_betas(target: Pose) -> jax.Array:
    return jnp.ones(target.shape, bool) if target.has_betas is None else target.has_betas


def _has(name: str) -> Callable[[Pose, Any], jax.Array]:
    def measured(target: Pose, body: Any) -> jax.Array:
        values, has = getattr(target, name), getattr(target, f"has_{name}")
        return jnp.broadcast_to(True if has is None else has[..., None], values.shape)

    return measured


_ROOT, _BODY = slice(0, 1), slice(1, None)
TERMS: dict[PoseTerm, dict[str, LossPart]] = {
    # The paper's: mean |ΔR| over the entries of rotation matrices, of the root and of the other joints.
    "matrices": {"pose_root": _joints(_entries, _ROOT), "pose_body": _joints(_entries, _BODY)},
    # The mean angle in radians.
    "geodesic": {"geodesic_root": _joints(_angles, _ROOT), "geodesic_body": _joints(_angles, _BODY)},
    # The mean distance in metres between joints of SMPL's body, relative to the root. Both bodies have the target's betas; if the target has
    # betas and the head predicts betas, each body has its own. Fingers, jaw and eyes do not count.
    "joints": {"joints": LossPart(_positions, _placed)},
    # Mean |Δβ|.
    "betas": {"betas": LossPart(_shape_error, _has("betas"))},
    # Mean |Δt| of the three coordinates, in metres.
    "translation": {
        "translation": LossPart(
            lambda predicted, target, body: jnp.abs(predicted.translation - target.translation), _has("translation")
        )
    },
}
"""The terms of ``train.pose_loss`` by name."""
_FIELDS = ("betas", "translation")
"""Terms that need a field of the pose, of the same name, that not every head gives."""


@dataclasses.dataclass(frozen=True, eq=False)
class PoseLoss:
    """A ``Distance`` (``models.heads.base``): the weighted terms of ``train.pose_loss``.

    rows: (term, weight).
    """

    rows: tuple[tuple[PoseTerm, float], ...] = (("matrices", 1.0),)
    body: BodyModel | None = dataclasses.field(init=False, default=None)
    """The joints of the default body, without its mesh, if a term needs them: about 1000 numbers."""

    def __post_init__(self) -> None:
        if any(term == "joints" for term, _ in self.rows):
            object.__setattr__(self, "body", io.load_body().subset(np.zeros(0, int)))

    def __call__(
        self, predicted: Pose, target: Pose, mask: jax.Array, scale: dict[str, jax.Array] | None = None
    ) -> dict[str, jax.Array]:
        """The parts of each term by name, times the weight of the term. Each is () float32, and 0 if nothing was measured.

        Args:
            predicted, target: batch shape (B, P), one family and frame.
            mask: (B, P) True where there is a pose.
            scale: ``scale`` of the whole batch, if this is a micro-batch of it. The mean of the results over micro-batches, weighted by their
                numbers of poses, is then the result for the whole batch.
        """
        scale = self.scale(target, mask) if scale is None else scale
        weight = mask.reshape(-1).astype(jnp.float32) / jnp.maximum(mask.sum(), 1)
        values = {}
        for factor, term, name, part in self._parts():
            if term in _FIELDS and getattr(predicted, term) is None:
                raise UserError(f"train.pose_loss: the term {term!r} needs a pose head that gives {term}")
            counts = part.measured(target, self.body) & mask[..., None]
            error = jnp.where(counts, part.error(predicted, target, self.body), 0).mean(axis=-1)
            values[name] = factor * (error.reshape(-1) @ weight) * scale[name]
        return values

    def scale(self, target: Pose, mask: jax.Array) -> dict[str, jax.Array]:
        """For each part: number of all errors / number of measured ones, over the poses that exist. 1 if everything is measured, 0 if nothing is.

        target, mask: any batch shape (...).
        """
        sizes = {name: part.measured(target, self.body).shape[-1] for _, _, name, part in self._parts()}
        return {
            name: jnp.where(found > 0, mask.sum() * sizes[name] / jnp.maximum(found, 1), 0)
            for name, found in self.counts(target, mask).items()
        }

    def counts(self, target: Pose, mask: jax.Array) -> dict[str, jax.Array]:
        """For each part: the number of measured errors, over the poses that exist. target, mask: any batch shape (...)."""
        return {name: (part.measured(target, self.body) & mask[..., None]).sum() for _, _, name, part in self._parts()}

    def _parts(self) -> Sequence[tuple[float, str, str, LossPart]]:
        return [(weight, term, name, part) for term, weight in self.rows for name, part in TERMS[term].items()]


def demand_fields(rows: Sequence[tuple[PoseTerm, float]], head: HeadConfig) -> None:
    """Raises UserError if a term needs a field that the head does not give, or if terms are set for a head whose own loss uses none."""
    given, asked = head_output(head), list[Pose]()
    for term, _ in rows:
        if term in _FIELDS and getattr(given, term) is None:
            raise UserError(
                f"train.pose_loss: the term {term!r} needs a pose head that gives {term}; {head.name!r} does not"
            )

    def distance(predicted: Pose, target: Pose, mask: jax.Array) -> dict[str, jax.Array]:
        asked.append(predicted)
        return {"distance": jnp.zeros(())}

    head_loss(head, distance)
    if not asked and tuple(rows) != PoseLoss().rows:
        raise UserError(
            f"train.pose_loss: the pose head {head.name!r} has its own loss, which uses no terms; leave train.pose_loss at its "
            "default"
        )

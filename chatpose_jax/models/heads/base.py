"""What a pose head is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
from flax import nnx

from chatpose_jax.settings import one_line
from smpl_jax.pose import JOINTS, Pose

Distance = Callable[[Pose, Pose, jax.Array], dict[str, jax.Array]]
"""(predicted, target, mask (B, P)) -> named () float32 scalars, already weighted: the table of ``train.pose_loss``, made by ``train.pose_loss``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class States:
    """Final-norm hidden states that poses are read from: B conversations with up to P pose tokens each.

    token: (B, P, D) float32, the state that predicts each pose token.
    conversation: (B, T, D), the states of all tokens, pictures' included, for heads with ``reads = "conversation"``; else None.
    before: (B, P, T) bool, which of them each pose may see: those of its own conversation up to ``token``'s, that one included. None
        where ``conversation`` is.
    """

    token: jax.Array
    conversation: jax.Array | None = None
    before: jax.Array | None = None

    __repr__ = one_line


class PoseHead(nnx.Module):
    """Gives the pose of each pose token, and says how it is trained.

    A subclass takes ``(width, *, rngs, **options)``, its options keyword-only, and implements ``__call__``; the rest may be replaced.

    reads: "token", the state that predicts the token; or "conversation", all states up to it as well.
    draws: whether several samples of one answer differ.
    num_joints: rotations that come out, of one of ``smpl_jax.pose.JOINTS``.
    """

    reads: ClassVar[Literal["token", "conversation"]] = "token"
    draws: ClassVar[bool] = False
    num_joints: int = JOINTS["smpl"]

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, states: States, key: jax.Array) -> Pose:
        """One pose for each pose token.

        Returns:
            A ``Pose`` of batch shape (B, P) in the camera frame, float32: rotations (B, P, num_joints, 3, 3) at least; betas, translation
            where the head gives them.
        """
        raise NotImplementedError

    def sample(self, states: States, key: jax.Array, count: int) -> Pose:
        """``count`` poses for each pose token, of batch shape (count, B, P)."""
        return jax.vmap(lambda key: self(states, key))(jax.random.split(key, count))

    def loss(
        self, states: States, target: Pose, mask: jax.Array, key: jax.Array, distance: Distance
    ) -> dict[str, jax.Array]:
        """By default ``distance`` between what ``__call__`` gives and the target.

        Args:
            target: batch shape (B, P), ``num_joints`` joints, camera frame; ``target.measured`` (B, P, J) says which joints count.
            mask: (B, P) True where there is a pose.

        Returns:
            Named float32 scalars; their sum is what λ_θ multiplies. Without any pose all are 0.
        """
        return distance(self(states, key), target, mask)

"""The interface of pose heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
from flax import nnx

from chatpose_jax.settings import one_line
from smpl_jax.pose import JOINTS, Pose

Distance = Callable[[Pose, Pose, jax.Array], dict[str, jax.Array]]
"""(predicted, target, mask (B, P)) -> named () float32 scalars, already weighted. ``train.pose_loss.PoseLoss`` makes one from the setting
``train.pose_loss``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class States:
    """Final-norm hidden states that a pose head reads: B conversations with up to P pose tokens each.

    token: (B, P, D) float32, the state that predicts each pose token.
    conversation: (B, T, D), the states of all tokens, including image tokens, for heads with ``reads = "conversation"``; otherwise None.
    before: (B, P, T) bool, which of these states each pose may attend to: those of its own conversation, up to and including ``token``. None
        if ``conversation`` is None.
    """

    token: jax.Array
    conversation: jax.Array | None = None
    before: jax.Array | None = None

    __repr__ = one_line


class PoseHead(nnx.Module):
    """Computes the pose of each pose token, and defines its training loss.

    The constructor of a subclass takes ``(width, *, rngs, **options)``, with keyword-only options. A subclass implements ``__call__``
    and may override the other methods.

    reads: "token" for the state that predicts the token; "conversation" for all states up to it as well.
    draws: whether samples of the same answer differ.
    num_joints: number of rotations; one of the values of ``smpl_jax.pose.JOINTS``.
    """

    reads: ClassVar[Literal["token", "conversation"]] = "token"
    draws: ClassVar[bool] = False
    num_joints: int = JOINTS["smpl"]

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, states: States, key: jax.Array) -> Pose:
        """One pose for each pose token.

        Returns:
            A float32 ``Pose`` of batch shape (B, P) in the camera frame: rotations (B, P, num_joints, 3, 3), and optionally betas and
            translation.
        """
        raise NotImplementedError

    def sample(self, states: States, key: jax.Array, count: int) -> Pose:
        """``count`` poses for each pose token, of batch shape (count, B, P)."""
        return jax.vmap(lambda key: self(states, key))(jax.random.split(key, count))

    def loss(
        self, states: States, target: Pose, mask: jax.Array, key: jax.Array, distance: Distance
    ) -> dict[str, jax.Array]:
        """The training loss: by default the ``distance`` between the output of ``__call__`` and the target.

        Args:
            target: batch shape (B, P), ``num_joints`` joints, camera frame. ``target.measured`` (B, P, J) says which joints count.
            mask: (B, P), True where there is a pose.

        Returns:
            Named float32 scalars. Their sum is multiplied by λ_θ. All are 0 if there is no pose.
        """
        return distance(self(states, key), target, mask)

    def counts(self, target: Pose, mask: jax.Array) -> dict[str, jax.Array]:
        """For the parts of ``loss`` that are means over anything but the poses and that are not the ``distance``'s: the number of values in the
        mean, by name of the part. They weigh such a part over several micro-batches or validation batches.

        target, mask: as in ``loss``.
        """
        return {}

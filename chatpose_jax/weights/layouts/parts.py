"""Name tables of parts that are no family of their own. Each takes the names of the part's linears."""

from __future__ import annotations

from chatpose_jax.weights.table import Ignored, NameRule, linear


def projector(first: str, second: str) -> tuple[NameRule, ...]:
    """The two linears between vision tower and decoder."""
    return (*linear(first, "projector/fc1"), *linear(second, "projector/fc2"))


def pose_head(first: str, second: str) -> tuple[NameRule, ...]:
    """The two linears of the pose head ``mlp``."""
    return (*linear(first, "pose_head/fc1"), *linear(second, "pose_head/fc2"))


# Buffers that older releases stored; both are computed.
BUFFERS = (
    Ignored(r".*rotary_emb\.inv_freq", "computed from rope_theta"),
    Ignored(r".*embeddings\.position_ids", "a constant range"),
)

"""The paper's loss: λ_t · cross-entropy over answers + λ_θ · L1 on rotation matrices (Feng et al. 2024, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from chatpose_jax.models.chatpose import ChatPoseModel

CHUNK = 256


def cross_entropy(model: ChatPoseModel, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean next-token cross-entropy and accuracy over the positions whose label is not −100.

    Logits are made and remade a chunk of positions at a time, so (B, T, V) never exists.

    Args:
        hidden: (B, T, D); position t predicts ``labels[:, t + 1]``.
        labels: (B, T) int32.

    Returns:
        Two () float32: cross-entropy in nats, and the share of tokens that greedy decoding would get right.
    """
    batch, length, width = hidden.shape
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    chunks = -(-length // CHUNK)
    padding = chunks * CHUNK - length if chunks > 1 else 0
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=-100)
    size = (length + padding) // chunks

    @jax.checkpoint
    def chunk(
        totals: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        states, target = part
        logits = model.logits(states)
        chosen = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
        counts = target >= 0
        nll = jnp.where(counts, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
        right = counts & (jnp.argmax(logits, axis=-1) == target)
        return (totals[0] + nll.sum(), totals[1] + right.sum(dtype=jnp.float32)), None

    parts = (
        hidden.reshape(batch, chunks, size, width).swapaxes(0, 1),
        targets.reshape(batch, chunks, size).swapaxes(0, 1),
    )
    (nll, right), _ = jax.lax.scan(chunk, (jnp.float32(0), jnp.float32(0)), parts)
    count = jnp.maximum((targets >= 0).sum(), 1)
    return nll / count, right / count


def loss(
    model: ChatPoseModel,
    batch: Mapping[str, jax.Array],
    *,
    lambda_text: float,
    lambda_pose: float,
    dropout_key: jax.Array | None = None,
    remat: str = "none",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total loss of a batch (``docs/architecture.md`` names its arrays) and every part of it, unweighted."""
    hidden = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch.get("pixel_values"),
        dropout_key=dropout_key,
        remat=remat,
    ).hidden
    text, accuracy = cross_entropy(model, hidden, batch["labels"])
    states = jnp.take_along_axis(hidden, batch["pose_index"][..., None], axis=1)
    targets = batch["pose_targets"]
    pose = model.pose_head.loss(
        states.reshape(-1, states.shape[-1]).astype(jnp.float32),
        targets.reshape(-1, *targets.shape[2:]),
        batch["pose_mask"].reshape(-1),
    )
    total = lambda_text * text + lambda_pose * sum(pose.values())
    return total, {"loss": total, "text": text, "token_accuracy": accuracy, **pose}

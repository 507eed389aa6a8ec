"""The paper's loss: λ_t · cross-entropy over answers + λ_θ · L1 on rotation matrices (Feng et al. 2024, section 3.3)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from chatpose_jax.models.chatpose import ChatPoseModel
from chatpose_jax.models.heads.base import Distance, PoseHead
from chatpose_jax.models.layers import matmul, product
from chatpose_jax.models.sharding import constrain, gather_weight, platform
from chatpose_jax.settings import one_line
from chatpose_jax.train.pose_loss import PoseLoss

CHUNK = 256
"""Positions of each row for which logits are computed at a time. Each chunk reads the vocabulary's weights, and adds to their gradient if they
train: GPUs and TPUs need large chunks."""
CPU_CHUNK = 16
"""The same on CPU for a frozen vocabulary. Chunks without labels are skipped, so small chunks compute little that does not count."""
LOGICAL = {"i": "embed", "o": "vocabulary"}
"""Logical axes of the LM head's weights, by their letters in ``Decoder.output_axes``."""
IGNORED = -100
PAPER_LOSS = PoseLoss()
"""The paper's pose loss: the mean |ΔR| of the root and of the other joints."""


def targets(labels: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """(B, T) labels -> (B, T) the label that each position predicts: that of the next position in the same conversation, else −100."""
    shifted = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    if segment_ids is None:
        return shifted
    return jnp.where(segment_ids == jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1))), shifted, IGNORED)


def cross_entropy(
    model: ChatPoseModel, hidden: jax.Array, labels: jax.Array, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean next-token cross-entropy and accuracy over the positions whose label is not −100.

    Logits, and their gradient if it is needed, are computed for one chunk of positions at a time, those with a label first; chunks without any are
    skipped. So for rows longer than a chunk no array of shape (B, T, V) ever exists, and nothing is computed twice. The vocabulary may be split
    over a mesh.

    Args:
        hidden: (B, T, D); position t predicts ``labels[:, t + 1]``.
        labels: (B, T) int32.
        segment_ids: (B, T) int32, for packed rows: the last token of a conversation does not predict the first token of the next.

    Returns:
        Two () float32: cross-entropy in nats, and the fraction of tokens that greedy decoding would predict correctly.
    """
    axes = model.decoder.output_axes
    kernel, added = model.decoder.output_weights()
    kernel = gather_weight(kernel, *(LOGICAL[axis] for axis in axes))  # gathered once, not for every chunk
    predicted = targets(labels, segment_ids)
    nll, right = _total(axes, hidden.astype(model.decoder.dtype), kernel, added, predicted)
    count = jnp.maximum((predicted >= 0).sum(), 1)
    return nll / count, right / count


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    axes: str, hidden: jax.Array, kernel: jax.Array, added: jax.Array, predicted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums over all positions of −log p(predicted) and of correct predictions.

    kernel: (D, V) for the axes "io", (V, D) for "oi". added: likewise with n rows or columns, the tokens from V on.
    """
    return _scan(axes, hidden, kernel, added, predicted, (False, False, False))[0]


def _forward(axes: str, *arguments: Any) -> tuple[Any, Any]:
    hidden, kernel, added, predicted = (argument.value for argument in arguments)
    wanted = tuple(argument.perturbed for argument in arguments[:3])
    totals, gradients = _scan(axes, hidden, kernel, added, predicted, wanted)
    kept = [jnp.zeros((), x.dtype) for x in (hidden, kernel, added)]  # the dtypes of the gradients
    return totals, (gradients, kept)


def _backward(axes: str, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    gradients, kept = residuals
    scale = cotangents[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    scaled = (None if x is None else (scale * x).astype(like.dtype) for x, like in zip(gradients, kept))
    return *scaled, None


_total.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan(
    axes: str,
    hidden: jax.Array,
    kernel: jax.Array,
    added: jax.Array,
    predicted: jax.Array,
    wanted: tuple[bool, bool, bool],
) -> tuple[tuple[jax.Array, jax.Array], list[jax.Array | None]]:
    """The sums of ``_total``, and the gradients of the first sum with respect to hidden, kernel and added, if ``wanted``."""
    batch, length, width = hidden.shape
    words, dtype = axes.index("o"), hidden.dtype  # the axis of the vocabulary
    letters = axes.translate(str.maketrans("io", "dv"))
    chunks = -(-length // (CHUNK if wanted[1] or platform() != "cpu" else min(CHUNK, CPU_CHUNK)))
    size = -(-length // chunks)
    padding = chunks * size - length
    order = jnp.argsort(predicted < 0, axis=1, stable=True)  # positions with a label come first
    hidden, predicted = jnp.take_along_axis(hidden, order[..., None], 1), jnp.take_along_axis(predicted, order, 1)
    longest = (predicted >= 0).sum(axis=1).max()
    states = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, chunks, size, width).swapaxes(0, 1)
    ids = jnp.pad(predicted, ((0, 0), (0, padding)), constant_values=IGNORED).reshape(batch, chunks, size)
    # The two parts of the vocabulary and their first ids. Two matmuls, because concatenated weights could not be split over a mesh.
    parts = [(kernel.astype(dtype), 0)]
    if added.shape[words]:
        parts.append((added.astype(dtype), kernel.shape[words]))

    def chunk(totals: Any, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array | None]:
        start, *rest = part
        return jax.lax.cond(start < longest, compute, skip, totals, *rest)

    def skip(totals: Any, x: jax.Array, target: jax.Array) -> tuple[Any, jax.Array | None]:
        return totals, jnp.zeros_like(x) if wanted[0] else None

    def compute(totals: Any, x: jax.Array, target: jax.Array) -> tuple[Any, jax.Array | None]:
        scores = [matmul(x, weight, axes).astype(jnp.float32) for weight, _ in parts]
        hits = [target[..., None] == first + jnp.arange(s.shape[-1]) for s, (_, first) in zip(scores, parts)]
        largest = _join(jnp.maximum, [s.max(axis=-1) for s in scores])
        powers = [jnp.exp(s - largest[..., None]) for s in scores]
        partition = _join(jnp.add, [p.sum(axis=-1) for p in powers])
        chosen = _join(jnp.add, [jnp.where(hit, s, 0).sum(axis=-1) for hit, s in zip(hits, scores)])
        counts = target >= 0
        nll = jnp.where(counts, largest + jnp.log(partition) - chosen, 0)
        # Among equal scores the first one wins, as in argmax.
        earlier = [
            (s == largest[..., None]) & (first + jnp.arange(s.shape[-1]) < target[..., None])
            for s, (_, first) in zip(scores, parts)
        ]
        right = counts & (chosen == largest) & ~_join(jnp.logical_or, [e.any(axis=-1) for e in earlier])
        slopes = [
            (jnp.where(counts[..., None], p / partition[..., None] - hit, 0)).astype(dtype)
            for p, hit in zip(powers, hits)
        ]
        dx = None
        if wanted[0]:
            dx = _join(jnp.add, [product(f"btv,{letters}->btd", d, weight) for d, (weight, _) in zip(slopes, parts)])
        dweights = [
            None if total is None else total + product(f"btd,btv->{letters}", x, d).astype(jnp.float32)
            for total, d in zip(totals[2], slopes)
        ]
        return (totals[0] + nll.sum(), totals[1] + right.sum(dtype=jnp.float32), dweights), dx

    weights = [jnp.zeros(w.shape, jnp.float32) if want else None for want, (w, _) in zip(wanted[1:], parts)]
    zero = (jnp.float32(0), jnp.float32(0), weights)
    (nll, right, dweights), dx = jax.lax.scan(chunk, zero, (jnp.arange(chunks) * size, states, ids.swapaxes(0, 1)))
    if dx is not None:
        dx = dx.swapaxes(0, 1).reshape(batch, length + padding, width)
        dx = jnp.take_along_axis(dx, jnp.argsort(order, axis=1)[..., None], axis=1)
    if len(parts) == 1:
        dweights.append(jnp.zeros(added.shape, jnp.float32) if wanted[2] else None)
    return (nll, right), [dx, *dweights]


def _join(function: Any, parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else function(*parts)


def final_states(
    model: ChatPoseModel, batch: Mapping[str, Any], *, dropout_key: jax.Array | None = None, remat: str = "none"
) -> jax.Array:
    """(B, T, D) final-norm states of a batch (``docs/architecture.md`` lists its arrays): one forward pass of the model, or of its last layers
    after kept states (``train.kept``).
    """
    # Rows are padded on the right, so with the causal mask no token attends to padding. No other mask is needed.
    return model(
        batch["input_ids"],
        segment_ids=batch.get("segment_ids"),
        pixel_values=batch.get("pixel_values"),
        led=batch.get("led"),
        dropout_key=dropout_key,
        remat=remat,
    ).hidden


def loss(
    model: ChatPoseModel,
    hidden: jax.Array,
    batch: Mapping[str, Any],
    *,
    lambda_text: float,
    lambda_pose: float,
    distance: Distance = PAPER_LOSS,
    weights: Counts | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total loss of a batch, and each of its parts without λ.

    hidden: ``final_states`` of the batch.
    distance: the distance between poses, for the pose head's loss (``train.pose_loss``).
    weights: for a micro-batch, its shares of the ``counts`` of the whole batch; each part is multiplied by its own.
    key: random key for the pose head's loss. None is the same key for all batches, for validation.
    """
    segments = batch.get("segment_ids")
    text, accuracy = cross_entropy(model, hidden, batch["labels"], segments)
    hidden = constrain(hidden, "batch", None, None)
    pose = model.pose_head.loss(
        model.states(hidden, batch["pose_index"], segments),
        batch["poses"],
        batch["pose_mask"],
        jax.random.key(0) if key is None else key,
        distance,
    )
    parts = {"text": text, "token_accuracy": accuracy, **pose}
    if weights is not None:
        parts = {name: weights.of(name) * value for name, value in parts.items()}
    total = weighted(parts, lambda_text, lambda_pose)
    return total, {"loss": total, **parts}


def weighted(parts: Mapping[str, Any], lambda_text: float, lambda_pose: float) -> Any:
    """λ_t · text + λ_θ · the sum of all parts of the pose head. A part that is missing counts 0."""
    return lambda_text * parts.get("text", 0.0) + lambda_pose * sum(
        value for name, value in parts.items() if name not in _TEXT
    )


class Counts(NamedTuple):
    """The number of values in the mean that each part of a loss is: tokens for the text; ``parts`` by name, and poses for all others."""

    tokens: Any
    poses: Any
    parts: dict[str, Any]

    def __repr__(self) -> str:
        return one_line(self)

    def of(self, name: str) -> Any:
        """That of the part ``name``."""
        return self.tokens if name in _TEXT else self.parts.get(name, self.poses)


_TEXT = ("text", "token_accuracy")


def counts(head: PoseHead, batch: Mapping[str, Any]) -> Counts:
    """The counts of a batch, with the parts of the head's own loss."""
    target, mask = batch["poses"], batch["pose_mask"]
    tokens = (targets(batch["labels"], batch.get("segment_ids")) >= 0).sum()
    return Counts(tokens, mask.sum(), head.counts(target, mask))

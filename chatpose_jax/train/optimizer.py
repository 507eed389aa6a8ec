"""The optimiser: AdamW or Muon, gradient clipping, learning-rate schedule, and the multipliers of ``train.trainable``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax import contrib

from chatpose_jax.train import trainable as table
from chatpose_jax.train.config import TrainConfig

STACKED = re.compile(r"(vision|decoder)/layers/.*kernel")
UNSTACKED = re.compile(r"(vision/patch_embed|projector|pose_head)/.*kernel")
MUON_RMS = 0.2
NEWTON_SCHULZ = 3
"""Newton-Schulz iterations; AOL preconditioning saves one (Boissin et al. 2025, "Turbo-Muon"). Each takes noticeable time in small models."""


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then linear or cosine decay to ``final_lr_ratio``; a function of the update count."""
    warmup = min(config.warmup_steps, config.steps)
    peak, rest = config.learning_rate, max(config.steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=config.final_lr_ratio)
    else:
        decay = optax.linear_schedule(peak, peak * config.final_lr_ratio, rest)
    return optax.join_schedules([lambda count: peak * (count + 1) / max(warmup, 1), decay], [warmup])


def optimizer(config: TrainConfig, params: Mapping[str, Any]) -> optax.GradientTransformation:
    """Clipping by global norm, AdamW or Muon, and the multipliers of ``train.trainable``, for arrays by path. ``params`` may be abstract."""
    rows = table.assign(params, config.trainable)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    scale = adam
    if config.optimizer == "muon":
        shapes = table.flatten(params)
        labels = {
            path: "muon" if is_matrix(path, len(shapes[path].shape)) else "adam"
            for path, row in rows.items()
            if row.lr is not None
        }
        scale = optax.partition({"muon": scale_by_muon(), "adam": adam}, labels)
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip), scale, table.scale_by_rows(rows, learning_rate(config))
    )


def is_matrix(path: str, rank: int) -> bool:
    """Whether Muon trains an array. It trains the kernels of layers, patch embedding, projector and pose head; but not those of the vocabulary, nor
    convolutions of a pose head.
    """
    return bool(STACKED.fullmatch(path) or (rank == 2 and UNSTACKED.fullmatch(path)))


def scale_by_muon() -> optax.GradientTransformation:
    """Orthogonalised momentum for (…, in, out) matrices (Jordan et al. 2024); stacked layers are separate matrices. Updates are scaled to an RMS of
    0.2, like those of Adam (Liu et al. 2025, "Muon is scalable for LLM training"), so that both can share a learning rate.
    """

    def dimensions(params: Any) -> Any:
        return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)

    def rms(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u: u * (MUON_RMS * max(u.shape[-2:]) ** 0.5), updates)

    return optax.chain(
        # Muon does not depend on the scale of gradients, except for an epsilon. Without this factor, gradients of large models fall below it.
        optax.scale(1e6),
        contrib.scale_by_muon(ns_steps=NEWTON_SCHULZ, preconditioning="aol", weight_dimension_numbers=dimensions),
        optax.stateless(rms),
    )

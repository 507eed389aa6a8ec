"""Training settings, as plain frozen data."""

from __future__ import annotations

import dataclasses

from chatpose_jax.errors import UserError
from chatpose_jax.train.trainable import PAPER, Rule


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a run trains. The defaults are the paper's recipe (Feng et al. 2024; learning rate as in ChatGarment).

    trainable: rows of (path pattern, learning-rate multiplier or None for frozen, weight decay); see ``train.trainable``.
    lambda_text, lambda_pose: weights of the cross-entropy over answers and of the L1 on rotation matrices.
    optimizer: "adamw", or "muon" for the hidden matrices and AdamW for the rest: learns faster from nothing.
    schedule: "linear" or "cosine" decay to ``final_lr_ratio`` after a linear warm-up.
    accumulate: micro-batches whose gradients are averaged before one update.
    """

    steps: int = 15_000
    batch_size: int = 16
    accumulate: int = 2
    max_length: int = 1024
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: str = "linear"
    final_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    grad_clip: float = 1.0
    lambda_text: float = 1.0
    lambda_pose: float = 0.1
    trainable: tuple[Rule, ...] = PAPER
    remat: bool = True
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 0
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "max_length", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, found {getattr(self, name)}")
        if self.optimizer not in ("adamw", "muon"):
            raise UserError(f"train.optimizer must be 'adamw' or 'muon', found {self.optimizer!r}")
        if self.schedule not in ("linear", "cosine"):
            raise UserError(f"train.schedule must be 'linear' or 'cosine', found {self.schedule!r}")

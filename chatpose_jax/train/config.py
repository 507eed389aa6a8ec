"""Training settings, as plain frozen data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from chatpose_jax import named
from chatpose_jax.errors import UserError
from chatpose_jax.settings import check_types, one_line, require
from chatpose_jax.train.trainable import PAPER, Rule


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices stand along each axis of the mesh; -1, on one axis at most, takes those that are left.

    data: whole copies of the model, each with rows of its own.
    fsdp: the model's arrays are split over these devices and gathered layer by layer; rows are split as over ``data``.
    tensor: every product is split over these devices.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_types(self, "train.mesh")
        require(self, "train.mesh", "-1 or at least 1", lambda size: size == -1 or size >= 1, "data", "fsdp", "tensor")
        if (self.data, self.fsdp, self.tensor).count(-1) > 1:
            raise UserError(f"train.mesh: one axis at most can take the devices that are left, found {self}")


PoseTerm = Literal["matrices", "geodesic", "joints", "betas", "translation"]
"""What the pose loss may be made of: a row of ``train.pose_loss.TERMS`` each."""


class EvaluatorRow(NamedTuple):
    """One evaluator.

    name: an entry of ``train.evaluators.EVALUATORS``, or ``package.module:function`` of one's own.
    options: its keyword arguments, which are checked against its signature.
    """

    name: str
    options: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        return one_line(self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a run trains. The defaults are the paper's recipe (Feng et al. 2024; learning rate as in ChatGarment) on
    whatever data is named: they neither choose its data nor fit a model that starts from nothing.

    steps: updates in all. batch_size: rows of a micro-batch, over all devices.
    accumulate: micro-batches whose gradients are averaged before one update.
    max_length: tokens of a row, pictures included; what is longer is cut.
    optimizer: "adamw", or "muon" for all kernels but the vocabulary's and AdamW for the rest: learns faster from nothing.
    learning_rate: the peak, reached after ``warmup_steps`` updates of linear rise.
    schedule: "linear" or "cosine" decay from there to ``final_lr_ratio`` × the peak at the last step.
    b1, b2: decay of Adam's first and second moments.
    grad_clip: longest gradient, as the norm over all that trains; longer ones are scaled down.
    lambda_text, lambda_pose: weights of the cross-entropy over answers and of the pose loss.
    pose_loss: rows of (term, weight) that the pose loss is the sum of, see ``train.pose_loss``; by default the paper's L1 on rotation
        matrices. A pose head with a loss of its own takes none.
    trainable: rows of (path pattern, learning-rate multiplier or None for frozen, weight decay, which added tokens); see ``train.trainable``.
    mesh: how devices are arranged; ``batch_size`` is a multiple of data × fsdp.
    remat: what of a layer is kept for the backward pass, the rest being computed again ("none" computes nothing again,
        "full" everything); see ``models.remat``.
    max_skipped: updates in a row that may be dropped because loss or gradient is not finite, before the run stops.
    seed: of fresh weights, the order of rows, and dropout.
    log_every, save_every: updates between two lines of metrics, two checkpoints.
    eval_every: updates between two runs of the evaluators; 0 is none.
    evaluators: rows of (name, options), see ``EvaluatorRow``; the options may be left out. A name alone is one row.
    keep: newest checkpoints that stay.
    best: the checkpoint with the least of this value stays too: ``val_{best}`` of ``metrics.jsonl``, or the mean of ``val_{kind}_{best}`` over
        the kinds of held-out rows. "" keeps none for it.
    result: which of them becomes the model folder at the end, "last" or "best".
    wandb: project of Weights & Biases to log to as well, if that is installed; "" is none.
    """

    steps: int = 15_000
    batch_size: int = 16
    accumulate: int = 2
    max_length: int = 1024
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: Literal["linear", "cosine"] = "linear"
    final_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    grad_clip: float = 1.0
    lambda_text: float = 1.0
    lambda_pose: float = 0.1
    pose_loss: tuple[tuple[PoseTerm, float], ...] = (("matrices", 1.0),)
    trainable: tuple[Rule, ...] = PAPER
    mesh: MeshConfig = MeshConfig()
    remat: Literal["none", "dots", "save_qkv", "save_attention", "full"] = "full"
    max_skipped: int = 10
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 0
    evaluators: tuple[EvaluatorRow, ...] = (EvaluatorRow("validation"),)
    keep: int = 3
    best: str = "pa_mpjpe"
    result: Literal["last", "best"] = "last"
    wandb: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluators", named.rows("train.evaluators", self.evaluators, EvaluatorRow))
        check_types(self, "train")
        counts = ("steps", "batch_size", "accumulate", "max_skipped", "log_every", "save_every", "keep")
        require(self, "train", "at least 1", lambda value: value >= 1, *counts)
        # The system prompt and the shortest question with its answer.
        require(self, "train", "at least 64", lambda value: value >= 64, "max_length")
        weights = ("warmup_steps", "eval_every", "lambda_text", "lambda_pose")
        require(self, "train", "at least 0", lambda value: value >= 0, *weights)
        require(self, "train", "positive", lambda value: value > 0, "learning_rate", "grad_clip")
        require(self, "train", "at least 0 and less than 1", lambda value: 0 <= value < 1, "b1", "b2")
        require(self, "train", "at least 0 and at most 1", lambda value: 0 <= value <= 1, "final_lr_ratio")
        require(self, "train", "at least 0 and less than 2**32", lambda value: 0 <= value < 2**32, "seed")
        terms = [term for term, _ in self.pose_loss]
        if not terms or len(set(terms)) < len(terms) or any(weight <= 0 for _, weight in self.pose_loss):
            raise UserError(
                f"train.pose_loss: expected at least one row, a term at most once, weights that are positive; found {self.pose_loss}"
            )
        for row in self.trainable:
            if (row.lr or 0) < 0 or row.weight_decay < 0:
                raise UserError(f"train.trainable: the row {tuple(row)} has a negative rate or decay")
            if row.tokens not in ("all", "pose"):
                raise UserError(f"train.trainable: the row {tuple(row)} must say 'all' or 'pose' of tokens")

"""Training settings: frozen dataclasses."""

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
    """Number of devices of a slice along each axis of the mesh; -1, for at most one axis, takes all remaining devices.

    data: copies of the whole model, each with its own rows.
    fsdp: the model's arrays are split over these devices and all-gathered layer by layer. Rows are split as over ``data``.
    tensor: every matmul is split over these devices.
    slices: number of slices, which a slower network connects: each holds the whole model and has its own rows. -1 takes what TPUs say, and one
        elsewhere.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = -1

    def __post_init__(self) -> None:
        check_types(self, "train.mesh")
        sizes = ("data", "fsdp", "tensor", "slices")
        require(self, "train.mesh", "-1 or at least 1", lambda size: size == -1 or size >= 1, *sizes)
        if (self.data, self.fsdp, self.tensor).count(-1) > 1:
            raise UserError(f"train.mesh: at most one of data, fsdp and tensor may be -1, found {self}")


@dataclasses.dataclass(frozen=True)
class HeadStart:
    """The pose head's time alone before the run (``train.head_start``).

    batches: micro-batches whose states are computed once, and stay in the devices' memory. steps: updates of the head alone; 0 for no head start.
    rate: multiplies the head's rate.
    """

    batches: int = 100
    steps: int = 0
    rate: float = 1.0

    def __post_init__(self) -> None:
        check_types(self, "train.head_start")
        require(self, "train.head_start", "at least 1", lambda value: value >= 1, "batches")
        require(self, "train.head_start", "at least 0", lambda value: value >= 0, "steps")
        require(self, "train.head_start", "positive", lambda value: value > 0, "rate")


Layers = Literal["auto", "scanned", "unrolled"]
"""See ``TrainConfig.layers``."""

PoseTerm = Literal["matrices", "geodesic", "joints", "betas", "translation"]
"""Names of the terms of the pose loss: the keys of ``train.pose_loss.TERMS``."""


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
    """How a run trains. The defaults are the paper's recipe (Feng et al. 2024; learning rate as in ChatGarment). They do not choose the data, and
    they do not suit a model without pretrained weights.

    steps: total number of updates. batch_size: rows of a micro-batch, over all devices.
    accumulate: micro-batches whose gradients are averaged before one update.
    max_length: tokens of a row, including images; longer rows are truncated.
    optimizer: "adamw"; or "muon", which uses Muon for all kernels except the vocabulary's, and AdamW for the rest. Muon learns faster from scratch.
    learning_rate: the peak, reached after a linear warm-up of ``warmup_steps`` updates.
    schedule: "linear" or "cosine" decay from the peak to ``final_lr_ratio`` × the peak at the last step.
    b1, b2: decay of Adam's first and second moments.
    grad_clip: largest global norm of the gradient; larger gradients are scaled down.
    lambda_text, lambda_pose: weights of the cross-entropy over answers and of the pose loss.
    pose_loss: rows of (term, weight); the pose loss is their weighted sum, see ``train.pose_loss``. The default is the paper's L1 on rotation
        matrices. For a pose head with its own loss, only the default is allowed.
    trainable: rows of (path pattern, learning-rate multiplier or None for frozen, weight decay, which added tokens); see ``train.trainable``.
    mesh: the device mesh; ``batch_size`` must be a multiple of slices × data × fsdp.
    layers: "unrolled" lays layers out one after another, which is faster on CPU; "scanned" compiles one layer and loops over it, which compiles in
        the time of one; "auto" is unrolled on CPU and scanned elsewhere. Results are the same, and so are checkpoints: a run may resume in the other.
    keep_states_mib: host memory for the states after the layers before the first with adapters (``model.lora.last_layers``), which are then computed
        once for each conversation. Where something before those layers trains, or the memory does not suffice, they are not kept; 0 keeps none.
    dtype: the dtype that the run computes in. "auto" is that of the model (``model.dtype``), but float32 instead of bfloat16 on a CPU that cannot
        multiply bfloat16 numbers. The base is stored, in memory and in the model folder, in ``model.param_dtype``; the folder says ``model.dtype``.
    remat: which activations of a layer are saved for the backward pass; it recomputes the others ("none" recomputes nothing,
        "full" everything). See ``models.remat``.
    head_start: lets the pose head learn alone first, see ``HeadStart`` and ``train.head_start``.
    max_skipped: how many updates in a row may be dropped because loss or gradient is not finite, before the run stops.
    seed: seed of fresh weights, the order of rows, and dropout.
    log_every, save_every: updates between two lines of metrics, or two checkpoints.
    eval_every: updates between two runs of the evaluators; 0 turns evaluation off.
    evaluators: rows of (name, options), see ``EvaluatorRow``; the options may be omitted. A single name is one row.
    keep: number of newest checkpoints to keep.
    best: also keeps the checkpoint with the smallest value of ``val_{best}`` in ``metrics.jsonl``, or of the mean of ``val_{kind}_{best}`` over
        the kinds of held-out rows. "" keeps none.
    result: the checkpoint that becomes the model folder at the end, "last" or "best".
    wandb: project of Weights & Biases to log to as well, if it is installed; "" for none.
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
    layers: Layers = "auto"
    keep_states_mib: int = 2048
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    remat: Literal["none", "dots", "save_qkv", "save_attention", "full"] = "full"
    head_start: HeadStart = HeadStart()
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
        # Room for the system prompt and the shortest question with its answer.
        require(self, "train", "at least 64", lambda value: value >= 64, "max_length")
        weights = ("keep_states_mib", "warmup_steps", "eval_every", "lambda_text", "lambda_pose")
        require(self, "train", "at least 0", lambda value: value >= 0, *weights)
        require(self, "train", "positive", lambda value: value > 0, "learning_rate", "grad_clip")
        require(self, "train", "at least 0 and less than 1", lambda value: 0 <= value < 1, "b1", "b2")
        require(self, "train", "at least 0 and at most 1", lambda value: 0 <= value <= 1, "final_lr_ratio")
        require(self, "train", "at least 0 and less than 2**32", lambda value: 0 <= value < 2**32, "seed")
        terms = [term for term, _ in self.pose_loss]
        if not terms or len(set(terms)) < len(terms) or any(weight <= 0 for _, weight in self.pose_loss):
            raise UserError(
                f"train.pose_loss: expected at least one row, each term at most once, and positive weights; found {self.pose_loss}"
            )
        for row in self.trainable:
            if (row.lr or 0) < 0 or row.weight_decay < 0:
                raise UserError(f"train.trainable: the row {tuple(row)} has a negative rate or decay")
            if row.tokens not in ("all", "pose"):
                raise UserError(f"train.trainable: the tokens of the row {tuple(row)} must be 'all' or 'pose'")

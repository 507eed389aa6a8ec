"""Operations and memory traffic of a step, computed from shapes. (The compiler's own count includes the body of the loop over layers only once.)"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.quantize import nbytes
from chatpose_jax.models.remat import POLICIES
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.trainable import assign, flatten, trains_before_adapters

_MATRIX = re.compile(r".*/(kernel|lora_[ab])|decoder/lm_head/added")
_TIED = re.compile(r"decoder/embed_tokens/(embedding|added)")
_LAYER = "decoder/layers/"
_QKV = re.compile(r".*/(q_proj|k_proj|v_proj)/.*")


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of one step, summed over all chips.

    useful: floating-point operations that the step needs: the forward pass, the gradients of activations where they are needed, and the
        gradients of weights that train. With LoRA about 4 for each decoder parameter and token, plus attention.
    six_n: 6 operations for each decoder parameter and token, plus attention: the usual count for full training, for comparison.
    hardware: operations that are executed: ``useful`` plus recomputation by remat.
    weights: bytes of decoder weights that one pass reads. passes: number of passes.
    activations: bytes of inputs and outputs of all matmuls, in all passes. optimizer: bytes that the update reads and writes.
    """

    useful: float
    six_n: float
    hardware: float
    weights: float
    passes: int
    activations: float
    optimizer: float


def train_cost(model: ModelConfig, train: TrainConfig, batch: int, length: int, images: int = 1) -> StepCost:
    """A training step of ``batch`` rows of ``length`` tokens (image tokens included), each with ``images`` images and one pose.

    A matmul with n weights takes 2n operations for each token. Causal attention takes half of 4·T²·H·K for each row in the forward pass, and twice
    that in the backward pass.
    """
    params = flatten(abstract_params(model.replace(scan_layers=True)))
    rows = assign(params, train.trainable)
    trains = {path: row.lr is not None for path, row in rows.items()}
    seen = model.image_tokens
    tokens = {"decoder": batch * length, "vision": batch * images * (seen + 1), "projector": batch * images * seen}
    reached = _reached(trains)
    # The share of the decoder's layers that need gradients of activations: all if something before the adapters trains.
    adapted = 1 - model.leading_layers / model.text.num_layers
    share = adapted * any("/lora_" in path for path, is_trained in trains.items() if is_trained)
    if trains_before_adapters(params, train.trainable):
        share = 1.0
    again = POLICIES[train.remat]
    useful, repeated, six_n, moved = 0.0, 0.0, 0.0, 0.0
    for path, leaf in params.items():
        if not _is_matrix(path, model):
            continue
        tower = path.split("/")[0]
        products = 2.0 * math.prod(leaf.shape) * tokens.get(tower, batch)
        through = float(reached[tower])
        if path.startswith(_LAYER):  # adapters have rows only for layers that are reached
            through = float(share > 0) if "/lora_" in path else share
        useful += products * (1 + through + trains[path])
        six_n += 3 * products if tower == "decoder" else products
        layers = leaf.shape[0] if leaf.ndim == 3 else 1
        repeats = path.startswith(_LAYER) and again is not None and not _kept(path, again)
        repeated += products * repeats * through
        moved += 2 * layers * sum(leaf.shape[-2:]) * tokens.get(tower, batch) * (1 + (repeats + 2) * through)
    text, vision = model.text, model.vision
    causal = 2.0 * batch * text.num_layers * text.num_heads * text.head_dim * length**2
    looking = 0.0
    if vision is not None:
        looking = 4.0 * batch * images * vision.num_used_layers * vision.hidden_size * (seen + 1) ** 2
    attended = causal * (1 + 2 * share) + looking * (1 + 2 * reached["vision"])
    repeated += causal * share * (again is not None and "attention" not in again)
    weights = float(sum(nbytes(leaf) for path, leaf in params.items() if path.startswith("decoder/")))
    updated = sum(math.prod(params[path].shape) for path, is_trained in trains.items() if is_trained)
    return StepCost(
        useful=useful + attended,
        six_n=six_n + attended,
        hardware=useful + attended + repeated,
        weights=weights,
        passes=2 + bool(repeated),
        activations=moved,
        optimizer=4.0 * 7 * updated,
    )


def utilisation(model: ModelConfig, settings: TrainConfig) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """A function from a batch to the operations of a step on its rows.

    ``mfu`` counts what this run's gradient needs (with LoRA about 4 for each parameter and token), ``mfu_6n`` what it would need if everything
    trained. With kept states (``train.kept``) both count the layers that run, as if they were the model.
    """
    text = dataclasses.replace(model.text, num_layers=model.text.num_layers - model.leading_layers)
    lora = None if model.lora is None else dataclasses.replace(model.lora, last_layers=None)
    behind = model.replace(vision=None, image_newline=False, text=text, lora=lora)

    @functools.lru_cache(maxsize=64)
    def cost(led: bool, batch: int, length: int, images: int) -> StepCost:
        return train_cost(behind if led else model, settings, batch, length, images)

    def operations(batch: Mapping[str, Any]) -> dict[str, float]:
        pixels = batch.get("pixel_values")
        found = cost("led" in batch, *batch["input_ids"].shape, 0 if pixels is None else pixels.shape[1])
        return {"mfu": found.useful, "mfu_6n": found.six_n}

    return operations


def decode_cost(model: ModelConfig, batch: int, length: int) -> StepCost:
    """One decoding step: a token for each of ``batch`` conversations of ``length`` tokens."""
    params = {path: leaf for path, leaf in flatten(abstract_params(model)).items() if path.startswith("decoder/")}
    text = model.text
    products = sum(2.0 * math.prod(leaf.shape) for path, leaf in params.items() if _is_matrix(path, model)) * batch
    products += 4.0 * batch * text.num_layers * text.num_heads * text.head_dim * length
    looked_up = () if text.tied else ("decoder/embed_tokens/",)  # of a table only a few rows are read
    weights = float(sum(nbytes(leaf) for path, leaf in params.items() if not path.startswith(looked_up)))
    itemsize = 4 if model.dtype == "float32" else 2
    cache = 2.0 * batch * text.num_layers * text.num_kv_heads * text.head_dim * length * itemsize
    return StepCost(products, products, products, weights, 1, cache, 0.0)


def _is_matrix(path: str, model: ModelConfig) -> bool:
    """Whether an array is multiplied with the activations: a kernel, or the embedding that is also the LM head."""
    return bool(_MATRIX.fullmatch(path) or (model.text.tied and _TIED.fullmatch(path)))


def _reached(trains: Mapping[str, bool]) -> dict[str, bool]:
    """Whether each tower needs gradients of its activations: it does if parameters train in it or in a tower before it."""
    order = ("vision", "projector", "decoder", "pose_head")
    return {
        tower: any(trained for path, trained in trains.items() if path.split("/")[0] in order[: place + 1])
        for place, tower in enumerate(order)
    }


def _kept(path: str, names: tuple[str, ...]) -> bool:
    return "mlp" in names or ("qkv" in names and bool(_QKV.fullmatch(path)))

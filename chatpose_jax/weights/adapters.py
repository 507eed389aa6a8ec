"""Tensor names of LoRA adapters as PEFT stores them, in a folder of their own or in the checkpoint of a training run.

PEFT puts ``base_model.model.`` before the base's names and inserts parts into the names of modules that it wraps. ``unwrapped`` removes both.
The remaining names are in the tables of the base's layout: adapters in ``Layout.lora``, ``modules_to_save`` in ``Layout.rules``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import LoRAConfig
from chatpose_jax.weights.layouts.flat import projector_settings
from chatpose_jax.weights.readers import Checkpoint, TensorEntry
from chatpose_jax.weights.table import Layout, Shape

PREFIX = "base_model.model."
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

# What PEFT adds to the name of a wrapped module. In memory and in checkpoints of a run it also adds the adapter's name.
_WRAPPING = (
    (re.compile(r"^base_model\.model\."), ""),
    (re.compile(r"\.(token_adapter\.)?base_layer\.(weight|bias)$"), r".\2"),
    (re.compile(r"\.modules_to_save\.[^.]+\."), "."),
    (re.compile(r"\.(lora_[AB])\.[^.]+\.weight$"), r".\1.weight"),
    (re.compile(r"(\.token_adapter\.trainable_tokens_delta)\.[^.]+$"), r"\1"),
)
# For a resized table that it also trains, PEFT 0.21 writes the new values under two names, and the old values too.
_SAVED = ".modules_to_save."
_COPIES = re.compile(r"\.original_module\.|\.trainable_tokens_original(\.|$)")
LORA_NAME = re.compile(r"\.(\w+)\.lora_([AB])\.weight$")


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the base's own names. Raises UserError if two tensors get the same name, as in a file of several adapters."""
    if not any(name.startswith(PREFIX) or LORA_NAME.search(name) for name in checkpoint.tensors):
        return checkpoint
    tensors: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        if _COPIES.search(name) or (_SAVED in name and name.replace(_SAVED, ".") in checkpoint.tensors):
            continue
        plain = name
        for pattern, replacement in _WRAPPING:
            plain = pattern.sub(replacement, plain)
        if plain in tensors:
            raise UserError(
                f"{checkpoint.folder}: {name!r} and {tensors[plain].name!r} are both {plain!r}; expected one adapter; remove the other"
            )
        tensors[plain] = entry
    return dataclasses.replace(checkpoint, tensors=tensors)


def with_adapters(layout: Layout, names: Mapping[str, Shape]) -> Layout:
    """The layout with rules for the adapters among these tensor names."""
    everything = dataclasses.replace(layout, rules=layout.lora)
    found = {place[0].target for name in names if (place := everything.locate(name))}
    return dataclasses.replace(layout, rules=layout.rules + tuple(r for r in layout.lora if r.target in found))


def alone(layout: Layout, names: Mapping[str, Shape]) -> Layout:
    """The layout of an adapter without its base. ``layout`` is that of the base; only rules that match a tensor are kept."""
    full = dataclasses.replace(layout, rules=layout.rules + layout.lora)
    found = {place[0].source for name in names if (place := full.locate(name))}
    return dataclasses.replace(
        full,
        name=f"peft over {layout.name}",
        title="PEFT adapter",
        family="peft",
        rules=tuple(rule for rule in full.rules if rule.source in found),
        settings=lambda config, shapes: projector_settings(config),
        config_json=None,
    )


def adapted_layers(names: Iterable[str]) -> set[int]:
    """The numbers of the layers whose adapters are among these tensor names."""
    return {
        int(match[1]) for name in names if LORA_NAME.search(name) and (match := re.search(r"layers\.(\d+)\.", name))
    }


def in_words(lora: LoRAConfig) -> str:
    """``rank 8, alpha 16, on q_proj, v_proj``, and ``of the last 10 layers`` if they are not in all."""
    where = f" of the last {lora.last_layers} layers" if lora.last_layers else ""
    return f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}{where}"


def row_module(name: str) -> str:
    """The module of a tensor that replaces rows of the vocabulary: ``embed_tokens`` or ``lm_head``."""
    return name.removesuffix(TOKEN_ROWS).rsplit(".", 1)[-1]

"""LLaVA-1.5 in its original layout: projector inside or on its own (``mm_projector.bin``), CLIP inside or beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.configs import (
    llava_flat_json,
    llava_flat_settings,
    llava_projector_settings,
)
from chatpose_jax.weights.layouts.table import Layout, Settings, Shape

TOWER = "model.vision_tower.vision_tower.vision_model."
_PROJECTORS = ("model.mm_projector.", "mm_projector.", "")


def _layout(name: str, title: str, *, tower: bool, projector: bool) -> Layout:
    return Layout(
        name=name,
        title=title,
        family="llava_original",
        rules=(
            *parts.llama("model.", "lm_head."),
            *(parts.projector("model.mm_projector.0", "model.mm_projector.2") if projector else ()),
            *(parts.clip(TOWER) if tower else ()),
        ),
        ignored=parts.BUFFERS,
        unused=parts.clip_unused(TOWER) if tower else (),
        recognise=lambda shapes: (
            "model.embed_tokens.weight" in shapes
            and ("model.mm_projector.0.weight" in shapes) == projector
            and (f"{TOWER}embeddings.class_embedding" in shapes) == tower
        ),
        # Without both it has the names of a LLaMA alone.
        configured=lambda config: tower or projector or any(key.startswith("mm_") for key in config),
        settings=lambda config, shapes: llava_flat_settings(config, shapes, TOWER if tower else None),
        config_json=lambda config: llava_flat_json(config, "llava_llama", "LlavaLlamaForCausalLM"),
    )


def _projector_alone(prefix: str) -> Layout:
    def settings(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Settings:
        return llava_projector_settings(config)

    return Layout(
        name="llava_projector",
        title="LLaVA's projector on its own",
        family="llava_projector",
        rules=parts.projector(f"{prefix}0", f"{prefix}2"),
        ignored=(),
        recognise=lambda shapes: f"{prefix}0.weight" in shapes and not any("layers." in name for name in shapes),
        settings=settings,
    )


LAYOUTS = (
    _layout("llava_original", "LLaVA-1.5, original names, CLIP inside", tower=True, projector=True),
    _layout("llava_original_without_clip", "LLaVA-1.5, original names, CLIP beside it", tower=False, projector=True),
    _layout(
        "llava_original_without_projector",
        "LLaVA-1.5, original names, projector beside it",
        tower=True,
        projector=False,
    ),
    _layout(
        "llava_original_decoder",
        "LLaVA-1.5, original names, projector and CLIP beside it",
        tower=False,
        projector=False,
    ),
    *map(_projector_alone, _PROJECTORS),
)

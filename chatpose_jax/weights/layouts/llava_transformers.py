"""LLaVA-1.5 as ``transformers`` stores it: the names in files of 4.x and 5.x, and those of a ``state_dict()`` of 4.52 … 4.57 and 5.x, which FSDP
and DeepSpeed write unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.config_json import llava_json
from chatpose_jax.weights.layouts.configs import clip_settings, llama_settings
from chatpose_jax.weights.layouts.table import Layout, Settings, Shape


def _layout(name: str, title: str, model: str, lm_head: str, projector: str, tower: str) -> Layout:
    def settings(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Settings:
        for key, expected in (("vision_feature_select_strategy", "default"), ("projector_hidden_act", "gelu")):
            if config.get(key, expected) != expected:
                raise UserError(f"config.json: {key}={config[key]!r} is not supported; expected {expected!r}")
        select = config.get("vision_feature_layer", -2)
        if not isinstance(select, int) or select >= 0:
            raise UserError(
                f"config.json: vision_feature_layer={select!r} is not supported; expected one negative number"
            )
        return {
            "text": llama_settings(config.get("text_config", {}), shapes, model, "text_config."),
            "vision": clip_settings(config.get("vision_config", {}), shapes, tower, select, "vision_config."),
            "select_layer": select,
            "image_token_id": int(config.get("image_token_index", config.get("image_token_id", 32000))),
        }

    return Layout(
        name=name,
        title=f"LLaVA-1.5 for transformers, {title}",
        family="llava_transformers",
        rules=(
            *parts.llama(model, lm_head),
            *parts.projector(f"{projector}linear_1", f"{projector}linear_2"),
            *parts.clip(tower),
        ),
        ignored=parts.BUFFERS,
        unused=parts.clip_unused(tower),
        config_json=llava_json,
        recognise=lambda shapes: (
            f"{model}embed_tokens.weight" in shapes and f"{tower}embeddings.class_embedding" in shapes
        ),
        settings=settings,
    )


# Prefixes of decoder, LM head and projector: in files, and in a state_dict.
_FILES = ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.")
_MEMORY = ("model.language_model.", "lm_head.", "model.multi_modal_projector.")
LAYOUTS = (
    _layout("llava_transformers_4", "names of 4.x", *_FILES, "vision_tower.vision_model."),
    _layout("llava_transformers_5", "names of 5.x", *_FILES, "vision_tower."),
    _layout("llava_transformers_5_state_dict", "names of a 5.x state_dict", *_MEMORY, "model.vision_tower."),
    _layout(
        "llava_transformers_4_state_dict",
        "names of a state_dict of 4.52 to 4.57",
        *_MEMORY,
        "model.vision_tower.vision_model.",
    ),
)

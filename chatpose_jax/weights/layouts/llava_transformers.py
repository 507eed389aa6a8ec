"""LLaVA-1.5 as ``transformers`` stores it: the names in files of 4.x and 5.x, and those of a ``state_dict()`` of 4.52 … 4.57 and 5.x, which FSDP
and DeepSpeed write unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.weights.backbones import TOWERS, Language, Tower
from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.wrapper import Wrapper
from chatpose_jax.weights.table import Layout, Settings, Shape


def _wrapper(name: str, title: str, model: str, lm_head: str, projector: str, prefix: str) -> Wrapper:
    title = f"LLaVA-1.5 for transformers, {title}"

    def layout(language: Language | None, tower: Tower | None) -> Layout:
        assert language is not None and tower is not None

        def settings(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Settings:
            for key, expected in (("vision_feature_select_strategy", "default"), ("projector_hidden_act", "gelu")):
                if config.get(key, expected) != expected:
                    raise UserError(f"config.json: {key}={config[key]!r} is not supported; expected {expected!r}")
            select = config.get("vision_feature_layer", -2)
            if not isinstance(select, int) or select >= 0:
                raise UserError(
                    f"config.json: vision_feature_layer={select!r} is not supported; expected one negative number"
                )
            vision = tower.settings(config.get("vision_config", {}), shapes, prefix, "vision_config.")
            return {
                "text": language.settings(config.get("text_config", {}), shapes, model, "text_config."),
                "vision": dataclasses.replace(vision, select_layer=select),
                "select_layer": select,
                "image_token_id": int(config.get("image_token_index", config.get("image_token_id", 32000))),
            }

        return Layout(
            name=name,
            title=title,
            family="llava_transformers",
            rules=(
                *language.rules(model, lm_head),
                *parts.projector(f"{projector}linear_1", f"{projector}linear_2"),
                *tower.rules(prefix),
            ),
            ignored=parts.BUFFERS,
            unused=tower.unused(prefix),
            config_json=lambda config: _config_json(language, tower, config),
            settings=settings,
            language=language,
            tower=tower,
        )

    return Wrapper(
        name=name,
        title=title,
        family="llava_transformers",
        towers=tuple(TOWERS.values()),
        recognise=lambda shapes, tower: (
            f"{model}embed_tokens.weight" in shapes and tower is not None and tower.recognise(shapes, prefix)
        ),
        text=lambda config: config.get("text_config", {}),
        layout=layout,
    )


def _config_json(language: Language, tower: Tower, config: ModelConfig) -> dict[str, Any]:
    """A LlavaConfig of transformers, with the layers of the tower and the selected one from ``config.vision``."""
    vision = config.vision
    assert vision is not None
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": vision.num_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.text.tied,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.param_dtype,
        "text_config": language.config_json(config),
        "vision_config": tower.config_json(vision, config.param_dtype),
    }


# Prefixes of decoder, LM head and projector: in files, and in a state_dict.
_FILES = ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.")
_MEMORY = ("model.language_model.", "lm_head.", "model.multi_modal_projector.")
WRAPPERS = (
    _wrapper("llava_transformers_4", "names of 4.x", *_FILES, "vision_tower.vision_model."),
    _wrapper("llava_transformers_5", "names of 5.x", *_FILES, "vision_tower."),
    _wrapper("llava_transformers_5_state_dict", "names of a 5.x state_dict", *_MEMORY, "model.vision_tower."),
    _wrapper(
        "llava_transformers_4_state_dict",
        "names of a state_dict of 4.52 to 4.57",
        *_MEMORY,
        "model.vision_tower.vision_model.",
    ),
)

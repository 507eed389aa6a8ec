"""LLaVA-1.5, LLaVA-1.6 and LLaVA-OneVision as ``transformers`` stores them: the names in files of 4.x and 5.x, and those of a ``state_dict()`` of
4.52 … 4.57 and 5.x, which FSDP and DeepSpeed write unchanged. The three have the same names; ``model_type`` in ``config.json`` tells them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.weights.backbones import TOWERS, Language, Tower
from chatpose_jax.weights.backbones.family import demand
from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.wrapper import Wrapper
from chatpose_jax.weights.table import Layout, NameRule, Settings, Shape


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model of transformers, with the defaults of its configuration.

    newline: whether a learned embedding follows the patches of an image. strategy: ``vision_feature_select_strategy``. template: the conversation's,
    if it is not that of the language model.
    """

    title: str
    architecture: str
    newline: bool
    select_layer: int
    image_token_id: int
    strategy: str = "default"
    template: str | None = None


_MODELS = {
    "llava": _Model("LLaVA-1.5", "LlavaForConditionalGeneration", False, -2, 32000),
    "llava_next": _Model("LLaVA-1.6", "LlavaNextForConditionalGeneration", True, -2, 32000),
    "llava_onevision": _Model(
        "LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration", True, -1, 151646, "full", "llava_onevision"
    ),
}


def _kind(config: Mapping[str, Any]) -> _Model:
    kind = config.get("model_type", "llava")
    if kind not in _MODELS:
        raise UserError(f"config.json: model_type={kind!r} is not supported; expected one of {', '.join(_MODELS)}")
    return _MODELS[kind]


def _wrapper(name: str, title: str, model: str, lm_head: str, projector: str, newline: str, prefix: str) -> Wrapper:
    title = f"LLaVA for transformers, {title}"

    def layout(language: Language | None, tower: Tower | None) -> Layout:
        assert language is not None and tower is not None

        def settings(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Settings:
            kind = _kind(config)
            select = config.get("vision_feature_layer", kind.select_layer)
            if not isinstance(select, int) or select >= 0:
                raise UserError(
                    f"config.json: vision_feature_layer={select!r} is not supported; expected one negative number"
                )
            vision = tower.settings(config.get("vision_config") or {}, shapes, prefix, "vision_config.")
            demand(
                {"vision_feature_select_strategy": kind.strategy, **config},
                "",
                {
                    "projector_hidden_act": ("gelu",),
                    "multimodal_projector_bias": (True,),
                    # "default" drops the first token, which is the class token where there is one.
                    "vision_feature_select_strategy": ("default" if vision.class_token else "full",),
                },
            )
            text = config.get("text_config") or {}
            tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
            return {
                "text": language.settings({**text, "tie_word_embeddings": tied}, shapes, model, "text_config."),
                "vision": dataclasses.replace(vision, select_layer=select),
                "select_layer": select,
                "image_newline": kind.newline,
                **({"template": kind.template} if kind.template else {}),
                "image_token_id": int(
                    config.get("image_token_index", config.get("image_token_id", kind.image_token_id))
                ),
            }

        return Layout(
            name=name,
            title=title,
            family="llava_transformers",
            rules=(
                *language.rules(model, lm_head),
                *parts.projector(f"{projector}linear_1", f"{projector}linear_2"),
                NameRule(newline, "projector/newline"),
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
    """A configuration of transformers, with the layers of the tower and the selected one from ``config.vision``. With a newline it is that of
    LLaVA-1.6 if the tower has a class token, as CLIP, and that of LLaVA-OneVision if it has none.
    """
    vision = config.vision
    assert vision is not None
    kind = "llava" if not config.image_newline else "llava_next" if vision.class_token else "llava_onevision"
    return {
        "architectures": [_MODELS[kind].architecture],
        "model_type": kind,
        "image_token_index": config.image_token_id,
        **({} if kind == "llava_onevision" else {"image_seq_length": vision.num_patches}),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": "default" if vision.class_token else "full",
        "tie_word_embeddings": config.text.tied,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.param_dtype,
        "text_config": language.config_json(config),
        "vision_config": tower.config_json(vision, config.param_dtype),
    }


# Prefixes of decoder, LM head and projector, and the newline: in files, and in a state_dict.
_FILES = ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.", "image_newline")
_MEMORY = ("model.language_model.", "lm_head.", "model.multi_modal_projector.", "model.image_newline")
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

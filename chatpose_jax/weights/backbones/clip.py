"""CLIP's vision tower (Radford et al. 2021), as OpenAI released it and transformers names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import VisionConfig
from chatpose_jax.weights.backbones.family import Tower, agree, count_layers, demand
from chatpose_jax.weights.table import Ignored, NameRule, Shape, Transform, linear, norm


def _settings(config: Mapping[str, Any], shapes: Mapping[str, Shape], tower: str, where: str) -> VisionConfig:
    """Without ``num_attention_heads``, heads have width 64, as in every CLIP that OpenAI released."""
    demand(config, where, {"hidden_act": ("quick_gelu",), "num_channels": (3,)})
    try:
        width, _, patch, _ = shapes[f"{tower}embeddings.patch_embedding.weight"]
        positions = shapes[f"{tower}embeddings.position_embedding.weight"][0]
        mlp = shapes[f"{tower}encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"no CLIP vision tower under {tower!r}: tensor {error} is missing or misshaped") from None
    side = round((positions - 1) ** 0.5)
    layers = count_layers(config, where, shapes, f"{tower}encoder.layers.")
    if side * side + 1 != positions:
        raise UserError(
            f"{tower}embeddings.position_embedding has {positions} rows; expected one more than a square number"
        )
    agree(
        config, where, {"hidden_size": width, "intermediate_size": mlp, "patch_size": patch, "image_size": side * patch}
    )
    if "num_attention_heads" not in config and width % 64:
        raise UserError(f"a vision tower of width {width} needs a config.json with num_attention_heads")
    return VisionConfig(
        backbone="clip",
        image_size=side * patch,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=int(config.get("num_attention_heads", width // 64)),
        select_layer=-1,
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-5)),
    )


def _rules(tower: str) -> tuple[NameRule, ...]:
    """``pre_layrnorm`` is CLIP's own spelling."""
    layer, out = f"{tower}encoder.layers.{{i}}.", "vision/layers/"
    return (
        NameRule(f"{tower}embeddings.patch_embedding.weight", "vision/patch_embed/kernel", Transform.PATCHES),
        NameRule(f"{tower}embeddings.class_embedding", "vision/class_embedding"),
        NameRule(f"{tower}embeddings.position_embedding.weight", "vision/position_embedding"),
        *norm(f"{tower}pre_layrnorm", "vision/pre_norm"),
        *norm(f"{layer}layer_norm1", f"{out}norm1"),
        *norm(f"{layer}layer_norm2", f"{out}norm2"),
        *linear(f"{layer}self_attn.q_proj", f"{out}attn/q_proj"),
        *linear(f"{layer}self_attn.k_proj", f"{out}attn/k_proj"),
        *linear(f"{layer}self_attn.v_proj", f"{out}attn/v_proj"),
        *linear(f"{layer}self_attn.out_proj", f"{out}attn/o_proj"),
        *linear(f"{layer}mlp.fc1", f"{out}mlp/fc1"),
        *linear(f"{layer}mlp.fc2", f"{out}mlp/fc2"),
    )


def _config_json(vision: VisionConfig, dtype: str) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": vision.layer_norm_eps,
        "torch_dtype": dtype,
    }


TOWER = Tower(
    name="clip",
    title="CLIP",
    model_types=("clip_vision_model", "clip"),
    prefixes=("vision_model.", ""),  # in files; in a state_dict of 5.x
    recognise=lambda shapes, tower: f"{tower}embeddings.class_embedding" in shapes,
    settings=_settings,
    rules=_rules,
    # The norm after the last block.
    unused=lambda tower: norm(f"{tower}post_layernorm", "vision/post_norm"),
    ignored=(
        Ignored(r"text_model\..*|text_projection\.weight|logit_scale", "CLIP's text half"),
        Ignored(r"visual_projection\.weight", "maps into CLIP's joint space, which is not used"),
    ),
    config_json=_config_json,
)

"""SigLIP's vision tower (Zhai et al. 2023), as Google released it and transformers names it: so400m-patch14-384, base-patch16 and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import VisionConfig
from chatpose_jax.weights.backbones.family import Tower, agree, count_layers, demand
from chatpose_jax.weights.table import Ignored, NameRule, Shape, Transform, linear, norm

_HEADS = {768: 12, 1024: 16, 1152: 16}
"""Width → heads of the released models, for a tower without a ``config.json``."""


def _settings(config: Mapping[str, Any], shapes: Mapping[str, Shape], tower: str, where: str) -> VisionConfig:
    demand(config, where, {"hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)})
    try:
        width, _, patch, _ = shapes[f"{tower}embeddings.patch_embedding.weight"]
        positions = shapes[f"{tower}embeddings.position_embedding.weight"][0]
        mlp = shapes[f"{tower}encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"no SigLIP vision tower under {tower!r}: tensor {error} is missing or misshaped") from None
    side = round(positions**0.5)
    if side * side != positions:
        raise UserError(f"{tower}embeddings.position_embedding has {positions} rows; expected a square number")
    agree(config, where, {"hidden_size": width, "intermediate_size": mlp, "patch_size": patch})
    # What the patches leave over is not seen, so only config.json knows it: 384 pixels are 27 patches of 14 and 6 pixels.
    size = int(config.get("image_size", side * patch))
    if size // patch != side:
        raise UserError(
            f"config.json: {where}image_size={size} has {size // patch} patches of {patch} pixels to a side, the tensors have {side}; the files "
            "belong to different models"
        )
    heads = config.get("num_attention_heads", _HEADS.get(width))
    if heads is None:
        raise UserError(f"a vision tower of width {width} needs a config.json with num_attention_heads")
    return VisionConfig(
        backbone="siglip",
        image_size=size,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=count_layers(config, where, shapes, f"{tower}encoder.layers."),
        num_heads=int(heads),
        select_layer=-2,  # as LLaVA-OneVision, whose tower ends there
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-6)),
        activation="gelu_tanh",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
    )


def _rules(tower: str) -> tuple[NameRule, ...]:
    layer, out = f"{tower}encoder.layers.{{i}}.", "vision/layers/"
    return (
        NameRule(f"{tower}embeddings.patch_embedding.weight", "vision/patch_embed/kernel", Transform.PATCHES),
        NameRule(f"{tower}embeddings.patch_embedding.bias", "vision/patch_embed/bias"),
        NameRule(f"{tower}embeddings.position_embedding.weight", "vision/position_embedding"),
        *norm(f"{layer}layer_norm1", f"{out}norm1"),
        *norm(f"{layer}layer_norm2", f"{out}norm2"),
        *linear(f"{layer}self_attn.q_proj", f"{out}attn/q_proj"),
        *linear(f"{layer}self_attn.k_proj", f"{out}attn/k_proj"),
        *linear(f"{layer}self_attn.v_proj", f"{out}attn/v_proj"),
        *linear(f"{layer}self_attn.out_proj", f"{out}attn/o_proj"),
        *linear(f"{layer}mlp.fc1", f"{out}mlp/fc1"),
        *linear(f"{layer}mlp.fc2", f"{out}mlp/fc2"),
    )


def _unused(tower: str) -> tuple[NameRule, ...]:
    """The norm after the last block, and the attention that pools the patches to one vector. LLaVA-OneVision's towers have only the first."""
    pooling = (
        "probe",
        *(
            f"{part}.{name}"
            for part in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
            for name in ("weight", "bias")
        ),
        "attention.in_proj_weight",
        "attention.in_proj_bias",
    )
    return (
        *norm(f"{tower}post_layernorm", "vision/post_norm"),
        *(NameRule(f"{tower}head.{name}", f"vision/pooling/{name}") for name in pooling),
    )


def _config_json(vision: VisionConfig, dtype: str) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": vision.layer_norm_eps,
        "vision_use_head": False,
        "torch_dtype": dtype,
    }


TOWER = Tower(
    name="siglip",
    title="SigLIP",
    model_types=("siglip_vision_model", "siglip"),
    prefixes=("vision_model.", ""),  # in files; in those and in a state_dict of 5.x
    recognise=lambda shapes, tower: f"{tower}embeddings.patch_embedding.bias" in shapes,
    settings=_settings,
    rules=_rules,
    unused=_unused,
    ignored=(Ignored(r"text_model\..*|logit_scale|logit_bias", "SigLIP's text half"),),
    config_json=_config_json,
)

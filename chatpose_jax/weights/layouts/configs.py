"""``config.json`` of the known layouts → settings of the model. ``config_json`` writes these files.

Sizes come from the tensors and must agree with ``config.json``. Other settings (heads, epsilons, RoPE) come from ``config.json``, with the defaults
of ``transformers``. A setting that the model does not support is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import VisionConfig
from chatpose_jax.weights.layouts.table import Settings, Shape

_MAX_LAYERS = 1000


def _layers(config: Mapping[str, Any], where: str, shapes: Mapping[str, Shape], prefix: str) -> int:
    # config.json has priority, so that the layers of a lost shard are reported as missing.
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.")
    shown = max((int(match[1]) + 1 for name in shapes if (match := numbered.match(name))), default=0)
    layers = int(config.get("num_hidden_layers", shown))
    if layers > _MAX_LAYERS:
        raise UserError(
            f"{where}num_hidden_layers={layers}, by config.json or the tensors; expected at most {_MAX_LAYERS}"
        )
    return layers


def _demand(config: Mapping[str, Any], where: str, expected: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in expected.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"config.json: {where}{key}={config[key]!r} is not supported; expected {key}={allowed[0]!r}"
            )


def _agree(config: Mapping[str, Any], where: str, found: Mapping[str, int]) -> None:
    if wrong := [
        f"{where}{key}={config[key]} (tensors: {size})" for key, size in found.items() if config.get(key, size) != size
    ]:
        raise UserError(
            f"config.json and the tensors disagree: {', '.join(wrong)}; the files belong to different models"
        )


def llama_settings(config: Mapping[str, Any], shapes: Mapping[str, Shape], model: str, where: str = "") -> Settings:
    """Fields of TextConfig, without the vocabulary. config: a LlamaConfig. model: prefix of the decoder's tensors. where: prefix of the keys in
    errors.
    """
    _demand(
        config,
        where,
        {
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "tie_word_embeddings": (False,),
            "model_type": ("llama", "llava", "llava_llama", "vicuna", "chatpose"),
        },
    )
    try:
        rows, width = shapes[f"{model}embed_tokens.weight"]
        mlp = shapes[f"{model}layers.0.mlp.gate_proj.weight"][0]
        q_out = shapes[f"{model}layers.0.self_attn.q_proj.weight"][0]
        kv_out = shapes[f"{model}layers.0.self_attn.k_proj.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"no LLaMA decoder under {model!r}: tensor {error} is missing or misshaped") from None
    layers = _layers(config, where, shapes, f"{model}layers.")
    _agree(config, where, {"hidden_size": width, "intermediate_size": mlp, "vocab_size": rows})
    heads = int(config.get("num_attention_heads", 32))
    head_dim = int(config.get("head_dim") or q_out // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if (heads * head_dim, kv_heads * head_dim) != (q_out, kv_out):
        raise UserError(
            f"config.json: {where}num_attention_heads={heads}, num_key_value_heads={kv_heads}, head_dim={head_dim} do not match the "
            f"{q_out} query and {kv_out} key rows of the tensors; the files belong to different models"
        )
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope_theta": _rope_theta(config, where),
        "max_position_embeddings": int(config.get("max_position_embeddings", 2048)),
    }


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    """The base of the rotary angles.

    transformers 4 reads ``rope_theta`` and ``rope_scaling``. transformers 5 reads ``rope_scaling`` or else ``rope_parameters``, and takes theta from
    it. Settings that these versions or this model would interpret differently are an error.
    """
    thetas = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"config.json: {where}{key}: RoPE of type {kind!r} is not supported; expected 'default'")
        known = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        if odd := [name for name in rope if name not in known and rope[name] is not None]:
            raise UserError(
                f"config.json: {where}{key}: {odd[0]}={rope[odd[0]]!r} is not supported with type 'default'; expected none"
            )
        _demand(rope, f"{where}{key}.", {"partial_rotary_factor": (1.0, None)})
        if rope.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = rope["rope_theta"]
    _demand(config, where, {"partial_rotary_factor": (1.0, None)})
    if len(set(map(float, thetas.values()))) > 1:
        said = ", ".join(f"{where}{key}={theta}" for key, theta in thetas.items())
        raise UserError(
            f"config.json: {said}: some versions of transformers read the first, some the second; delete the wrong one"
        )
    return float(next(iter(thetas.values()), 10000.0))


def clip_settings(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], tower: str, select_layer: int = -2, where: str = ""
) -> VisionConfig:
    """VisionConfig of a CLIP tower under the prefix ``tower``; ``config`` is a CLIPVisionConfig or ``{}``.

    Without ``num_attention_heads``, heads have width 64, as in every CLIP that OpenAI released.
    """
    _demand(config, where, {"hidden_act": ("quick_gelu",), "num_channels": (3,)})
    try:
        width, _, patch, _ = shapes[f"{tower}embeddings.patch_embedding.weight"]
        positions = shapes[f"{tower}embeddings.position_embedding.weight"][0]
        mlp = shapes[f"{tower}encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"no CLIP vision tower under {tower!r}: tensor {error} is missing or misshaped") from None
    side = round((positions - 1) ** 0.5)
    layers = _layers(config, where, shapes, f"{tower}encoder.layers.")
    if side * side + 1 != positions:
        raise UserError(
            f"{tower}embeddings.position_embedding has {positions} rows; expected one more than a square number"
        )
    _agree(
        config, where, {"hidden_size": width, "intermediate_size": mlp, "patch_size": patch, "image_size": side * patch}
    )
    if "num_attention_heads" not in config and width % 64:
        raise UserError(f"a vision tower of width {width} needs a config.json with num_attention_heads")
    return VisionConfig(
        image_size=side * patch,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=int(config.get("num_attention_heads", width // 64)),
        select_layer=int(select_layer),
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-5)),
    )


def llava_flat_settings(config: Mapping[str, Any], shapes: Mapping[str, Shape], tower: str | None) -> Settings:
    """Settings of the flat ``config.json`` of the original LLaVA and of CHATPOSE-V0. tower: prefix of CLIP's tensors; ``None`` if the checkpoint has
    no CLIP.
    """
    settings: Settings = {
        "text": llama_settings(config, shapes, "model."),
        "image_token_id": -200,
        "select_layer": -2,
    } | llava_projector_settings(config)
    if tower is not None:
        settings["vision"] = clip_settings({}, shapes, tower, settings["select_layer"])
    return settings


def llava_projector_settings(config: Mapping[str, Any]) -> Settings:
    """Settings of the projector, in ``config.json`` of the original LLaVA or beside a separate projector."""
    _demand(config, "", {"mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",)})
    return {"select_layer": int(config["mm_vision_select_layer"])} if "mm_vision_select_layer" in config else {}

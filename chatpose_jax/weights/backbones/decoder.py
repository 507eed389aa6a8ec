"""What the families of ``models.decoder`` share: one name table, and their ``config.json``, read and written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig, RopeScaling
from chatpose_jax.weights.backbones.family import agree, count_layers, demand
from chatpose_jax.weights.table import NameRule, Settings, Shape, Transform, linear

_T = Transform.TRANSPOSE
ANY: tuple[Any, ...] = ("any value",)
"""Instead of the allowed values of a switch that a family's class does not read."""
# Switches of transformers' configurations, each with the only values that the decoder follows. A family may allow others of its own.
_DEMANDED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
}
# transformers' classes have these defaults, unless a family says others.
_DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
# RopeScaling's fields, and the names of rope_type "llama3".
_SCALING = {
    "factor": "factor",
    "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}


def decoder_rules(model: str, lm_head: str) -> tuple[NameRule, ...]:
    """The decoder's name table; ``model`` and ``lm_head`` are prefixes such as ``"model."`` and ``"lm_head."``."""
    layer, out = f"{model}layers.{{i}}.", "decoder/layers/"
    return (
        NameRule(f"{model}embed_tokens.weight", "decoder/embed_tokens/embedding", rows="base"),
        NameRule(f"{model}embed_tokens.weight", "decoder/embed_tokens/added", rows="added"),
        NameRule(f"{layer}input_layernorm.weight", f"{out}input_norm/scale"),
        NameRule(f"{layer}post_attention_layernorm.weight", f"{out}post_attention_norm/scale"),
        *(rule for n in ("q_proj", "k_proj", "v_proj") for rule in linear(f"{layer}self_attn.{n}", f"{out}attn/{n}")),
        NameRule(f"{layer}self_attn.o_proj.weight", f"{out}attn/o_proj/kernel", _T),
        *(NameRule(f"{layer}self_attn.{n}.weight", f"{out}attn/{n}/scale") for n in ("q_norm", "k_norm")),
        *(
            NameRule(f"{layer}mlp.{n}.weight", f"{out}mlp/{n}/kernel", _T)
            for n in ("gate_proj", "up_proj", "down_proj")
        ),
        NameRule(f"{model}norm.weight", "decoder/norm/scale"),
        NameRule(f"{lm_head}weight", "decoder/lm_head/kernel", _T, rows="base"),
        NameRule(f"{lm_head}weight", "decoder/lm_head/added", _T, rows="added"),
    )


def decoder_settings(
    backbone: str,
    *,
    demands: Mapping[str, tuple[Any, ...]] = {},
    defaults: Mapping[str, Any] = {},
    fields: Mapping[str, Any] = {},
) -> Callable[[Mapping[str, Any], Mapping[str, Shape], str, str], Settings]:
    """``Language.settings`` of a family.

    backbone: its name. demands: switches of its ``config.json`` besides ``_DEMANDED``, or instead of those, with the values that the decoder follows.
    defaults: of its class in transformers, where they differ from ``_DEFAULTS``. fields: fields of ``TextConfig`` that all its models have.
    """
    return functools.partial(_settings, {"backbone": backbone, **fields}, {**_DEMANDED, **demands}, defaults)


def _settings(
    fields: Mapping[str, Any],
    demands: Mapping[str, tuple[Any, ...]],
    defaults: Mapping[str, Any],
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    model: str,
    where: str,
) -> Settings:
    demand({**defaults, **config}, where, {key: allowed for key, allowed in demands.items() if allowed is not ANY})
    if odd := [kind for kind in config.get("layer_types") or () if kind != "full_attention"]:
        raise UserError(
            f"config.json: {where}layer_types has {odd[0]!r}, which is not supported; expected only 'full_attention'"
        )
    try:
        rows, width = shapes[f"{model}embed_tokens.weight"]
        mlp = shapes[f"{model}layers.0.mlp.gate_proj.weight"][0]
        q_out = shapes[f"{model}layers.0.self_attn.q_proj.weight"][0]
        kv_out = shapes[f"{model}layers.0.self_attn.k_proj.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"no decoder under {model!r}: tensor {error} is missing or misshaped") from None
    for field, suffix, what in (
        ("qkv_bias", "self_attn.q_proj.bias", "biases of q, k and v"),
        ("qk_norm", "self_attn.q_norm.weight", "norms of q and k"),
    ):
        found = next((name for name in shapes if name.startswith(f"{model}layers.") and name.endswith(suffix)), None)
        if (found is not None) != fields.get(field, False):
            raise UserError(
                f"config.json: {where}model_type={config.get('model_type')!r} has {'no ' if found else ''}{what}, but the tensors have "
                f"{'them' if found else 'none'} ({found or f'no {suffix}'}); the files belong to different models: fetch both from the same place"
            )
    layers = count_layers(config, where, shapes, f"{model}layers.")
    agree(config, where, {"hidden_size": width, "intermediate_size": mlp, "vocab_size": rows})
    said = {**_DEFAULTS, **defaults, **{key: value for key, value in config.items() if value is not None}}
    heads = int(said["num_attention_heads"])
    head_dim = int(said.get("head_dim") or q_out // heads)
    kv_heads = int(said.get("num_key_value_heads") or heads)
    if (heads * head_dim, kv_heads * head_dim) != (q_out, kv_out):
        raise UserError(
            f"config.json: {where}num_attention_heads={heads}, num_key_value_heads={kv_heads}, head_dim={head_dim} do not match the "
            f"{q_out} query and {kv_out} key rows of the tensors; the files belong to different models"
        )
    theta, scaling = _rope(config, where, float({**_DEFAULTS, **defaults}["rope_theta"]))
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": float(said["rms_norm_eps"]),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied": bool(said["tie_word_embeddings"]),
        "max_position_embeddings": int(said["max_position_embeddings"]),
        **fields,
    }


def _rope(config: Mapping[str, Any], where: str, default: float) -> tuple[float, RopeScaling | None]:
    """The base of the rotary angles, and how they are stretched.

    transformers 4 reads ``rope_theta`` and ``rope_scaling``. transformers 5 reads ``rope_scaling`` or else ``rope_parameters``, and takes theta from
    it. Settings that these versions or this model would interpret differently are an error.
    """
    thetas = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    scalings: dict[str, RopeScaling | None] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        known = ["rope_type", "type", "rope_theta", "partial_rotary_factor"]
        if kind == "llama3":
            if lost := [name for name in _SCALING.values() if rope.get(name) is None]:
                raise UserError(f"config.json: {where}{key}: {lost[0]} is missing, which RoPE of type 'llama3' needs")
            fields: dict[str, Any] = {ours: float(rope[theirs]) for ours, theirs in _SCALING.items()}
            scalings[key] = RopeScaling(**fields | {"original_context": int(fields["original_context"])})
            known += _SCALING.values()
        elif kind == "default":
            if rope:
                scalings[key] = None
        else:
            raise UserError(
                f"config.json: {where}{key}: RoPE of type {kind!r} is not supported; expected 'default' or 'llama3'"
            )
        if odd := [name for name in rope if name not in known and rope[name] is not None]:
            raise UserError(
                f"config.json: {where}{key}: {odd[0]}={rope[odd[0]]!r} is not supported with type {kind!r}; expected none"
            )
        demand(rope, f"{where}{key}.", {"partial_rotary_factor": (1.0, None)})
        if rope.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = rope["rope_theta"]
    if len(set(map(float, thetas.values()))) > 1 or len({*scalings.values()}) > 1:
        said = ", ".join(f"{where}{key}={value}" for key, value in (thetas | scalings).items())
        raise UserError(
            f"config.json: {said}: some versions of transformers read the first, some the second; delete the wrong one"
        )
    return float(next(iter(thetas.values()), default)), next(iter(scalings.values()), None)


def decoder_json(
    model_type: str, architecture: str, extra: Mapping[str, Any] = {}
) -> Callable[[ModelConfig], dict[str, Any]]:
    """``Language.config_json`` of a family. extra: keys that only this family has."""
    return functools.partial(_config_json, {"architectures": [architecture], "model_type": model_type}, extra)


def _config_json(kind: Mapping[str, Any], extra: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    text, scaling = config.text, config.text.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": "llama3"} | {theirs: getattr(scaling, ours) for ours, theirs in _SCALING.items()}
    return {
        **kind,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        **({"rope_scaling": rope} if scaling is not None else {}),
        "rope_parameters": rope | {"rope_theta": text.rope_theta},
        "max_position_embeddings": text.max_position_embeddings,
        "tie_word_embeddings": text.tied,
        **{name: id for name in SPECIAL if (id := getattr(config, name)) >= 0},
        "torch_dtype": config.param_dtype,
        **extra,
    }


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

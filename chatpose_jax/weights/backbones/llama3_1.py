"""Llama 3.1, 3.2 (text) and 3.3: Llama 3 with a stretched RoPE, a template with dates, and in 3.2 tied embeddings."""

from __future__ import annotations

import dataclasses

from chatpose_jax.models.config import RopeScaling, TextConfig
from chatpose_jax.weights.backbones import llama3
from chatpose_jax.weights.backbones.decoder import decoder_json, decoder_rules, decoder_settings
from chatpose_jax.weights.backbones.family import Language

_8B = dataclasses.replace(
    llama3.LANGUAGE.sizes["llama3_8b"],
    rope_scaling=RopeScaling(),
    max_position_embeddings=131072,
    backbone="llama3_1",
)
_SMALL = dataclasses.replace(_8B, rope_scaling=RopeScaling(factor=32.0), tied=True)


def _size(base: TextConfig, width: int, mlp: int, layers: int, heads: int, head_dim: int) -> TextConfig:
    return dataclasses.replace(
        base, hidden_size=width, intermediate_size=mlp, num_layers=layers, num_heads=heads, head_dim=head_dim
    )


LANGUAGE = Language(
    name="llama3_1",
    title="Llama 3.1, 3.2 or 3.3",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    template="llama3_1",
    control=(*llama3.CONTROL, "<|eom_id|>"),
    gguf=("llama",),
    gguf_permuted=True,
    settings=decoder_settings("llama3_1"),
    rules=decoder_rules,
    config_json=decoder_json("llama", "LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),
    sizes={
        "llama3.2_1b": _size(_SMALL, 2048, 8192, 16, 32, 64),
        "llama3.2_3b": _size(_SMALL, 3072, 8192, 28, 24, 128),
        "llama3.1_8b": _8B,
        "llama3.1_70b": _size(_8B, 8192, 28672, 80, 64, 128),
    },
)

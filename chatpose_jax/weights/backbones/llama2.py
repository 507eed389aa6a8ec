"""LLaMA-1 and -2 (Touvron et al. 2023), and what was tuned from them, such as Vicuna."""

from __future__ import annotations

from chatpose_jax.models.config import TextConfig
from chatpose_jax.weights.backbones.decoder import decoder_json, decoder_rules, decoder_settings
from chatpose_jax.weights.backbones.family import Language

LANGUAGE = Language(
    name="llama2",
    title="LLaMA-2",
    model_types=("llama", "llava_llama", "llava", "vicuna", "chatpose"),
    architecture="LlamaForCausalLM",
    template="vicuna_v1",
    gguf=("llama",),
    gguf_permuted=True,
    settings=decoder_settings("llama2"),
    rules=decoder_rules,
    config_json=decoder_json("llama", "LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),
    sizes={
        "llama2_7b": TextConfig(
            hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32
        ),
        "llama2_13b": TextConfig(),
    },
)

"""Llama 3 (Grattafiori et al. 2024), before its context was stretched: 8B and 70B of April 2024."""

from __future__ import annotations

from chatpose_jax.models.config import TextConfig
from chatpose_jax.weights.backbones.decoder import decoder_json, decoder_rules, decoder_settings
from chatpose_jax.weights.backbones.family import Language

CONTROL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

LANGUAGE = Language(
    name="llama3",
    title="Llama 3",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    template="llama3",
    control=CONTROL,
    gguf=("llama",),
    gguf_permuted=True,
    settings=decoder_settings("llama3"),
    rules=decoder_rules,
    config_json=decoder_json("llama", "LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),
    sizes={
        "llama3_8b": TextConfig(
            vocab_size=128257,
            base_vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=500000.0,
            max_position_embeddings=8192,
            backbone="llama3",
        )
    },
)

"""SmolLM2 (Allal et al. 2025): small LLaMAs with tied embeddings."""

from __future__ import annotations

from chatpose_jax.models.config import TextConfig
from chatpose_jax.weights.backbones.decoder import decoder_json, decoder_rules, decoder_settings
from chatpose_jax.weights.backbones.family import Language


def _size(width: int, mlp: int, layers: int, heads: int, kv_heads: int, theta: float) -> TextConfig:
    return TextConfig(
        vocab_size=49153,
        base_vocab_size=49152,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=64,
        rope_theta=theta,
        tied=True,
        max_position_embeddings=8192,
        backbone="smollm2",
    )


LANGUAGE = Language(
    name="smollm2",
    title="SmolLM2",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    template="chatml",
    system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    gguf=("llama",),
    gguf_permuted=True,
    settings=decoder_settings("smollm2"),
    rules=decoder_rules,
    config_json=decoder_json("llama", "LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),
    sizes={
        "smollm2_135m": _size(576, 1536, 30, 9, 3, 1e5),
        "smollm2_360m": _size(960, 2560, 32, 15, 5, 1e5),
        "smollm2_1.7b": _size(2048, 8192, 24, 32, 32, 1.3e5),
    },
)

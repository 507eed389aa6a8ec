"""Qwen2 and Qwen2.5 (Yang et al. 2024): biases on queries, keys and values."""

from __future__ import annotations

from chatpose_jax.models.config import TextConfig
from chatpose_jax.weights.backbones.decoder import ANY, decoder_json, decoder_rules, decoder_settings
from chatpose_jax.weights.backbones.family import Language


def _size(
    width: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, rows: int, tied: bool, eps: float
) -> TextConfig:
    return TextConfig(
        vocab_size=rows,
        base_vocab_size=151665,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=eps,
        rope_theta=1e6,
        tied=tied,
        qkv_bias=True,
        max_position_embeddings=32768,
        backbone="qwen2",
    )


LANGUAGE = Language(
    name="qwen2",
    title="Qwen2 or Qwen2.5",
    model_types=("qwen2", "llava_qwen"),
    architecture="Qwen2ForCausalLM",
    template="chatml",
    system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    gguf=("qwen2",),
    settings=decoder_settings(
        "qwen2",
        # Without use_sliding_window the window means nothing.
        demands={"sliding_window": ANY, "attention_bias": ANY},
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        fields={"qkv_bias": True},
    ),
    rules=decoder_rules,
    config_json=decoder_json("qwen2", "Qwen2ForCausalLM", {"use_sliding_window": False}),
    sizes={
        "qwen2.5_0.5b": _size(896, 4864, 24, 14, 2, 64, 151936, True, 1e-6),
        "qwen2.5_1.5b": _size(1536, 8960, 28, 12, 2, 128, 151936, True, 1e-6),
        "qwen2.5_3b": _size(2048, 11008, 36, 16, 2, 128, 151936, True, 1e-6),
        "qwen2.5_7b": _size(3584, 18944, 28, 28, 4, 128, 152064, False, 1e-6),
        "qwen2.5_14b": _size(5120, 13824, 48, 40, 8, 128, 152064, False, 1e-5),
        "qwen2.5_32b": _size(5120, 27648, 64, 40, 8, 128, 152064, False, 1e-5),
    },
)

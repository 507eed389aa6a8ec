"""Qwen3 (Yang et al. 2025), dense: norms of queries and keys, no biases."""

from __future__ import annotations

from chatpose_jax.models.config import TextConfig
from chatpose_jax.weights.backbones.decoder import ANY, decoder_json, decoder_rules, decoder_settings
from chatpose_jax.weights.backbones.family import Language


def _size(width: int, mlp: int, layers: int, heads: int, tied: bool) -> TextConfig:
    return TextConfig(
        vocab_size=151936,
        base_vocab_size=151669,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tied=tied,
        qk_norm=True,
        max_position_embeddings=40960,
        backbone="qwen3",
    )


LANGUAGE = Language(
    name="qwen3",
    title="Qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    template="qwen3",
    gguf=("qwen3",),
    settings=decoder_settings(
        "qwen3",
        # Without use_sliding_window the window means nothing.
        demands={"sliding_window": ANY},
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        fields={"qk_norm": True},
    ),
    rules=decoder_rules,
    config_json=decoder_json("qwen3", "Qwen3ForCausalLM", {"attention_bias": False, "use_sliding_window": False}),
    sizes={
        "qwen3_0.6b": _size(1024, 3072, 28, 16, True),
        "qwen3_1.7b": _size(2048, 6144, 28, 16, True),
        "qwen3_4b": _size(2560, 9728, 36, 32, True),
        "qwen3_8b": _size(4096, 12288, 36, 32, False),
        "qwen3_14b": _size(5120, 17408, 40, 40, False),
        "qwen3_32b": _size(5120, 25600, 64, 64, False),
    },
)

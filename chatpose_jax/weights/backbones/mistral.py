"""Mistral (Jiang et al. 2023) without sliding windows: 7B from version 0.3 on, and Nemo."""

from __future__ import annotations

from chatpose_jax.models.config import TextConfig
from chatpose_jax.processing.conversation import Template
from chatpose_jax.weights.backbones.decoder import decoder_json, decoder_rules, decoder_settings
from chatpose_jax.weights.backbones.family import Language

_INSTRUCT = Template(
    system=None,
    begin="<s>[INST]",
    system_turn="{system}\n\n",
    user_turn="{content}[/INST]",
    answer="",
    end="</s>",
    after="[INST]",
    control=("<s>", "[INST]", "[/INST]", "</s>"),
)

LANGUAGE = Language(
    name="mistral",
    title="Mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    template=_INSTRUCT,
    settings=decoder_settings(
        "mistral",
        # A config.json that does not mention the window has one of this size.
        defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    rules=decoder_rules,
    config_json=decoder_json("mistral", "MistralForCausalLM", {"sliding_window": None}),
    sizes={
        "mistral_7b": TextConfig(
            vocab_size=32769,
            base_vocab_size=32768,
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=1e6,
            max_position_embeddings=32768,
            backbone="mistral",
        )
    },
)

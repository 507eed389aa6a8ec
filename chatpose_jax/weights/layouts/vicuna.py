"""Vicuna, LLaMA-2 or another LLaMA: only the decoder."""

from __future__ import annotations

from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.configs import llama_settings
from chatpose_jax.weights.layouts.table import Layout

LAYOUTS = (
    Layout(
        name="vicuna",
        title="Vicuna, LLaMA-2 or another LLaMA: a decoder",
        family="vicuna",
        rules=parts.llama("model.", "lm_head."),
        ignored=parts.BUFFERS,
        recognise=lambda shapes: "model.embed_tokens.weight" in shapes,
        settings=lambda config, shapes: {"text": llama_settings(config, shapes, "model.")},
    ),
)

"""Only a language model: Vicuna, Llama, Qwen or another family of ``backbones``."""

from __future__ import annotations

from chatpose_jax.weights.backbones import Language
from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.wrapper import Wrapper
from chatpose_jax.weights.table import Layout

NAME, FAMILY = "vicuna", "vicuna"
"""Of the first family that could be read; model folders of earlier versions have it in their names."""


def _layout(language: Language | None) -> Layout:
    assert language is not None
    return Layout(
        name=NAME,
        title=f"{language.title}: a language model",
        family=FAMILY,
        rules=language.rules("model.", "lm_head."),
        ignored=parts.BUFFERS,
        settings=lambda config, shapes: {"text": language.settings(config, shapes, "model.", "")},
        config_json=language.config_json,
        language=language,
    )


WRAPPERS = (
    Wrapper(
        name=NAME,
        title="a language model",
        family=FAMILY,
        recognise=lambda shapes, tower: "model.embed_tokens.weight" in shapes,
        layout=lambda language, tower: _layout(language),
    ),
)

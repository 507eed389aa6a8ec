"""CLIP by itself: the two-tower model as OpenAI released it, or its vision tower (names of transformers 4.x and 5.x)."""

from __future__ import annotations

from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.configs import clip_settings
from chatpose_jax.weights.layouts.table import Ignored, Layout


def _layout(name: str, title: str, tower: str) -> Layout:
    return Layout(
        name=name,
        title=title,
        family="clip",
        rules=parts.clip(tower),
        ignored=(
            *parts.BUFFERS,
            Ignored(r"text_model\..*|text_projection\.weight|logit_scale", "CLIP's text half"),
            Ignored(r"visual_projection\.weight", "maps into CLIP's joint space, which is not used"),
        ),
        unused=parts.clip_unused(tower),
        recognise=lambda shapes: f"{tower}embeddings.class_embedding" in shapes,
        settings=lambda config, shapes: {"vision": clip_settings(config.get("vision_config", config), shapes, tower)},
    )


LAYOUTS = (
    _layout("clip", "CLIP, or its vision tower", "vision_model."),
    _layout("clip_5", "CLIP's vision tower, names of a 5.x state_dict", ""),
)

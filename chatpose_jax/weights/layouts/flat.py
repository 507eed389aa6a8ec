"""Layouts with the tensor names and the flat ``config.json`` of the original LLaVA: LLaVA-1.5, and ChatPose.

ChatPose's checkpoint has merged adapters, and its pose head as ``text_hidden_fcs``. CLIP may be in the checkpoint or separate. LLaVA's projector may
be a separate file (``mm_projector.bin``).
"""

from __future__ import annotations

from typing import Any

from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.config_json import llava_flat_json
from chatpose_jax.weights.layouts.configs import llava_flat_settings, llava_projector_settings
from chatpose_jax.weights.layouts.table import Ignored, Layout

TOWER = "model.vision_tower.vision_tower.vision_model."
# Part → its rules, and the tensor whose presence shows that the checkpoint has the part.
_PARTS = {
    "projector": (parts.projector("model.mm_projector.0", "model.mm_projector.2"), "model.mm_projector.0.weight"),
    "vision": (parts.clip(TOWER), f"{TOWER}embeddings.class_embedding"),
    "pose_head": (
        parts.pose_head("model.text_hidden_fcs.0.0", "model.text_hidden_fcs.0.2"),
        "model.text_hidden_fcs.0.0.weight",
    ),
}


def _layout(name: str, title: str, inside: tuple[str, ...], told_by: tuple[str, ...], **options: Any) -> Layout:
    """inside: parts in the checkpoint, besides the decoder. told_by: parts whose presence or absence identifies the layout."""
    tower = TOWER if "vision" in inside else None
    return Layout(
        name=name,
        title=title,
        rules=(*parts.llama("model.", "lm_head."), *(rule for part in inside for rule in _PARTS[part][0])),
        unused=parts.clip_unused(TOWER) if tower else (),
        recognise=lambda shapes: (
            "model.embed_tokens.weight" in shapes
            and all((_PARTS[part][1] in shapes) == (part in inside) for part in told_by)
        ),
        settings=lambda config, shapes: llava_flat_settings(config, shapes, tower),
        **options,
    )


def _chatpose(name: str, title: str, *inside: str) -> Layout:
    return _layout(
        name,
        title,
        ("projector", "pose_head", *inside),
        ("pose_head", "vision"),
        family="chatpose",
        ignored=(*parts.BUFFERS, Ignored(r"model\.smplx\..*", "the body model comes from a body file")),
        config_json=lambda config: llava_flat_json(config, "llava", "LlavaLlamaForCausalLM"),
    )


def _llava(name: str, title: str, *inside: str) -> Layout:
    return _layout(
        name,
        f"LLaVA-1.5, original names, {title}",
        inside,
        ("projector", "vision"),
        family="llava_original",
        ignored=parts.BUFFERS,
        # Without both parts it has the tensor names of a plain LLaMA.
        configured=lambda config: bool(inside) or any(key.startswith("mm_") for key in config),
        config_json=lambda config: llava_flat_json(config, "llava_llama", "LlavaLlamaForCausalLM"),
    )


def _projector(prefix: str) -> Layout:
    return Layout(
        name="llava_projector",
        title="separate projector of LLaVA",
        family="llava_projector",
        rules=parts.projector(f"{prefix}0", f"{prefix}2"),
        ignored=(),
        recognise=lambda shapes: f"{prefix}0.weight" in shapes and not any("layers." in name for name in shapes),
        settings=lambda config, shapes: llava_projector_settings(config),
    )


CHATPOSE = (
    _chatpose("chatpose", "ChatPose as its authors released it"),
    _chatpose("chatpose_with_clip", "ChatPose, CLIP inside", "vision"),
)
LLAVA = (
    _llava("llava_original", "CLIP inside", "projector", "vision"),
    _llava("llava_original_without_clip", "CLIP beside it", "projector"),
    _llava("llava_original_without_projector", "projector beside it", "vision"),
    _llava("llava_original_decoder", "projector and CLIP beside it"),
    *map(_projector, ("model.mm_projector.", "mm_projector.", "")),
)

"""CHATPOSE-V0: LoRA merged into the decoder, the pose head as ``text_hidden_fcs``, no vision tower (CLIP stands beside
it). What DeepSpeed puts together after training has the tower inside."""

from __future__ import annotations

from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.configs import llava_flat_json, llava_flat_settings
from chatpose_jax.weights.layouts.llava_original import TOWER
from chatpose_jax.weights.layouts.table import Ignored, Layout


def _layout(name: str, title: str, *, tower: bool) -> Layout:
    return Layout(
        name=name,
        title=title,
        family="chatpose",
        rules=(
            *parts.llama("model.", "lm_head."),
            *parts.projector("model.mm_projector.0", "model.mm_projector.2"),
            *parts.pose_head("model.text_hidden_fcs.0.0", "model.text_hidden_fcs.0.2"),
            *(parts.clip(TOWER) if tower else ()),
        ),
        ignored=(*parts.BUFFERS, Ignored(r"model\.smplx\..*", "the body model comes from a body file")),
        unused=parts.clip_unused(TOWER) if tower else (),
        recognise=lambda shapes: (
            "model.text_hidden_fcs.0.0.weight" in shapes and (f"{TOWER}embeddings.class_embedding" in shapes) == tower
        ),
        settings=lambda config, shapes: llava_flat_settings(config, shapes, TOWER if tower else None),
        config_json=lambda config: llava_flat_json(config, "llava", "LlavaLlamaForCausalLM"),
    )


LAYOUTS = (
    _layout("chatpose", "ChatPose as its authors released it", tower=False),
    _layout("chatpose_with_clip", "ChatPose, CLIP inside", tower=True),
)

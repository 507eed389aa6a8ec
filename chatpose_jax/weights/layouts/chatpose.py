"""CHATPOSE-V0: LoRA merged into the decoder, the pose head as ``text_hidden_fcs``, no vision tower (CLIP stands beside
it)."""

from __future__ import annotations

from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.configs import llava_flat_settings
from chatpose_jax.weights.layouts.table import Ignored, Layout

LAYOUTS = (
    Layout(
        name="chatpose",
        title="ChatPose as its authors released it",
        family="chatpose",
        rules=(
            *parts.llama("model.", "lm_head."),
            *parts.projector("model.mm_projector.0", "model.mm_projector.2"),
            *parts.pose_head("model.text_hidden_fcs.0.0", "model.text_hidden_fcs.0.2"),
        ),
        ignored=(*parts.BUFFERS, Ignored(r"model\.smplx\..*", "the body model comes from a body file")),
        recognise=lambda shapes: "model.text_hidden_fcs.0.0.weight" in shapes,
        settings=lambda config, shapes: llava_flat_settings(config, shapes, None),
    ),
)

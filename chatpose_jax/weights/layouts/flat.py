"""Kinds with the tensor names and the flat ``config.json`` of the original LLaVA: LLaVA-1.5, and ChatPose.

ChatPose's checkpoint has merged adapters, and its pose head as ``text_hidden_fcs``. The vision tower may be in the checkpoint or separate. LLaVA's
projector may be a separate file (``mm_projector.bin``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from chatpose_jax.models.config import ModelConfig, VisionConfig
from chatpose_jax.weights.backbones import TOWERS, Language, Tower
from chatpose_jax.weights.backbones.family import demand
from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.wrapper import Wrapper
from chatpose_jax.weights.table import Ignored, Layout, NameRule, Settings, Shape

TOWER = "model.vision_tower.vision_tower.vision_model."
# Part → its rules, and the tensor whose presence shows that the checkpoint has the part. The tower's are its family's.
_PARTS = {
    "projector": (
        (
            *parts.projector("model.mm_projector.0", "model.mm_projector.2"),
            NameRule("model.image_newline", "projector/newline"),
        ),
        "model.mm_projector.0.weight",
    ),
    "pose_head": (
        parts.pose_head("model.text_hidden_fcs.0.0", "model.text_hidden_fcs.0.2"),
        "model.text_hidden_fcs.0.0.weight",
    ),
}


def projector_settings(config: Mapping[str, Any]) -> Settings:
    """Settings of the projector, in ``config.json`` of the original LLaVA or beside a separate projector."""
    demand(config, "", {"mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",)})
    # LLaVA-1.6: a newline after each row of patches of a large image; after the last patch of one view.
    found: Settings = {"image_newline": True} if "unpad" in config.get("mm_patch_merge_type", "") else {}
    return found | (
        {"select_layer": int(config["mm_vision_select_layer"])} if "mm_vision_select_layer" in config else {}
    )


def _has(shapes: Mapping[str, Shape], part: str) -> bool:
    if part == "vision":
        return any(tower.recognise(shapes, TOWER) for tower in TOWERS.values())
    return _PARTS[part][1] in shapes


def _wrapper(
    name: str,
    title: str,
    inside: tuple[str, ...],
    told_by: tuple[str, ...],
    *,
    family: str,
    ignored: tuple[Ignored, ...],
    model_type: str,
    configured: Callable[[Mapping[str, Any]], bool] = lambda config: True,
) -> Wrapper:
    """inside: parts in the checkpoint, besides the decoder. told_by: parts whose presence or absence identifies the kind."""

    def layout(language: Language | None, tower: Tower | None) -> Layout:
        assert language is not None

        def settings(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Settings:
            found: Settings = {
                "text": language.settings(config, shapes, "model.", ""),
                "image_token_id": -200,
                "select_layer": -2,
            } | projector_settings(config)
            if tower is not None:
                found["vision"] = dataclasses.replace(
                    tower.settings({}, shapes, TOWER, ""), select_layer=found["select_layer"]
                )
            return found

        return Layout(
            name=name,
            title=title,
            family=family,
            rules=(
                *language.rules("model.", "lm_head."),
                *(rule for part in inside if part in _PARTS for rule in _PARTS[part][0]),
                *(tower.rules(TOWER) if tower else ()),
            ),
            ignored=ignored,
            unused=tower.unused(TOWER) if tower else (),
            settings=settings,
            config_json=lambda config: _config_json(language, config, model_type),
            language=language,
            tower=tower,
        )

    return Wrapper(
        name=name,
        title=title,
        family=family,
        # Its code takes another layer of SigLIP than config.json says.
        towers=(TOWERS["clip"],) if "vision" in inside else (None,),
        recognise=lambda shapes, tower: (
            "model.embed_tokens.weight" in shapes
            and all(_has(shapes, part) == (part in inside) for part in told_by)
            and (tower is None or tower.recognise(shapes, TOWER))
        ),
        layout=layout,
        configured=configured,
    )


def _config_json(language: Language, config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The flat ``config.json`` of the original LLaVA. It has no sizes of CLIP, only the name of LLaVA-1.5's CLIP, which is written if the tower has
    its shape.
    """
    vision = config.vision
    assert vision is not None
    known = dataclasses.replace(VisionConfig(), select_layer=vision.select_layer)
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"} if vision == known else {}
    return (
        language.config_json(config)
        | {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": model_type,
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": vision.hidden_size,
            "mm_vision_select_layer": vision.select_layer,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
        }
        | ({"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"} if config.image_newline else {})
        | tower
    )


def _chatpose(name: str, title: str, *inside: str) -> Wrapper:
    return _wrapper(
        name,
        title,
        ("projector", "pose_head", *inside),
        ("pose_head", "vision"),
        family="chatpose",
        ignored=(*parts.BUFFERS, Ignored(r"model\.smplx\..*", "the body model comes from a body file")),
        model_type="llava",
    )


def _llava(name: str, title: str, *inside: str) -> Wrapper:
    return _wrapper(
        name,
        f"LLaVA-1.5, original names, {title}",
        inside,
        ("projector", "vision"),
        family="llava_original",
        ignored=parts.BUFFERS,
        model_type="llava_llama",
        # Without both parts it has the tensor names of a plain decoder.
        configured=lambda config: bool(inside) or any(key.startswith("mm_") for key in config),
    )


def _projector(prefix: str) -> Wrapper:
    layout = Layout(
        name="llava_projector",
        title="separate projector of LLaVA",
        family="llava_projector",
        rules=parts.projector(f"{prefix}0", f"{prefix}2"),
        ignored=(),
        settings=lambda config, shapes: projector_settings(config),
    )
    return Wrapper(
        name=layout.name,
        title=layout.title,
        family=layout.family,
        recognise=lambda shapes, tower: f"{prefix}0.weight" in shapes and not any("layers." in name for name in shapes),
        text=None,
        layout=lambda language, tower: layout,
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

"""Plans the export of a whole checkpoint: the base's weights, with the adapters merged into them or left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import DType, ModelConfig, VisionConfig
from chatpose_jax.processing.images import ImageSettings
from chatpose_jax.processing.processor import Processor
from chatpose_jax.processing.tokenizer import IMAGE_LITERAL, RELEASED_POSE
from chatpose_jax.weights import pose_head
from chatpose_jax.weights.adapters import in_words
from chatpose_jax.weights.backbones import LANGUAGES, language, tower
from chatpose_jax.weights.export_model import ExportPlan, StoredModel, head_weights
from chatpose_jax.weights.export_processor import grid_pinpoints, processor_files
from chatpose_jax.weights.folder import TOKENIZER
from chatpose_jax.weights.layouts import decoder, layout_of
from chatpose_jax.weights.passengers import read_passengers, with_kept_settings
from chatpose_jax.weights.table import Layout, Shape
from chatpose_jax.weights.writers import Tensor

WholeFormat = Literal["transformers", "llava", "chatpose"]
WHOLE_FORMATS: tuple[WholeFormat, ...] = get_args(WholeFormat)
# Of the names of llava_transformers, those that every version of transformers reads.
_LAYOUT: dict[WholeFormat, str] = {
    "transformers": "llava_transformers_4",
    "llava": "llava_original",
    "chatpose": "chatpose",
}


def whole_plan(model: StoredModel, format: WholeFormat, dtype: DType) -> ExportPlan:
    """Plans the export of a whole checkpoint in a format of ``WHOLE_FORMATS``. A model without a vision tower is written as its language model.

    Raises UserError if the format does not support the pose head or the families of the model.
    """
    config, notes = model.config, []
    layout = _layout(config, format)
    if format == "chatpose" and pose_head.rotation_of(config.head) != "6d":
        raise UserError(
            f"the format chatpose supports only the pose head 'mlp' with 6D rotations, this model has {config.head}; "
            "choose --format transformers or llava, which write the head to a file of its own"
        )
    if format == "chatpose" and model.pose_token != RELEASED_POSE:
        notes.append(f"the pose token is {model.pose_token}; ChatPose's own code looks for {RELEASED_POSE}")
    if config.lora is None:
        notes.append("the model has no adapters")
    elif model.merged:
        notes.append(f"adapters merged: {in_words(config.lora)}")
    else:
        notes.append("adapters left out: only the base was written (--format peft writes the adapters)")
    if model.merged and dtype != "float32":
        notes.append(f"merged weights are rounded to {dtype}; --dtype float32 keeps them exact")

    passengers, lost = read_passengers(model.passengers, layout, np.dtype(dtype))
    vision, unused = config.vision, list[Tensor]()
    if vision is not None:
        vision, unused, tower_note = _tower(layout, vision, passengers, dtype)
        notes += [tower_note] if tower_note else []
    if lost:
        notes.append(
            f"left out: {len(lost)} unused tensors of the source that have no name in this format: {', '.join(lost[:3])}, …"[
                :200
            ]
        )

    image_id, new_tokens, more_rows = config.image_token_id, [], 0
    if format == "transformers" and vision is not None and image_id < 0:
        if IMAGE_LITERAL in model.tokens.control:  # it may lie inside the base vocabulary
            image_id = model.tokens.control[IMAGE_LITERAL]
        else:
            image_id, new_tokens = model.tokens.size, [IMAGE_LITERAL]
            more_rows = max(0, image_id + 1 - config.text.vocab_size)
            row = "a new one, the mean of the others" if more_rows else "a spare one"
            notes.append(f"transformers needs a row for {IMAGE_LITERAL}: id {image_id}, {row}")
    result = config.replace(
        vision=vision,
        text=dataclasses.replace(config.text, vocab_size=config.text.vocab_size + more_rows),
        image_token_id=image_id,
        param_dtype=dtype,
        dtype=dtype,
    )
    tensors = [*model.tensors(layout.rules, dtype, more_rows), *passengers.values(), *unused]
    weights: dict[str, Sequence[Tensor]] = {"model": tensors}
    assert layout.config_json is not None
    files: dict[str, Any] = {}
    if format != "chatpose":
        weights |= head_weights(model)
        files[pose_head.DESCRIPTION] = pose_head.describe_head(config, model.pose_token)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files["generation_config.json"] = {name: id for name, id in ids.items() if id >= 0}
    if config.other_eos_token_ids:
        files["generation_config.json"]["eos_token_id"] = list(config.end_token_ids)
    files["config.json"] = layout.config_json(result)
    if any(place and place[0].target.startswith("vision/pooling/") for place in map(layout.locate, passengers)):
        files["config.json"]["vision_config"]["vision_use_head"] = True
    if vision is None or config.image_newline:
        files |= with_kept_settings(files, model.passengers, config.eos_token_id)
    if format == "transformers" and vision is not None:
        if config.image_newline:
            # The model and its image processor must choose the same views: transformers counts them in both.
            files["config.json"].setdefault("image_grid_pinpoints", grid_pinpoints(config))
        files |= processor_files(config, _images(model), files["config.json"].get("image_grid_pinpoints"))
    images = _images(model)
    if images is not None and images.fit != "crop":
        done = {"pad": "padded", "stretch": "stretched"}[images.fit]
        if format == "llava":
            files["config.json"]["image_aspect_ratio"] = {"pad": "pad", "stretch": "anyres"}[images.fit]
        elif format == "chatpose":
            notes.append(f"images were {done} to a square here; ChatPose's own code crops the centre")
    return ExportPlan(weights, files, notes, new_tokens)


def _layout(config: ModelConfig, format: WholeFormat) -> Layout:
    text = language(config.text.backbone)
    if format != "transformers" and (config.vision is None or text.architecture != LANGUAGES["llama2"].architecture):
        what = f"{text.title}{' without a vision tower' if config.vision is None else ''}"
        raise UserError(
            f"the format {format} is of LLaMAs that see; this model is {what}; choose --format transformers"
        )
    if config.vision is None:
        return layout_of(decoder.NAME, text)
    if format != "transformers" and config.vision.backbone != "clip":
        raise UserError(
            f"the format {format} has CLIP as its vision tower, this model has {tower(config.vision.backbone).title}; choose --format transformers"
        )
    if format == "chatpose" and config.image_newline:
        raise UserError("the format chatpose has no newline after an image; choose --format transformers or llava")
    return layout_of(_LAYOUT[format], text, tower(config.vision.backbone))


def _tower(
    layout: Layout, vision: VisionConfig, passengers: dict[str, Tensor], dtype: str
) -> tuple[VisionConfig, list[Tensor], str]:
    """Completes the vision tower: returns its configuration in the result, tensors to add, and a note for the user.

    With its passengers the tower is complete. Without them it ends at the last block that the model uses, and the configuration says so.
    """
    if "vision" not in layout.parts:
        return (
            vision,
            [],
            (
                "the vision tower is left out, as in CHATPOSE-V0, whose code loads CLIP's own (--vision when converting back); "
                "if it was trained, choose --format transformers or llava"
            ),
        )
    used, total = vision.num_used_layers, vision.num_layers
    rules = [rule for rule in layout.rules if rule.stacked and rule.target.startswith("vision/")]
    rest = {name for rule in rules for name in rule.sources(total)[used:]}
    norm = {rule.source: rule for rule in layout.unused if rule.target.startswith("vision/post_norm/")}
    if all(name in passengers for name in (*rest, *norm)):
        return vision, [], ""
    for name in rest:
        passengers.pop(name, None)
    neutral = [
        _constant(name, (vision.hidden_size,), float(rule.target.endswith("scale")), dtype)
        for name, rule in norm.items()
        if name not in passengers
    ]
    note = f"the vision tower ends after block {used}, whose output is used; the model folder does not contain the later blocks"
    return dataclasses.replace(vision, num_layers=used, select_layer=-1), neutral, note


def _constant(name: str, shape: Shape, value: float, dtype: str) -> Tensor:
    return Tensor(name, np.dtype(dtype), shape, lambda: iter([np.full(shape, value, np.dtype(dtype))]))


def _images(model: StoredModel) -> ImageSettings | None:
    return Processor.load(model.folder / TOKENIZER, model.config).images

"""Exports a model folder as a PyTorch checkpoint, with the name tables of ``layouts`` in reverse.

Values are read, changed and written block by block, so memory does not grow with the model. It does not need torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from tqdm import tqdm

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import DType, VisionConfig
from chatpose_jax.models.heads.base import PoseHead
from chatpose_jax.processing.images import ImageSettings
from chatpose_jax.processing.processor import Processor
from chatpose_jax.processing.tokenizer import IMAGE_LITERAL, RELEASED_POSE
from chatpose_jax.weights import pose_head
from chatpose_jax.weights.adapters import in_words
from chatpose_jax.weights.export_model import ExportPlan, StoredModel, head_weights
from chatpose_jax.weights.export_peft import BASE_CLASSES, adapter_plan
from chatpose_jax.weights.folder import PASSENGERS, TOKENIZER, explained, load_model_config, new_folder
from chatpose_jax.weights.layouts import LAYOUTS, Layout, Shape
from chatpose_jax.weights.passengers import read_passengers
from chatpose_jax.weights.tokens import read_tokens, write_tokenizer
from chatpose_jax.weights.writers import Tensor, parse_bytes, write_sharded

Format = Literal["transformers", "llava", "chatpose", "peft"]
FORMATS: tuple[Format, ...] = get_args(Format)
_LAYOUT = {layout.name: layout for layout in LAYOUTS}
# The names that every version of transformers reads.
_WHOLE = {"transformers": "llava_transformers_4", "llava": "llava_original", "chatpose": "chatpose"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: the files of weights, their size in bytes, and notes for the user of the result."""

    files: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...]


def export(
    folder: str | Path,
    out: str | Path,
    format: str,
    *,
    merge: bool = True,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    base_name: str | None = None,
    base_class: str = "llava",
    with_projector: bool = False,
    progress: bool = False,
    head: str | type[PoseHead] | None = None,
) -> Exported:
    """Writes a model folder in a format of PyTorch programs.

    Args:
        folder: model folder.
        out: folder to write; must not exist.
        format: ``transformers`` (``LlavaForConditionalGeneration``), ``llava`` (LLaVA-1.5's own names), ``chatpose``
            (CHATPOSE-V0's names, with the pose head), or ``peft`` (adapters, added token rows and pose head, without
            the base).
        merge: replace an adapted W by ``W + (alpha / rank) A B``, computed in float32. ``False`` leaves the adapters out: the result is the base
            of ``peft``. Not for ``peft``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the base's, as stored; for ``peft`` float32.
        max_shard_size: largest size of one file, such as ``"5GB"``.
        base_name: name or folder of the base that the adapter belongs to, for ``peft``.
        base_class: for ``peft``: the class that loads the base, ``llava`` (LlavaForConditionalGeneration) or
            ``llama`` (LlamaForCausalLM).
        with_projector: for ``peft``: write the projector too, as one of ``modules_to_save``, if it was trained.
        head: the folder's pose head, if it is from a package of your own; see ``folder.load_model_config``.
        progress: show a progress bar on standard error.

    Raises:
        UserError: not a model folder, ``out`` exists, nothing to export in this format, or a full disk. Nothing is
            left behind.
    """
    if format not in FORMATS:
        raise UserError(f"no format {format!r}; expected one of {', '.join(FORMATS)}")
    if base_class not in BASE_CLASSES:
        raise UserError(f"no base class {base_class!r}; expected one of {', '.join(BASE_CLASSES)}")
    if dtype is not None and dtype not in get_args(DType):
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(get_args(DType))}, or none for the stored one")
    if with_projector and format != "peft":
        raise UserError(
            f"--with-projector is for --format peft: {format} holds the projector in any case; leave it out"
        )
    folder, out, limit = Path(folder), Path(out), parse_bytes(max_shard_size)
    config = load_model_config(folder, head)
    model = StoredModel(folder, config, read_tokens(folder / TOKENIZER), merge and format != "peft")
    if format == "peft":
        plan = adapter_plan(model, dtype or "float32", base_name, base_class, with_projector)
    else:
        plan = _whole(model, cast(Format, format), cast(DType, dtype or config.param_dtype))
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder")
    nbytes = sum(tensor.nbytes for tensors in plan.weights.values() for tensor in tensors)
    bar = tqdm(total=nbytes, unit="B", unit_scale=True, desc="exporting", disable=not progress)
    files: list[str] = []
    needs = f"the export needs {nbytes / 1e9:.2g} GB"
    with explained(out, needs, too_large="--max-shard-size makes smaller files"), new_folder(out) as partial, bar:
        for stem, tensors in plan.weights.items():
            # peft reads one file of weights, and the reader of a head does too.
            files += write_sharded(partial, tensors, limit if stem == "model" else nbytes, bar.update, stem)
        write_tokenizer(model.tokens, partial, plan.new_tokens)
        for name, data in plan.json_files.items():  # config.json is last, because nothing loads without it
            (partial / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Exported(tuple(files), nbytes, tuple(plan.notes))


# ----------------------------------------------------------------------------------------------------- whole checkpoints


def _whole(model: StoredModel, format: Format, dtype: DType) -> ExportPlan:
    layout, config, notes = _LAYOUT[_WHOLE[format]], model.config, []
    if format == "chatpose" and pose_head.rotation_of(config.head) != "6d":
        raise UserError(
            f"the format chatpose has a place for the pose head 'mlp' with 6D rotations only, this model has {config.head}; "
            "choose --format transformers or llava, which lay the head beside the weights"
        )
    if format == "chatpose" and model.pose_token != RELEASED_POSE:
        notes.append(f"the pose token is spelt {model.pose_token}; ChatPose's own code looks for {RELEASED_POSE}")
    if config.lora is None:
        notes.append("no adapters in this model: the weights are its own")
    elif model.merged:
        notes.append(f"adapters merged: {in_words(config.lora)}")
    else:
        notes.append("adapters left out: this is the base alone (--format peft writes them)")
    if model.merged and dtype != "float32":
        notes.append(f"merged weights are rounded to {dtype}; --dtype float32 keeps them exact")

    riders, lost = read_passengers(model.folder / PASSENGERS, layout, np.dtype(dtype))
    vision, unused, tower_note = _tower(layout, config.vision, riders, dtype)
    if tower_note:
        notes.append(tower_note)
    if lost:
        notes.append(f"{len(lost)} tensors that nothing reads have no place here: {', '.join(lost[:3])}, …"[:200])

    image_id, new_tokens, more_rows = config.image_token_id, [], 0
    if format == "transformers" and image_id < 0:
        if IMAGE_LITERAL in model.tokens.added:
            image_id = model.tokens.added[IMAGE_LITERAL]
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
    tensors = [*model.tensors(layout.rules, dtype, more_rows), *riders.values(), *unused]
    weights: dict[str, Sequence[Tensor]] = {"model": tensors}
    assert layout.config_json is not None
    files: dict[str, Any] = {}
    if format == "transformers":
        files |= _processor_files(model)
    if format != "chatpose":
        weights |= head_weights(model)
        files[pose_head.DESCRIPTION] = pose_head.describe_head(config, model.pose_token)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files["generation_config.json"] = {name: id for name, id in ids.items() if id >= 0}
    files["config.json"] = layout.config_json(result)
    if _images(model).fit == "pad":
        if format == "llava":
            files["config.json"]["image_aspect_ratio"] = "pad"
        elif format == "chatpose":
            notes.append("images were padded to a square here; ChatPose's own code crops the centre")
    return ExportPlan(weights, files, notes, new_tokens)


def _tower(
    layout: Layout, vision: VisionConfig, riders: dict[str, Tensor], dtype: str
) -> tuple[VisionConfig, list[Tensor], str]:
    """Completes the vision tower: returns its configuration in the result, tensors to add, and a note for the user.

    With its passengers the tower is complete. Without them it ends at the last block that the model uses, and the configuration says so.
    """
    if "vision" not in layout.parts:
        return (
            vision,
            [],
            (
                "the vision tower is left out, as in CHATPOSE-V0: CLIP's own takes its place (--vision when converting back); "
                "if it was trained, choose --format transformers or llava"
            ),
        )
    used, total = vision.num_used_layers, vision.num_layers
    rules = [rule for rule in layout.rules if rule.stacked and rule.target.startswith("vision/")]
    rest = {name for rule in rules for name in rule.sources(total)[used:]}
    unused = {rule.source: rule for rule in layout.unused}
    if all(name in riders for name in (*rest, *unused)):
        return vision, [], ""
    for name in rest:
        riders.pop(name, None)
    neutral = [
        _constant(name, (vision.hidden_size,), float(rule.target.endswith("scale")), dtype)
        for name, rule in unused.items()
        if name not in riders
    ]
    note = (
        f"the vision tower ends after block {used}, which is the one that is read; the rest is not in the model folder"
    )
    return dataclasses.replace(vision, num_layers=used, select_layer=-1), neutral, note


def _constant(name: str, shape: Shape, value: float, dtype: str) -> Tensor:
    return Tensor(name, np.dtype(dtype), shape, lambda: iter([np.full(shape, value, np.dtype(dtype))]))


def _images(model: StoredModel) -> ImageSettings:
    return Processor.load(model.folder / TOKENIZER, model.config).images


def _processor_files(model: StoredModel) -> dict[str, Any]:
    """The files that transformers' ``AutoProcessor`` reads."""
    images = _images(model)
    pad = images.fit == "pad"
    preprocessor = {
        "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **({"do_pad": True} if pad else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": images.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": images.size, "width": images.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_LITERAL,
        "patch_size": model.config.vision.patch_size,
        "num_additional_image_tokens": 1,  # CLIP's class token
        "vision_feature_select_strategy": "default",
    }
    return {"preprocessor_config.json": preprocessor, "processor_config.json": processor}

"""Model folder → checkpoint of the PyTorch world: the name tables of ``layouts``, read backwards.

Values are read, changed and written block by block, so memory does not grow with the model; torch is not needed.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from tqdm import tqdm

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import DType, ModelConfig, VisionConfig
from chatpose_jax.processing.images import ImageSettings
from chatpose_jax.processing.processor import SETTINGS_FILE, Processor
from chatpose_jax.processing.tokenizer import IMAGE_LITERAL
from chatpose_jax.weights import adapters, pose_head
from chatpose_jax.weights.arrays import Stored
from chatpose_jax.weights.folder import PARAMS, PASSENGERS, TOKENIZER, load_config, new_folder
from chatpose_jax.weights.layouts import LAYOUTS, Layout, Rule, Shape
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.plan import copy_array
from chatpose_jax.weights.readers import TensorEntry, read_safetensors_header
from chatpose_jax.weights.tokens import Tokens, read_tokens, write_tokenizer
from chatpose_jax.weights.writers import (
    Tensor,
    copied,
    parse_bytes,
    row_blocks,
    write_sharded,
)

Format = Literal["transformers", "llava", "chatpose", "peft"]
BaseClass = Literal["llava", "llama"]
FORMATS: tuple[Format, ...] = get_args(Format)
BASE_CLASSES: tuple[BaseClass, ...] = get_args(BaseClass)
_LAYOUT = {layout.name: layout for layout in LAYOUTS}
# Of the names that transformers has had, those that every version reads.
_WHOLE = {"transformers": "llava_transformers_4", "llava": "llava_original", "chatpose": "chatpose"}
# PEFT knows modules by their names in memory.
_IN_MEMORY = {"llava": "llava_transformers_5_state_dict", "llama": "vicuna"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: files with weights, their bytes, and in words what a reader of the result must know."""

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
) -> Exported:
    """Writes a model folder as PyTorch programs read it.

    Args:
        folder: model folder.
        out: folder to write; must not exist.
        format: ``transformers`` (``LlavaForConditionalGeneration``), ``llava`` (LLaVA-1.5's own names), ``chatpose``
            (CHATPOSE-V0's names, the pose head among them), or ``peft`` (adapters, added token rows and head, without
            the base).
        merge: put ``W + (alpha / rank) A B``, computed in float32, in the place of an adapted W. ``False`` leaves the
            adapters out: the base that ``peft`` belongs to. Not for ``peft``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the base's, as stored; for ``peft`` float32.
        max_shard_size: of one file, such as ``"5GB"``.
        base_name: name or folder of the base that the adapter belongs to, for ``peft``.
        base_class: for ``peft``: which model the base is loaded as, ``llava`` (LlavaForConditionalGeneration) or
            ``llama`` (LlamaForCausalLM).
        with_projector: for ``peft``: the projector too, as one of ``modules_to_save``, where it was trained.
        progress: show a progress bar on standard error.

    Raises:
        UserError: not a model folder, ``out`` exists, nothing to export in this format, or a full disk; then nothing
            is left behind.
    """
    if format not in FORMATS:
        raise UserError(f"no format {format!r}; expected one of {', '.join(FORMATS)}")
    if base_class not in BASE_CLASSES:
        raise UserError(f"no base class {base_class!r}; expected one of {', '.join(BASE_CLASSES)}")
    if dtype is not None and dtype not in get_args(DType):
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(get_args(DType))}, or none for the stored one")
    folder, out, limit = Path(folder), Path(out), parse_bytes(max_shard_size)
    config = load_config(folder)
    model = _Model(folder, config, read_tokens(folder / TOKENIZER), merge and format != "peft")
    if format == "peft":
        plan = _adapter(model, dtype or "float32", base_name, base_class, with_projector)
    else:
        plan = _whole(model, cast(Format, format), cast(DType, dtype or config.param_dtype))
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder")
    nbytes = sum(tensor.nbytes for tensors in plan.weights.values() for tensor in tensors)
    bar = tqdm(total=nbytes, unit="B", unit_scale=True, desc="exporting", disable=not progress)
    files: list[str] = []
    try:
        with bar, new_folder(out) as partial:
            for stem, tensors in plan.weights.items():
                # peft reads one file, and so do we of a head.
                files += write_sharded(partial, tensors, limit if stem == "model" else nbytes, bar.update, stem)
            write_tokenizer(model.tokens, partial, plan.new_tokens)
            if (settings := folder / TOKENIZER / SETTINGS_FILE).is_file():
                shutil.copyfile(settings, partial / SETTINGS_FILE)
            for name, data in plan.json_files.items():  # config.json last: nothing loads without it
                (partial / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{out}: the disk is full; the export needs {nbytes / 1e9:.1f} GB; nothing was left behind"
            ) from None
        raise
    return Exported(tuple(files), nbytes, tuple(plan.notes))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """weights: file name without suffix → tensors. json_files: name → content. notes: for the user."""

    weights: Mapping[str, Sequence[Tensor]]
    json_files: Mapping[str, Any]
    notes: Sequence[str]
    new_tokens: Sequence[str] = ()


# --------------------------------------------------------------------------------------------------------------- values


class _Model:
    """The parameters of a model folder, read box by box as the base's weights, adapters merged or left out."""

    def __init__(self, folder: Path, config: ModelConfig, tokens: Tokens, merge: bool):
        self.folder, self.config, self.tokens = folder, config, tokens
        self.stored = Stored(folder / PARAMS)
        self.shapes = {
            path: leaf.shape for path, leaf in by_path(abstract_params(config.replace(scan_layers=True))).items()
        }
        absent = [path for path, shape in self.shapes.items() if 0 not in shape and path not in self.stored.shapes]
        wrong = [path for path in self.stored.shapes if self.stored.shapes[path].shape != self.shapes.get(path)]
        if absent or wrong:
            raise UserError(f"{folder}: params/ and config.json disagree at {', '.join((absent + wrong)[:6])}")
        self.merged = merge and config.lora is not None

    @property
    def pose_token(self) -> str:
        """Its literal in the vocabulary."""
        return next(text for text, id in self.tokens.added.items() if id == self.config.pose_token_id)

    def read(self, path: str, layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        """A box of a leaf, or of one layer of it: as stored, or in float32 where something is computed."""
        at = () if layer is None else (layer,)
        values = self.stored.read(path, (*at, *index))
        parent = path.removesuffix("/kernel")
        if (scale := f"{parent}/kernel_scale") in self.shapes:
            values = values.astype(np.float32) * self.stored.read(scale, (*at, index[1]))
        if self.merged and parent != path and f"{parent}/lora_a" in self.shapes:
            assert self.config.lora is not None
            a = self.stored.read(f"{parent}/lora_a", (*at, index[0]))
            b = self.stored.read(f"{parent}/lora_b", (*at, slice(None), index[1]))
            values = values.astype(np.float32) + np.float32(self.config.lora.scale) * (a @ b)
        return values

    def tensors(self, rules: Sequence[Rule], dtype: Any, more_rows: int = 0) -> list[Tensor]:
        """What the rows of a table write, layer by layer. ``more_rows``: of embedding and LM head."""
        together: dict[str, list[Rule]] = {}
        for rule in rules:
            if 0 not in self.shapes[rule.target]:
                together.setdefault(rule.source, []).append(rule)
        found = []
        for layer in (None, *range(max((self.shapes[rule.target][0] for rule in rules if rule.stacked), default=0))):
            for source, group in together.items():
                if group[0].stacked == (layer is not None) and (layer or 0) < self.shapes[group[0].target][0]:
                    extra = more_rows if group[0].rows == "base" else 0
                    found.append(self._tensor(source.replace("{i}", str(layer)), group, layer, np.dtype(dtype), extra))
        return found

    def _tensor(self, name: str, rules: Sequence[Rule], layer: int | None, dtype: np.dtype, more_rows: int) -> Tensor:
        leaves = [self.shapes[rule.target][layer is not None :] for rule in rules]
        shapes = [rule.transform.source_shape(leaf) for rule, leaf in zip(rules, leaves)]
        rows = sum(shape[0] for shape in shapes)

        def blocks() -> Iterator[np.ndarray]:
            total = np.zeros(shapes[0][1:], np.float64)
            for rule, leaf, shape in zip(rules, leaves, shapes):
                axis = rule.transform.row_axis % len(leaf)
                chunk = self.stored.chunk(rule.target)[layer is not None :][axis]
                for box in row_blocks(shape, max(dtype.itemsize, 4), chunk):
                    index = tuple(box[0] if i == axis else slice(0, n) for i, n in enumerate(leaf))
                    values = rule.transform.inverse(self.read(rule.target, layer, index))
                    out = np.empty(values.shape, dtype)
                    copy_array(out, values)
                    if more_rows:
                        total += out.astype(np.float32).sum(0, dtype=np.float64)
                    yield out
            if more_rows:
                yield np.repeat((total / rows).astype(np.float32)[None], more_rows, 0).astype(dtype)

        return Tensor(name, dtype, (rows + more_rows, *shapes[0][1:]), blocks)


# ----------------------------------------------------------------------------------------------------- whole checkpoints


def _whole(model: _Model, format: Format, dtype: DType) -> _Plan:
    layout, config, notes = _LAYOUT[_WHOLE[format]], model.config, []
    if format == "chatpose" and config.head.name != "mlp":
        raise UserError(
            f"the format chatpose has a place for the pose head 'mlp' only, this model has {config.head.name!r}; "
            "choose --format transformers or llava, which lay the head beside the weights"
        )
    if config.lora is None:
        notes.append("no adapters in this model: the weights are its own")
    elif model.merged:
        notes.append(f"adapters merged: {_lora_words(config)}")
    else:
        notes.append("adapters left out: this is the base alone (--format peft writes them)")
    if model.merged and dtype != "float32":
        notes.append(f"merged weights are rounded to {dtype}; --dtype float32 keeps them exact")

    riders, lost = _passengers(model, layout, np.dtype(dtype))
    vision, unused, tower_note = _tower(layout, config.vision, riders, dtype)
    if tower_note:
        notes.append(tower_note)
    if vision is None:  # the tower cannot be whole, and this layout has no way to say so
        layout, vision = _LAYOUT["llava_original_without_clip"], config.vision
    if lost:
        notes.append(f"{len(lost)} tensors that nothing reads have no place here: {', '.join(lost[:3])}, …"[:200])

    image_id, new_tokens, more_rows = config.image_token_id, [], 0
    if format == "transformers" and image_id < 0:
        if IMAGE_LITERAL in model.tokens.added:
            image_id = model.tokens.added[IMAGE_LITERAL]
        else:
            image_id, new_tokens = model.tokens.size, [IMAGE_LITERAL]
            more_rows = max(0, image_id + 1 - config.text.vocab_size)
            notes.append(f"transformers needs a row for {IMAGE_LITERAL}: id {image_id}, the mean of the others")
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
        weights |= _head_weights(model)
        files[pose_head.DESCRIPTION] = pose_head.describe(config, model.pose_token)
    files["generation_config.json"] = _generation(config)
    files["config.json"] = layout.config_json(result)
    return _Plan(weights, files, notes, new_tokens)


def _lora_words(config: ModelConfig) -> str:
    lora = config.lora
    assert lora is not None
    return f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"


def _passengers(model: _Model, layout: Layout, dtype: np.dtype) -> tuple[dict[str, Tensor], list[str]]:
    """What the model did not use and has carried along, under its names in ``layout``; and the names that have no
    place there. Weights are cast with the rest, buffers stay as they are."""
    placed: dict[str, Tensor] = {}
    lost = []
    for file in sorted((model.folder / PASSENGERS).glob("*.safetensors")):
        origin = _LAYOUT.get(file.stem)
        if origin is None:
            raise UserError(f"{file}: named after no layout that is known; it was written by a later version: upgrade")
        for name, entry in read_safetensors_header(file).items():
            there = origin.translate(name, layout)
            if there is None:
                lost.append(name)
            else:
                placed[there] = (
                    _cast(copied(entry, there), entry, dtype) if origin.locate(name) else copied(entry, there)
                )
    return placed, lost


def _cast(tensor: Tensor, entry: TensorEntry, dtype: np.dtype) -> Tensor:
    if entry.dtype == dtype:
        return tensor
    blocks = tensor.blocks
    return dataclasses.replace(tensor, dtype=dtype, blocks=lambda: (block.astype(dtype) for block in blocks()))


def _tower(
    layout: Layout, vision: VisionConfig, riders: dict[str, Tensor], dtype: str
) -> tuple[VisionConfig | None, list[Tensor], str]:
    """Completes the vision tower: its configuration in the result, tensors to add, and what to tell the user.

    Whole with passengers. Without them transformers gets a tower that ends where it is read; layouts that only name
    CLIP get none (``None``)."""
    if "vision" not in layout.parts:
        return vision, [], "the vision tower is left out: this layout names CLIP's folder instead"
    used, total = vision.num_used_layers, vision.num_layers
    rest = {
        name
        for rule in layout.rules
        if rule.stacked and rule.target.startswith("vision/")
        for name in rule.sources(total)[used:]
    }
    unused = {rule.source: rule for rule in layout.unused}
    if all(name in riders for name in (*rest, *unused)):
        return vision, [], ""
    if layout.family != "llava_transformers":
        for name in list(riders):
            if (place := layout.locate(name)) and place[0].target.startswith("vision/"):
                del riders[name]
        return (
            None,
            [],
            (
                f"the vision tower is left out: its blocks behind {used} are not in the model folder; take CLIP's own "
                "(--vision when converting back)"
            ),
        )
    for name in rest:
        riders.pop(name, None)
    missing = {name: rule for name, rule in unused.items() if name not in riders}
    added = [
        _constant(name, (vision.hidden_size,), float(rule.target.endswith("scale")), dtype)
        for name, rule in missing.items()
    ]
    note = (
        f"the vision tower ends after block {used}, which is the one that is read; the rest is not in the model folder"
    )
    return dataclasses.replace(vision, num_layers=used, select_layer=-1), added, note


def _constant(name: str, shape: Shape, value: float, dtype: str) -> Tensor:
    return Tensor(name, np.dtype(dtype), shape, lambda: iter([np.full(shape, value, np.dtype(dtype))]))


def _head_weights(model: _Model) -> dict[str, Sequence[Tensor]]:
    paths = [path for path in model.shapes if path.startswith("pose_head/")]
    stem = pose_head.WEIGHTS.removesuffix(".safetensors")
    return {stem: model.tensors(pose_head.rules(model.config.head, paths), np.float32)}


def _generation(config: ModelConfig) -> dict[str, Any]:
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: id for name, id in ids.items() if id >= 0}


def _processor_files(model: _Model) -> dict[str, Any]:
    """What transformers' ``AutoProcessor`` reads."""
    images: ImageSettings = Processor.load(model.folder / TOKENIZER, model.config).images
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


# -------------------------------------------------------------------------------------------------------------- adapters


def _adapter(model: _Model, dtype: str, base_name: str | None, base_class: BaseClass, with_projector: bool) -> _Plan:
    config, layout = model.config, _LAYOUT[_IN_MEMORY[base_class]]
    lora, text = config.lora, config.text
    if lora is None:
        raise UserError(
            f"{model.folder}: no adapters in this model, so there is nothing for peft; choose --format transformers, llava or "
            "chatpose (adapters come from training with model.lora, or from convert --adapter)"
        )
    if with_projector and "projector" not in layout.parts:
        raise UserError("a LlamaForCausalLM has no projector; leave --with-projector out, or say --base-class llava")
    rules = [rule for rule in layout.lora if rule.target in model.shapes]
    ids = list(range(text.base_vocab_size, text.vocab_size))
    for rule in layout.rules if ids else ():
        if rule.rows == "added":
            name = rule.source.removesuffix(".weight") + adapters.TOKEN_ROWS
            rules.append(dataclasses.replace(rule, source=name, rows="all"))
    if with_projector:
        rules += [rule for rule in layout.rules if rule.target.startswith("projector/")]
    tensors = [
        dataclasses.replace(tensor, name=adapters.PREFIX + tensor.name) for tensor in model.tensors(rules, dtype)
    ]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if base_class == "llama" else None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        # CLIP has projections of the same names, so the decoder's are said in full.
        "target_modules": rf".*layers\.\d+\.(self_attn|mlp)\.({'|'.join(lora.targets)})"
        if base_class == "llama"
        else rf".*language_model.*\.({'|'.join(lora.targets)})",
        "modules_to_save": ["multi_modal_projector"] if with_projector else None,
        "trainable_token_indices": {"embed_tokens": ids, "lm_head": ids} if ids else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    files = {
        pose_head.DESCRIPTION: pose_head.describe(config, model.pose_token),
        adapters.ADAPTER_CONFIG: settings,
    }
    notes = [
        f"adapters: {_lora_words(config)}",
        "the base is not in it: peft loads it onto the base that you started from",
    ]
    if ids:
        notes.append(
            f"token rows {ids[0]} to {ids[-1]} of embedding and LM head; a base with fewer than {text.vocab_size} rows needs "
            f"resize_token_embeddings({text.vocab_size}) first"
        )
    if not with_projector and base_class == "llava":
        notes.append("the projector is the base's; if it was trained, say --with-projector")
    return _Plan({"adapter_model": tensors, **_head_weights(model)}, files, notes)

"""Plans the export of adapters as a PEFT folder."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.weights import adapters, pose_head
from chatpose_jax.weights.adapter_config import ADAPTER_CONFIG
from chatpose_jax.weights.backbones import language
from chatpose_jax.weights.export_model import ExportPlan, StoredModel, head_weights
from chatpose_jax.weights.layouts import layout_of
from chatpose_jax.weights.passengers import Changes, read_changes
from chatpose_jax.weights.readers import TensorEntry
from chatpose_jax.weights.table import NameRule
from chatpose_jax.weights.writers import Tensor

BaseClass = Literal["llava", "llama"]
BASE_CLASSES: tuple[BaseClass, ...] = get_args(BaseClass)
_NEEDS = {"llava": "peft 0.15, transformers 4.52 and later", "llama": "peft 0.15 and later"}
_TIED_NEEDS = "peft 0.18 and later"
"""For a whole embedding that the LM head shares (``ensure_weight_tying``)."""
# PEFT knows modules by their names in memory.
_LAYOUT = {"llava": "llava_transformers_5_state_dict", "llama": "vicuna"}


def adapter_plan(
    model: StoredModel, dtype: str, base_name: str | None, base_class: BaseClass | None, with_projector: bool
) -> ExportPlan:
    """Plans the export of adapters, added token rows and pose head as a PEFT folder. Raises UserError if the model has no adapters, or if its
    source's adapter changed the base in a way that PEFT cannot express.

    base_class: by default the one of the model: with a vision tower, or the language model alone.
    """
    sees = model.config.vision is not None
    base_class = base_class or ("llava" if sees else "llama")
    if base_class == "llava" and not sees:
        raise UserError("the model has no vision tower, so its base is no LLaVA; leave --base-class out")
    config, layout = model.config, layout_of(_LAYOUT[base_class], language(model.config.text.backbone))
    lora, text = config.lora, config.text
    if lora is None:
        raise UserError(
            f"{model.folder}: the model has no adapters to write for peft; choose --format transformers, llava or "
            "chatpose (adapters come from training with model.lora, or from convert --adapter)"
        )
    changed = read_changes(model.passengers, model.folder)
    if with_projector and "projector" not in layout.parts:
        raise UserError(
            f"a {language(config.text.backbone).architecture} has no projector; leave --with-projector out, or choose --base-class llava"
        )
    saved = ["multi_modal_projector"] if with_projector or ("projector" in changed.whole & layout.parts) else []
    rules = [rule for rule in layout.lora if rule.target in model.shapes]
    adapted = _adapted_layers(model)
    rules += [rule for rule in layout.rules if saved and rule.target.startswith("projector/")]
    rows, token_rows = {}, []
    # peft gives a tied LM head the rows of the embedding.
    for module in ("embed_tokens",) if text.tied else ("embed_tokens", "lm_head"):
        pair = [rule for rule in layout.rules if rule.target.startswith(f"decoder/{module}/")]
        if module in changed.whole:
            saved.append(module)
            rules += pair
        elif ids := [*changed.rows.get(module, ()), *range(text.base_vocab_size, text.vocab_size)]:
            rows[module] = ids
            table = _token_rows(model, pair, ids, np.dtype(dtype))
            token_rows.append(_with_originals(table, pair[0].target, model, changed, ids))
    paths = {rule.source: rule.target for rule in rules if rule.rows != "added"}
    wholes = [
        _with_originals(tensor, paths[tensor.name], model, changed) if tensor.name in paths else tensor
        for tensor in model.tensors(rules, dtype)
    ]
    tensors = [
        dataclasses.replace(tensor, name=adapters.PREFIX + tensor.name)
        for tensor in [*wholes, *token_rows]
        if _has_adapter(tensor.name, adapted)
    ]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if base_class == "llama" else None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _target_modules(base_class, adapted, text.num_layers),
        "modules_to_save": saved or None,
        **({"ensure_weight_tying": True} if text.tied and "embed_tokens" in saved else {}),
        # Only if it is needed, because earlier releases refuse settings that they do not know.
        **({"trainable_token_indices": rows} if rows else {}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    files = {
        pose_head.DESCRIPTION: pose_head.describe_head(config, model.pose_token),
        ADAPTER_CONFIG: settings,
    }
    notes = [
        f"adapters: {adapters.in_words(lora)}",
        "without the base: peft loads it onto the base that you started from",
        f"for {_TIED_NEEDS if 'ensure_weight_tying' in settings else _NEEDS[base_class]}; earlier versions may silently skip parts of it",
    ]
    if rows or saved:
        held = [f"rows {_ranges(ids)} of {module}" for module, ids in rows.items()]
        notes.append(f"contains: {', '.join(held + saved)}")
    if text.num_added_tokens:
        notes.append(
            f"a base with fewer than {text.vocab_size} rows needs resize_token_embeddings({text.vocab_size}) first"
        )
    if base_class == "llava" and "multi_modal_projector" not in saved:
        notes.append("without the projector; if it was trained, add --with-projector")
    if "projector" in changed.whole - layout.parts:
        notes.append("left out: the projector of the source's adapter, because a language model has none")
    return ExportPlan({"adapter_model": tensors, **head_weights(model)}, files, notes)


def _adapted_layers(model: StoredModel) -> dict[str, list[int]]:
    """Projection → the layers in which it has an adapter. A = B = 0 means that it has none; such an adapter never trains."""
    found: dict[str, list[int]] = {}
    for path, shape in model.shapes.items():
        if not path.endswith("/lora_a"):
            continue
        pair = [(name, model.shapes[name][1:]) for name in (path, f"{path[:-1]}b")]
        found[path.split("/")[-2]] = [
            model.first_layer(path) + row
            for row in range(shape[0])
            if any(model.read(name, row, tuple(slice(0, n) for n in size)).any() for name, size in pair)
        ]
    return found


def _has_adapter(name: str, adapted: Mapping[str, Sequence[int]]) -> bool:
    match = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_[AB]\.", name)
    return match is None or int(match[1]) in adapted[match[2]]


def _target_modules(base_class: BaseClass, adapted: Mapping[str, Sequence[int]], layers: int) -> str:
    """``target_modules`` as a regular expression. It has the path of the decoder, because CLIP has projections of the same names."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for target, held in adapted.items():
        if held:
            groups.setdefault(tuple(held), []).append(target)
    before = r".*layers" if base_class == "llama" else r".*language_model.*layers"
    each = []
    for held, targets in groups.items():
        numbers = r"\d+" if len(held) == layers else f"({'|'.join(map(str, held))})"
        each.append(rf"{before}\.{numbers}\.(self_attn|mlp)\.({'|'.join(targets)})")
    return "|".join(each)


def _with_originals(
    tensor: Tensor, path: str, model: StoredModel, changed: Changes, ids: Sequence[int] | None = None
) -> Tensor:
    """The tensor of the leaf ``path``, or of its rows ``ids``, with the source's float32 values where they were not trained. A value was not trained
    if it still equals the rounded value of the source.
    """
    module = path.split("/")[1]
    places = {id: row for row, id in enumerate(range(tensor.shape[0]) if ids is None else ids)}
    parts = []
    if original := changed.originals.get(path):
        parts.append((original, {row: row for row in range(original.shape[0])}))
    if original := changed.originals.get(module + adapters.TOKEN_ROWS):
        parts.append((original, {places[id]: row for row, id in enumerate(changed.rows[module])}))
    if not parts:
        return tensor
    roundings = changed.dtype, model.stored.shapes[path].dtype, tensor.dtype

    def blocks() -> Iterator[np.ndarray]:
        start = 0
        for block in tensor.blocks():
            for original, row_of in parts:
                here = [at for at in range(len(block)) if start + at in row_of]
                if here:
                    exact = _rows(original, [row_of[start + at] for at in here])
                    with np.errstate(over="ignore"):
                        expected = functools.reduce(np.ndarray.astype, roundings, exact)
                    untrained = _bits(expected) == _bits(block[here])
                    block[here] = np.where(untrained, exact.astype(tensor.dtype), block[here])
            start += len(block)
            yield block

    return dataclasses.replace(tensor, blocks=blocks)


def _rows(entry: TensorEntry, rows: Sequence[int]) -> np.ndarray:
    first = min(rows)
    box = slice(first, max(rows) + 1), *(slice(0, n) for n in entry.shape[1:])
    return entry.read(box)[[row - first for row in rows]]


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _token_rows(model: StoredModel, pair: Sequence[NameRule], ids: Sequence[int], dtype: np.dtype) -> Tensor:
    """Rows of the vocabulary, base and added, in the order of ``ids``."""
    base, width = model.config.text.base_vocab_size, model.config.text.hidden_size
    rules = {rule.rows: rule for rule in pair}

    def row(id: int) -> np.ndarray:
        rule, place = (rules["added"], id - base) if id >= base else (rules["base"], id)
        box = slice(place, place + 1), slice(0, width)
        index = box if rule.transform.row_axis == 0 else box[::-1]
        return rule.transform.inverse(model.read(rule.target, None, index)).astype(dtype)

    name = pair[0].source.removesuffix(".weight") + adapters.TOKEN_ROWS
    return Tensor(name, dtype, (len(ids), width), lambda: (row(id) for id in ids))


def _ranges(ids: Sequence[int]) -> str:
    """``[5, 7, 8, 9]`` → ``5, 7 to 9``."""
    runs: list[list[int]] = []
    for id in ids:
        if runs and id == runs[-1][-1] + 1:
            runs[-1].append(id)
        else:
            runs.append([id])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

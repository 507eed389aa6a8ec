"""Passengers: tensors of the sources that the model does not use. ``passengers/`` in its folder keeps them, so that an export is complete again.

::

    LAYOUT.safetensors     tensors that the model does not use, under their names in that layout
    adapter.json           the adapter's changes of its base other than LoRA, head and added rows
    adapter.safetensors    those of these changes that the base's dtype cannot hold exactly, as stored: a part under the path of its leaf, rows
                           of the base vocabulary under module + ``TOKEN_ROWS``, in the order of ``adapter.json``
    config.json, generation_config.json     those of a language model without a vision tower, of LLaVA-1.6 and of LLaVA-OneVision
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line
from chatpose_jax.storage import Location, write_bytes
from chatpose_jax.weights.adapters import TOKEN_ROWS, row_module
from chatpose_jax.weights.backbones.decoder import SPECIAL
from chatpose_jax.weights.layouts import WRAPPERS, layout_of
from chatpose_jax.weights.plan import Conversion, rounded
from chatpose_jax.weights.readers import TensorEntry, read_json_object, read_safetensors_header
from chatpose_jax.weights.table import Layout
from chatpose_jax.weights.writers import Tensor, copied, write_safetensors

CHANGES, ORIGINALS = "adapter.json", "adapter.safetensors"
SETTINGS, GENERATION = "config.json", "generation_config.json"


def write_passengers(plan: Conversion, folder: Location) -> None:
    """Copies the tensors that the model does not use, bit by bit."""
    files = {name: [copied(entry, name) for name, entry in held.items()] for name, held in plan.passengers.items()}
    changed = _changed(plan)
    if changed:
        files[Path(ORIGINALS).stem] = _originals(plan)
    for stem, tensors in files.items():
        if tensors:
            write_safetensors(folder / f"{stem}.safetensors", tensors)
    if plan.config.vision is None or plan.config.image_newline:
        main = plan.sources[0].checkpoint
        generation = main.folder / GENERATION
        kept = {SETTINGS: main.config(), GENERATION: read_json_object(generation) if generation.is_file() else {}}
        for name, data in kept.items():
            if data:
                write_bytes(folder / name, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    if changed:
        text = json.dumps(changed | {"dtype": plan.config.param_dtype}) + "\n"
        write_bytes(folder / CHANGES, text)


def _changed(plan: Conversion) -> dict[str, Any]:
    """The adapters' changes of their base other than LoRA, head and added rows, which are leaves: ``replaced`` leaves, and ``rows`` of the base
    vocabulary. ``{}`` if there are none.
    """
    own = ("pose_head/", "decoder/embed_tokens/added", "decoder/lm_head/added")
    replaced = {path for source in plan.sources if source.is_adapter for path in source.targets}
    replaced = {path for path in replaced if "/lora_" not in path and not path.startswith(own)}
    rows: dict[str, list[int]] = {}
    for source in plan.sources:
        for name, ids in source.token_rows.items():
            if held := [id for id in ids if id < plan.config.text.base_vocab_size]:
                rows[row_module(name)] = held
    return {"replaced": sorted(replaced), "rows": rows} if replaced or rows else {}


def _originals(plan: Conversion) -> list[Tensor]:
    tensors = []
    for source, name, path, _ in rounded(plan):
        entry = source.checkpoint.tensors[name]
        if ids := source.token_rows.get(name):
            rows = [row for row, id in enumerate(ids) if id < plan.config.text.base_vocab_size]
            tensors.append(copied(entry, row_module(name) + TOKEN_ROWS, rows))
        elif source.is_adapter and not plan.leaves[path].stacked and not path.startswith("pose_head/"):
            tensors.append(copied(entry, path))
    return tensors


def read_passengers(folder: Path, layout: Layout, dtype: np.dtype) -> tuple[dict[str, Tensor], list[str]]:
    """The passengers under their names in ``layout``, weights in ``dtype``, buffers as stored; and the names of those that it has no names for."""
    known = {wrapper.name for wrapper in WRAPPERS}
    placed: dict[str, Tensor] = {}
    lost = []
    for file in sorted(folder.glob("*.safetensors")):
        if file.name == ORIGINALS:  # tensors of the adapter, which the export to PEFT reads
            continue
        if file.stem not in known:
            raise UserError(
                f"{file}: its name is not a known layout; it was written by a later version; upgrade this program"
            )
        origin = layout_of(file.stem, layout.language, layout.tower)
        for name, entry in read_safetensors_header(file).items():
            there = origin.translate(name, layout)
            if there is None:
                lost.append(name)
            else:
                placed[there] = copied(entry, there, dtype=dtype if origin.locate(name) else None)
    return placed, lost


def with_kept_settings(files: Mapping[str, Any], folder: Path, eos_token_id: int) -> dict[str, Any]:
    """``config.json`` and ``generation_config.json`` of an export, completed by those of its source: settings that this program does not read, and
    special tokens. Only an EOS that the source does not know is added to its own. A ``config.json`` of another class (LLaVA-1.6 under its authors'
    names, and for transformers) is not used: its keys would mean something else.
    """
    kept = {
        name: read_json_object(folder / name) if (folder / name).is_file() else {} for name in (SETTINGS, GENERATION)
    }
    if not kept[SETTINGS]:
        return {name: files[name] for name in kept}
    result = {SETTINGS: dict(files[SETTINGS]), GENERATION: kept[GENERATION] or dict(files[GENERATION])}
    kind = files[SETTINGS]["model_type"]
    if kept[SETTINGS].get("model_type", kind) == kind:
        own = {name: value for name, value in files[SETTINGS].items() if name not in SPECIAL}
        if "head_dim" not in kept[SETTINGS]:  # the family has a default, or no such setting
            own.pop("head_dim", None)
        dtype = {"dtype": own["torch_dtype"]} if "dtype" in kept[SETTINGS] else {}  # the name since transformers 4.56
        result[SETTINGS] = kept[SETTINGS] | own | dtype
    for settings in result.values():
        said = settings.get("eos_token_id")
        ends = said if isinstance(said, list) else [] if said is None else [said]
        if eos_token_id >= 0 and eos_token_id not in ends:
            settings["eos_token_id"] = [*ends, eos_token_id] if ends else eos_token_id
    return result


@dataclasses.dataclass(frozen=True)
class Changes:
    """The changes that the source's adapter made to its base.

    whole: replaced parts. rows: replaced rows of the base vocabulary. originals: the values of these that were rounded to ``dtype`` in the model.
    """

    whole: frozenset[str] = frozenset()
    rows: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    originals: Mapping[str, TensorEntry] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"

    __repr__ = one_line


def read_changes(folder: Path, model: Location) -> Changes:
    """Raises UserError, which names ``model``, for a change that PEFT cannot express."""
    if not (folder / CHANGES).is_file():
        return Changes()
    data, originals = read_json_object(folder / CHANGES), folder / ORIGINALS
    places = {"decoder/embed_tokens/embedding": "embed_tokens", "decoder/lm_head/kernel": "lm_head"}
    whole = {path: "projector" if path.startswith("projector/") else places.get(path) for path in data["replaced"]}
    if lost := [path for path, module in whole.items() if module is None]:
        raise UserError(
            f"{model}: the source's adapter also replaced {', '.join(lost[:3])}, which the format peft cannot express; "
            "choose --format transformers, llava or chatpose"
        )
    return Changes(
        frozenset(module for module in whole.values() if module),
        data["rows"],
        read_safetensors_header(originals) if originals.is_file() else {},
        data.get("dtype", "float32"),
    )

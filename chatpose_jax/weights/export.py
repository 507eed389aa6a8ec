"""Exports a model folder as a PyTorch checkpoint, with the name tables of ``layouts`` in reverse.

Values are read, changed and written block by block, so memory does not grow with the model. It does not need torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from typing import cast, get_args

from tqdm import tqdm

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import DType
from chatpose_jax.models.heads.base import PoseHead
from chatpose_jax.storage import local, location, reachable, staged, write_bytes
from chatpose_jax.weights.export_model import StoredModel
from chatpose_jax.weights.export_peft import BASE_CLASSES, adapter_plan
from chatpose_jax.weights.export_whole import WHOLE_FORMATS, WholeFormat, whole_plan
from chatpose_jax.weights.folder import PASSENGERS, TOKENIZER, load_model_config
from chatpose_jax.weights.save import explained, new_folder
from chatpose_jax.weights.tokenizer_writer import write_tokenizer
from chatpose_jax.weights.tokens import read_tokens
from chatpose_jax.weights.writers import parse_bytes, write_sharded

FORMATS = (*WHOLE_FORMATS, "peft")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: the files of weights, their size in bytes, and notes for the user of the result."""

    files: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...]


def export(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    *,
    merge: bool = True,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    base_name: str | None = None,
    base_class: str | None = None,
    with_projector: bool = False,
    progress: bool = False,
    head: str | type[PoseHead] | None = None,
) -> Exported:
    """Writes a model folder in a format of PyTorch programs.

    Args:
        folder: model folder, on a disk or in an object store.
        out: folder to write, on a disk or in an object store; must not exist. A store gets each file while it is computed; nothing but its tokenizer
            is written on this machine.
        format: ``transformers`` (``LlavaForConditionalGeneration``), ``llava`` (LLaVA-1.5's own names), ``chatpose``
            (CHATPOSE-V0's names, with the pose head), or ``peft`` (adapters, added token rows and pose head, without
            the base). A model without a vision tower becomes the class of its language model, such as ``Qwen2ForCausalLM``, in ``transformers``.
        merge: replace an adapted W by ``W + (alpha / rank) A B``, computed in float32. ``False`` leaves the adapters out: the result is the base
            of ``peft``. Not for ``peft``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the base's, as stored; for ``peft`` float32.
        max_shard_size: largest size of one file, such as ``"5GB"``.
        base_name: name or folder of the base that the adapter belongs to, for ``peft``.
        base_class: for ``peft``: the class that loads the base, ``llava`` (LlavaForConditionalGeneration) or ``llama`` (the language model's:
            LlamaForCausalLM, Qwen2ForCausalLM, …); default: ``llava`` for a model with a vision tower.
        with_projector: for ``peft``: write the projector too, as one of ``modules_to_save``, if it was trained.
        head: the folder's pose head, if it is from a package of your own; see ``folder.load_model_config``.
        progress: show a progress bar on standard error.

    Raises:
        UserError: not a model folder, ``out`` exists, nothing to export in this format, or a full disk. Nothing is
            left behind.
    """
    if format not in FORMATS:
        raise UserError(f"no format {format!r}; expected one of {', '.join(FORMATS)}")
    if base_class not in (None, *BASE_CLASSES):
        raise UserError(f"no base class {base_class!r}; expected one of {', '.join(BASE_CLASSES)}")
    if dtype is not None and dtype not in get_args(DType):
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(get_args(DType))}, or none for the stored one")
    if with_projector and format != "peft":
        raise UserError(
            f"--with-projector is only for --format peft; the format {format} always contains the projector; leave the option out"
        )
    with contextlib.ExitStack() as held:
        folder, out, limit = location(folder), location(out), parse_bytes(max_shard_size)
        config = load_model_config(folder, head)
        passengers = held.enter_context(local(folder / PASSENGERS))
        model = StoredModel(folder, config, read_tokens(folder / TOKENIZER), passengers, merge and format != "peft")
        if format == "peft":
            plan = adapter_plan(model, dtype or "float32", base_name, base_class, with_projector)
        else:
            plan = whole_plan(model, cast(WholeFormat, format), cast(DType, dtype or config.param_dtype))
        with reachable(out):
            there = out.exists()
        if there:
            raise UserError(f"{out} exists already; choose another folder")
        nbytes = sum(tensor.nbytes for tensors in plan.weights.values() for tensor in tensors)
        bar = tqdm(total=nbytes, unit="B", unit_scale=True, desc="exporting", disable=not progress)
        files: list[str] = []
        needs = f"the export needs {nbytes / 1e9:.2g} GB"
        with explained(out, needs, too_large="--max-shard-size makes smaller files"), new_folder(out) as partial, bar:
            for stem, tensors in plan.weights.items():
                # peft and the reader of a pose head expect one file.
                files += write_sharded(partial, tensors, limit if stem == "model" else nbytes, bar.update, stem)
            with staged(partial) as place:
                write_tokenizer(model.tokens, place, plan.new_tokens)
            for name, data in plan.json_files.items():  # config.json is last, because nothing loads without it
                write_bytes(partial / name, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        return Exported(tuple(files), nbytes, tuple(plan.notes))

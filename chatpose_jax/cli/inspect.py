"""``chatpose inspect``: describes the contents of a folder of weights."""

from __future__ import annotations

import argparse
import collections
import math
import re
from collections.abc import Mapping
from typing import Any

from chatpose_jax.cli.source_options import add_source_options, source_of
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.storage import Location, is_bucket, location
from chatpose_jax.weights.adapters import in_words
from chatpose_jax.weights.arrays import read_metadata
from chatpose_jax.weights.folder import CONFIG, PARAMS, TOKENIZER, is_model_folder, read_config, read_folder
from chatpose_jax.weights.layouts.decoder import NAME as LANGUAGE_MODEL
from chatpose_jax.weights.nonfinite import describe_nonfinite
from chatpose_jax.weights.plan import PARTS, Conversion, plan_conversion, rounded
from chatpose_jax.weights.sources import Source, describe_adapters, is_adapter, open_adapter, open_sources

_SHOWN = 8
"""Number of tensors of one kind that a report names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose inspect``."""
    parser.add_argument(
        "path",
        metavar="folder",
        help="any checkpoint folder or file, or a model folder; a model folder also at gs://…, s3://…",
    )
    add_source_options(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor; default: one line for all layers")


def run(args: argparse.Namespace) -> int:
    """Runs ``chatpose inspect``. Returns 0 if nothing is missing, else 1. Raises UserError if files cannot be read."""
    spec, folder = source_of(args), location(args.path)
    if is_model_folder(folder) or is_bucket(folder):  # only model folders are read from a bucket
        print("\n".join(_describe_model_folder(folder, args.tensors)))
        return 0
    if is_adapter(folder):
        for source in open_adapter(folder, spec.lora_alpha, spec.head):
            print("\n".join(_describe_source(source, args.tensors)))
        print(f"needs its base: chatpose convert BASE OUT --adapter {folder}")
        return 1
    for source in open_sources(spec):
        print("\n".join(_describe_source(source, args.tensors)))
    try:
        plan = plan_conversion(spec)
    except UserError as error:
        print(f"cannot be converted as it is: {error}")
        return 1
    print("\n".join(describe_conversion(plan)))
    return 0


def describe_config(config: ModelConfig) -> list[str]:
    """Lines that describe the configuration."""
    text, vision, lora = config.text, config.vision, config.lora
    rows = [
        ("backbone", text.backbone if vision is None else f"{text.backbone}, {vision.backbone}"),
        (
            "decoder",
            f"{text.num_layers} layers, width {text.hidden_size}, {text.num_heads} heads "
            f"({text.num_kv_heads} key/value), MLP {text.intermediate_size}, context {text.max_position_embeddings}, "
            f"RMSNorm eps {text.rms_norm_eps:g}, RoPE theta {text.rope_theta:g}"
            + (f" stretched {text.rope_scaling.factor:g}-fold" if text.rope_scaling else "")
            + (", biases on q, k, v" if text.qkv_bias else "")
            + (", norms of q and k" if text.qk_norm else ""),
        ),
        (
            "vision",
            "none: the model takes no images (--vision FOLDER, when converting, gives it a tower)"
            if vision is None
            else f"{vision.num_used_layers} of {vision.num_layers} layers, width {vision.hidden_size}, "
            f"{vision.image_size} px in patches of {vision.patch_size}: {config.image_tokens} tokens",
        ),
        (
            "vocabulary",
            f"{text.vocab_size} rows, {text.base_vocab_size} of them base; pose token {config.pose_token_id}"
            + ("; the LM head is tied to the embedding" if text.tied else ""),
        ),
        *([("adapters", in_words(lora))] if lora else []),
        ("pose head", ", ".join([config.head.name, *(f"{name}={value!r}" for name, value in config.head.options)])),
        (
            "storage",
            config.param_dtype
            + (f", the decoder's projections {config.quantize}" if config.quantize != "none" else "")
            + f"; computes in {config.dtype}",
        ),
    ]
    return [f"  {name:<11} {value}" for name, value in rows]


def describe_conversion(plan: Conversion) -> list[str]:
    """Lines that describe a conversion: the model, new parts, and tensors that are ignored with the reasons."""
    lines = ["model", *describe_config(plan.config)]
    tokens = plan.vocabulary.tokens
    known = ", ".join(f"{literal} {id}" for literal, id in sorted(tokens.added.items(), key=lambda item: item[1]))
    lines.append(f"  {'tokenizer':<11} {tokens.base_size} pieces{f', and {known}' if known else ''}")
    template = plan.vocabulary.template
    lines += [f"  {'template':<11} {line}" for line in (template.name, *template.notes)]
    if plan.vocabulary.added:
        lines.append(f"  {'new tokens':<11} {', '.join(plan.vocabulary.added)}")
    if plan.images is not None:
        lines.append(f"  {'images':<11} {plan.images.describe()}")
    dtypes = ((source.title, source.checkpoint.tensors[name].stored, kept) for source, name, _, kept in rounded(plan))
    for (title, stored, kept), count in collections.Counter(dtypes).items():
        lines.append(f"  {'rounded':<11} {count} tensors of {title}: {stored} to {kept}")
    if plan.fresh:
        lines.append(f"  {'initialised':<11} {', '.join(plan.fresh)}")
    if counts := plan.nonfinite.counts:
        shown = "; ".join(f"{name}: {describe_nonfinite(counts[name])}" for name in sorted(counts)[:_SHOWN])
        more = f"; … {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        lines.append(f"  {'not finite':<11} {len(counts)} tensors: {shown}{more}")
    if unread := [str(file) for source in plan.sources for file in source.checkpoint.unread]:
        lines.append(f"  {'not read':<11} {', '.join(unread)}: programs prefer the other weights")
    for reason, count in collections.Counter(plan.ignored.values()).items():
        lines.append(f"  {'ignored':<11} {count} tensors: {reason}")
    return lines


def _describe_source(source: Source, every: bool) -> list[str]:
    checkpoint, parts = source.checkpoint, source.layout.parts
    dtypes = _formats(checkpoint.formats)
    lines = [
        f"{checkpoint.folder}: {source.layout.title}",
        f"  {'files':<11} {len(checkpoint.files)}, {checkpoint.nbytes / 1e9:.3g} GB",
        f"  {'tensors':<11} {len(checkpoint.tensors)} ({dtypes})",
        f"  {'has':<11} {', '.join(part for part in PARTS if part in parts)}",
        f"  {'has not':<11} {', '.join(part for part in PARTS if part not in parts) or 'nothing'}",
        *([f"  {'adapters':<11} {describe_adapters(source)}"] if source.lora else []),
    ]
    return lines + _tensor_lines(checkpoint.tensors, every)


def _describe_model_folder(folder: Location, every: bool) -> list[str]:
    data, config, stored = read_folder(folder), read_config(folder), read_metadata(folder / PARAMS)
    lines = [
        f"{folder}: model folder",
        *describe_config(config),
        f"  {'parameters':<11} {sum(math.prod(leaf.shape) for leaf in stored.values()) / 1e6:.1f} M in {len(stored)} arrays",
        f"  {'tokenizer':<11} {', '.join(sorted(file.name for file in (folder / TOKENIZER).iterdir()))}",
        *_provenance_lines(folder, data.get("provenance", {})),
    ]
    return lines + _tensor_lines(stored, every)


def _provenance_lines(folder: Location, provenance: Any) -> list[str]:
    try:
        lines = [line for source in provenance.get("sources", []) for line in _origin_lines(source)]
        if seen := provenance.get("images") or provenance.get("pictures"):  # earlier folders have the second key
            lines.append(f"  {'images':<11} {seen}")
        if started := provenance.get("initialised"):
            lines.append(f"  {'initialised':<11} {', '.join(started)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / CONFIG}: the provenance is not as this program writes it ({type(error).__name__}: {error}); "
            "it was changed by hand: restore it, or delete the key 'provenance'"
        ) from None
    return lines


def _origin_lines(source: Mapping[str, Any]) -> list[str]:
    stored = f", {_formats(source['formats'])}" if source.get("formats") else ""
    kind = "language model" if source["layout"] == LANGUAGE_MODEL else source["layout"]
    lines = [f"  {'from':<11} {source['name']} ({kind}, {len(source['files'])} files{stored})"]
    for file in source["files"]:
        lines.append(f"  {'':<11} {file.get('sha256', 'not hashed')}  {file['name']}  {file['bytes'] / 1e9:.3g} GB")
    return lines


def _formats(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _tensor_lines(tensors: Mapping[str, Any], every: bool) -> list[str]:
    """Name, shape and format of every tensor, or one line for all layers."""
    rows = [(name, tuple(leaf.shape), str(getattr(leaf, "stored", leaf.dtype))) for name, leaf in tensors.items()]
    if every:
        return [f"  {name}  {shape}  {stored}" for name, shape, stored in sorted(rows)]
    groups: collections.Counter[tuple[str, Any, Any]] = collections.Counter()
    for name, shape, stored in rows:
        groups[re.sub(r"(?<=[./])\d+(?=[./])", "*", name, count=1), shape, stored] += 1
    return [
        f"  {name}  {shape}  {dtype}{f'  × {count}' if count > 1 else ''}"
        for (name, shape, dtype), count in sorted(groups.items(), key=lambda group: group[0][0])
    ]

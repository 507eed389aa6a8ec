"""``chatpose convert`` and ``chatpose inspect``: options and what they print."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.weights.arrays import read_metadata
from chatpose_jax.weights.convert import DTYPES, convert
from chatpose_jax.weights.folder import PARAMS, TOKENIZER, is_model_folder, load_config, read_folder
from chatpose_jax.weights.layouts import FAMILIES
from chatpose_jax.weights.plan import PARTS, Plan, Source, make_plan, open_sources


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say where the parts of a checkpoint stand; shared by ``convert`` and ``inspect``."""
    parser.add_argument("--vision", metavar="FOLDER", help="CLIP, for checkpoints without a vision tower")
    parser.add_argument("--projector", metavar="FILE", help="mm_projector.bin, if it is not in the folder")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="tokenizer files, if they are not in the folder")
    parser.add_argument("--layout", choices=FAMILIES, help="default: recognised by what is in the folder")


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose convert``."""
    parser.add_argument("source", help="folder or file with .safetensors or .bin weights")
    parser.add_argument("out", help="model folder to write")
    add_source_arguments(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="storage of the base weights; default: as stored")
    parser.add_argument(
        "--pose-head",
        choices=("auto", "init"),
        default="auto",
        help="auto: the source's, or a new one where it has none; init: a new one",
    )
    parser.add_argument(
        "--init-missing",
        action="append",
        default=[],
        choices=("vision", "projector"),
        metavar="PART",
        help="initialise a part that no source has (vision, projector); may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0, help="of whatever is initialised")
    parser.add_argument("--compress", action="store_true", help="zstd: smaller, slower")
    parser.add_argument(
        "--no-hash", action="store_true", help="leave SHA-256 of the source files out of the provenance"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder at OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report")


def run_convert(args: argparse.Namespace) -> int:
    """Carries out ``chatpose convert``; returns the exit status. Raises UserError."""
    plan = convert(
        args.source,
        args.out,
        vision=args.vision,
        projector=args.projector,
        tokenizer=args.tokenizer,
        layout=args.layout,
        dtype=args.dtype,
        init_missing=args.init_missing,
        pose_head=args.pose_head,
        seed=args.seed,
        finish=getattr(args, "finish", None),
        hashes=not args.no_hash,
        compress=args.compress,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    if not args.quiet:
        print("\n".join(describe_plan(plan)))
        print(f"wrote {args.out} ({plan.nbytes / 1e9:.2f} GB)")
    return 0


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose inspect``."""
    parser.add_argument("folder", help="any checkpoint folder or file, or a model folder")
    add_source_arguments(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def run_inspect(args: argparse.Namespace) -> int:
    """Carries out ``chatpose inspect``: 0 if all is there, 1 if something is missing. Raises UserError for what
    cannot be read.
    """
    folder = Path(args.folder)
    if is_model_folder(folder):
        print("\n".join(_describe_model_folder(folder, args.tensors)))
        return 0
    sources = open_sources(folder, vision=args.vision, projector=args.projector, layout=args.layout)
    for source in sources:
        print("\n".join(_describe_source(source, args.tensors)))
    try:
        plan = make_plan(sources, tokenizer=args.tokenizer)
    except UserError as error:
        print(f"not convertible as it is: {error}")
        return 1
    print("\n".join(describe_plan(plan)))
    return 0


def describe_config(config: ModelConfig) -> list[str]:
    """The configuration in a few lines."""
    text, vision = config.text, config.vision
    rows = [
        (
            "decoder",
            f"{text.num_layers} layers, width {text.hidden_size}, {text.num_heads} heads "
            f"({text.num_kv_heads} key/value), MLP {text.intermediate_size}, context {text.max_position_embeddings}, "
            f"RMSNorm eps {text.rms_norm_eps:g}, RoPE theta {text.rope_theta:g}",
        ),
        (
            "vision",
            f"{vision.num_used_layers} of {vision.num_layers} layers, width {vision.hidden_size}, "
            f"{vision.image_size} px in patches of {vision.patch_size}: {vision.num_patches} tokens",
        ),
        (
            "vocabulary",
            f"{text.vocab_size} rows, {text.base_vocab_size} of them base; pose token {config.pose_token_id}",
        ),
        ("storage", f"{config.param_dtype}; computes in {config.dtype}"),
    ]
    return [f"  {name:<11} {value}" for name, value in rows]


def describe_plan(plan: Plan) -> list[str]:
    """What a conversion does, in lines: the model, what is new, what is left out and why."""
    lines = ["model", *describe_config(plan.config)]
    if plan.vocabulary.added:
        lines.append(f"  {'new tokens':<11} {', '.join(plan.vocabulary.added)}")
    if plan.fresh:
        lines.append(f"  {'initialised':<11} {', '.join(plan.fresh)}")
    for reason, count in collections.Counter(plan.ignored.values()).items():
        lines.append(f"  {'ignored':<11} {count} tensors: {reason}")
    return lines


def _describe_source(source: Source, every: bool) -> list[str]:
    checkpoint, parts = source.checkpoint, source.layout.parts
    count = collections.Counter(entry.dtype.name for entry in checkpoint.tensors.values())
    dtypes = ", ".join(f"{number} {name}" for name, number in count.items())
    lines = [
        f"{checkpoint.folder}: {source.layout.title} ({source.layout.name})",
        f"  {'files':<11} {len(checkpoint.files)}, {checkpoint.nbytes / 1e9:.2f} GB",
        f"  {'tensors':<11} {len(checkpoint.tensors)} ({dtypes})",
        f"  {'has':<11} {', '.join(part for part in PARTS if part in parts)}",
        f"  {'has not':<11} {', '.join(part for part in PARTS if part not in parts) or 'nothing'}",
    ]
    return lines + (_tensor_lines(checkpoint.tensors) if every else [])


def _describe_model_folder(folder: Path, every: bool) -> list[str]:
    data, config, stored = read_folder(folder), load_config(folder), read_metadata(folder / PARAMS)
    origin = data.get("provenance", {}).get("sources", [])
    lines = [
        f"{folder}: model folder",
        *describe_config(config),
        f"  {'parameters':<11} {sum(_size(leaf) for leaf in stored.values()) / 1e6:.1f} M in {len(stored)} arrays",
        f"  {'tokenizer':<11} {', '.join(sorted(file.name for file in (folder / TOKENIZER).iterdir()))}",
        *(f"  {'from':<11} {source['name']} ({source['layout']}, {len(source['files'])} files)" for source in origin),
    ]
    return lines + (_tensor_lines(stored) if every else [])


def _size(leaf: Any) -> int:
    size = 1
    for n in leaf.shape:
        size *= n
    return size


def _tensor_lines(tensors: Mapping[str, Any]) -> list[str]:
    return [f"  {name}  {tuple(leaf.shape)}  {leaf.dtype}" for name, leaf in sorted(tensors.items())]

"""``chatpose convert``, ``chatpose inspect`` and ``chatpose verify``: options and what they print."""

from __future__ import annotations

import argparse
import collections
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.processing.images import FITS
from chatpose_jax.weights import pictures
from chatpose_jax.weights.arrays import read_metadata
from chatpose_jax.weights.convert import DTYPES, QUANTIZE, convert
from chatpose_jax.weights.folder import CONFIG, PARAMS, TOKENIZER, is_model_folder, load_config, read_folder
from chatpose_jax.weights.layouts import FAMILIES
from chatpose_jax.weights.nonfinite import describe
from chatpose_jax.weights.plan import PARTS, Plan, make_plan, rounded
from chatpose_jax.weights.sources import Source, describe_adapters, is_adapter, open_adapter, open_sources

_SHOWN = 8
"""How many tensors of one kind a report names."""
TOLERANCE = 2e-5
"""Of ``chatpose verify``, relative."""
INCOMPLETE = 3
"""Its exit status where parts of the model could not be compared."""


EXAMPLES = """examples, from a download to an answer:
  hf download llava-hf/llava-1.5-13b-hf --local-dir llava-1.5-13b-hf
  {prog} llava-1.5-13b-hf out/llava --dtype bfloat16
  {prog} llava-v1.5-13b   out/llava --vision clip-vit-large-patch14-336
  {prog} CHATPOSE-V0 out/chatpose   --vision clip-vit-large-patch14-336
  {prog} vicuna-13b-v1.5 out/vicuna --vision clip-vit-large-patch14-336 --init-missing projector
  {prog} llava-1.5-13b-hf out/mine  --adapter my-peft-adapter
  chatpose inspect llava-v1.5-13b       what a download is, and what it lacks
  chatpose verify llava-1.5-13b-hf out/llava      the result against PyTorch
  chatpose chat out/llava

docs/weights.md has the table of all layouts."""


def add_source_arguments(parser: argparse.ArgumentParser, *, tokenizer: bool = True) -> None:
    """Options that say where the parts of a checkpoint stand; shared by ``convert``, ``inspect`` and ``verify``."""
    group = parser.add_argument_group("parts that stand elsewhere")
    group.add_argument(
        "--vision",
        metavar="FOLDER",
        help="CLIP (openai/clip-vit-large-patch14-336), for weights without a vision tower: CHATPOSE-V0, liuhaotian/…",
    )
    group.add_argument(
        "--projector",
        metavar="FILE",
        help="mm_projector.bin or .safetensors, or the folder that holds it; found by itself beside the weights",
    )
    group.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter over these weights; it stays an adapter")
    group.add_argument(
        "--lora-alpha",
        type=float,
        metavar="ALPHA",
        help="of adapters without an adapter_config.json, as DeepSpeed leaves them",
    )
    if tokenizer:
        group.add_argument(
            "--tokenizer", metavar="FOLDER", help="tokenizer.model or tokenizer.json, if not with the weights"
        )
    group.add_argument(
        "--layout", choices=FAMILIES, help="how the weights are named; default: recognised by what is in the folder"
    )


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose convert``."""
    parser.epilog, parser.formatter_class = (
        EXAMPLES.replace("{prog}", parser.prog),
        argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        help="folder as downloaded (.safetensors or .bin, whole or in shards, config.json, tokenizer), or one such file",
    )
    parser.add_argument(
        "out", help="model folder to write: what chatpose chat, chatpose train and chatpose_jax.load take"
    )
    add_source_arguments(parser)
    result = parser.add_argument_group("what is written")
    result.add_argument("--dtype", choices=DTYPES, help="of the base weights; default: as stored, bit by bit")
    result.add_argument(
        "--quantize",
        choices=QUANTIZE,
        default="none",
        help="int8: projections of the decoder in int8, half of bfloat16's memory; they answer nearly the same and cannot "
        "be trained, adapters on them can (default none)",
    )
    result.add_argument(
        "--pose-head",
        choices=("auto", "init"),
        default="auto",
        help="auto (default): the source's, or a new one to train where it has none; init: a new one",
    )
    _add_init_missing(result)
    _add_image_fit(result)
    result.add_argument("--seed", type=int, default=0, help="of whatever is started at random (default 0)")
    result.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="go on where weights hold NaN or infinities, and count them in the report; default: an error",
    )
    result.add_argument("--compress", action="store_true", help="store with zstd: smaller, slower")
    result.add_argument(
        "--overwrite", action="store_true", help="replace a model folder at OUT; never any other folder"
    )
    checks = parser.add_argument_group("checks and messages")
    checks.add_argument(
        "--hashes",
        metavar="FILE",
        help="list of SHA-256 sums, as sha256sum writes it; files are compared while they are read. A file SHA256SUMS "
        "beside the weights is compared without being named",
    )
    checks.add_argument(
        "--no-hash", action="store_true", help="neither compare nor record SHA-256 sums of the source files; faster"
    )
    checks.add_argument("--quiet", action="store_true", help="no progress bar, no report")


def _add_image_fit(parser: Any) -> None:
    parser.add_argument(
        "--image-fit",
        choices=FITS,
        help="how pictures become squares: crop takes the middle, pad keeps all and fills up; default: as the source says",
    )


def _add_init_missing(parser: Any) -> None:
    parser.add_argument(
        "--init-missing",
        action="append",
        default=[],
        choices=("vision", "projector"),
        metavar="PART",
        help="start vision or projector at random where no source has it, to be trained; may be repeated",
    )


def run_convert(args: argparse.Namespace) -> int:
    """Carries out ``chatpose convert``; returns the exit status. Raises UserError."""
    plan = convert(
        args.source,
        args.out,
        vision=args.vision,
        projector=args.projector,
        adapter=args.adapter,
        lora_alpha=args.lora_alpha,
        tokenizer=args.tokenizer,
        layout=args.layout,
        dtype=args.dtype,
        quantize=args.quantize,
        init_missing=args.init_missing,
        pose_head=args.pose_head,
        seed=args.seed,
        allow_nonfinite=args.allow_nonfinite,
        image_fit=args.image_fit,
        finish=getattr(args, "finish", None),
        hashes=not args.no_hash,
        sums=args.hashes,
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
    _add_init_missing(parser)
    _add_image_fit(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor, not one for all layers")


def run_inspect(args: argparse.Namespace) -> int:
    """Carries out ``chatpose inspect``: 0 if all is there, 1 if something is missing. Raises UserError for what
    cannot be read.
    """
    folder = Path(args.folder)
    if is_model_folder(folder):
        print("\n".join(_describe_model_folder(folder, args.tensors)))
        return 0
    if is_adapter(folder):
        for source in open_adapter(folder, args.lora_alpha):
            print("\n".join(_describe_source(source, args.tensors)))
        print(f"needs its base: chatpose convert BASE OUT --adapter {folder}")
        return 1
    sources = open_sources(
        folder,
        vision=args.vision,
        projector=args.projector,
        adapter=args.adapter,
        lora_alpha=args.lora_alpha,
        layout=args.layout,
    )
    for source in sources:
        print("\n".join(_describe_source(source, args.tensors)))
    try:
        plan = make_plan(sources, tokenizer=args.tokenizer, init_missing=args.init_missing, image_fit=args.image_fit)
    except UserError as error:
        print(f"not convertible as it is: {error}")
        return 1
    print("\n".join(describe_plan(plan)))
    return 0


def describe_config(config: ModelConfig) -> list[str]:
    """The configuration in a few lines."""
    text, vision, lora = config.text, config.vision, config.lora
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
        *([("adapters", f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}")] if lora else []),
        ("storage", f"{config.param_dtype}; computes in {config.dtype}"),
    ]
    return [f"  {name:<11} {value}" for name, value in rows]


def describe_plan(plan: Plan) -> list[str]:
    """What a conversion does, in lines: the model, what is new, what is left out and why."""
    lines = ["model", *describe_config(plan.config)]
    tokens = plan.vocabulary.tokens
    known = ", ".join(f"{literal} {id}" for literal, id in sorted(tokens.added.items(), key=lambda item: item[1]))
    lines.append(f"  {'tokenizer':<11} {tokens.base_size} pieces{f', and {known}' if known else ''}")
    if plan.vocabulary.added:
        lines.append(f"  {'new tokens':<11} {', '.join(plan.vocabulary.added)}")
    lines.append(f"  {'pictures':<11} {pictures.describe(plan.pictures)}")
    dtypes = ((source.title, source.checkpoint.tensors[name].dtype, kept) for source, name, _, kept in rounded(plan))
    for (title, stored, kept), count in collections.Counter(dtypes).items():
        lines.append(f"  {'rounded':<11} {count} tensors of {title}: {stored} to {kept}")
    if plan.fresh:
        lines.append(f"  {'initialised':<11} {', '.join(plan.fresh)}")
    if counts := plan.nonfinite.counts:
        shown = "; ".join(f"{name}: {describe(counts[name])}" for name in sorted(counts)[:_SHOWN])
        more = f"; … {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        lines.append(f"  {'not finite':<11} {len(counts)} tensors: {shown}{more}")
    if unread := [str(file) for source in plan.sources for file in source.checkpoint.unread]:
        lines.append(f"  {'not read':<11} {', '.join(unread)}: programs take the others first")
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
        *([f"  {'adapters':<11} {describe_adapters(source)}"] if source.lora else []),
    ]
    return lines + _tensor_lines(checkpoint.tensors, every)


def _describe_model_folder(folder: Path, every: bool) -> list[str]:
    data, config, stored = read_folder(folder), load_config(folder), read_metadata(folder / PARAMS)
    lines = [
        f"{folder}: model folder",
        *describe_config(config),
        f"  {'parameters':<11} {sum(_size(leaf) for leaf in stored.values()) / 1e6:.1f} M in {len(stored)} arrays",
        f"  {'tokenizer':<11} {', '.join(sorted(file.name for file in (folder / TOKENIZER).iterdir()))}",
        *_provenance_lines(folder, data.get("provenance", {})),
    ]
    return lines + _tensor_lines(stored, every)


def _provenance_lines(folder: Path, provenance: Any) -> list[str]:
    try:
        lines = [line for source in provenance.get("sources", []) for line in _origin_lines(source)]
        if seen := provenance.get("pictures"):
            lines.append(f"  {'pictures':<11} {seen}")
        if started := provenance.get("initialised"):
            lines.append(f"  {'initialised':<11} {', '.join(started)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / CONFIG}: the provenance is not as this program writes it ({type(error).__name__}: {error}); "
            "it was changed by hand: restore it, or delete the key 'provenance'"
        ) from None
    return lines


def _origin_lines(source: Mapping[str, Any]) -> list[str]:
    lines = [f"  {'from':<11} {source['name']} ({source['layout']}, {len(source['files'])} files)"]
    for file in source["files"]:
        lines.append(f"  {'':<11} {file.get('sha256', 'not hashed')}  {file['name']}  {file['bytes'] / 1e9:.2f} GB")
    return lines


def _size(leaf: Any) -> int:
    size = 1
    for n in leaf.shape:
        size *= n
    return size


def _tensor_lines(tensors: Mapping[str, Any], every: bool) -> list[str]:
    """Name, shape and dtype of every tensor; or of one for all layers."""
    if every:
        return [f"  {name}  {tuple(leaf.shape)}  {leaf.dtype}" for name, leaf in sorted(tensors.items())]
    groups: collections.Counter[tuple[str, Any, Any]] = collections.Counter()
    for name, leaf in tensors.items():
        groups[re.sub(r"(?<=[./])\d+(?=[./])", "*", name, count=1), tuple(leaf.shape), leaf.dtype] += 1
    return [
        f"  {name}  {shape}  {dtype}{f'  × {count}' if count > 1 else ''}"
        for (name, shape, dtype), count in sorted(groups.items(), key=lambda group: group[0][0])
    ]


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose verify``."""
    parser.add_argument("source", help="the PyTorch weights, as given to chatpose convert")
    parser.add_argument("converted", help="the model folder that chatpose convert wrote")
    add_source_arguments(parser, tokenizer=False)
    _add_image_fit(parser)
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="run N decoder layers, from the first to the last, each on torch's states (default: all; 3 of a large model)",
    )
    parser.add_argument("--prompt", action="append", default=[], help="ask this; may be repeated")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="ask about this picture; may be repeated"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="of the largest difference, relative to the stage's largest value where that exceeds 1, ten times as much for "
        f"poses (default {TOLERANCE:g}; weights that were cast or quantised on the way need more)",
    )


def run_verify(args: argparse.Namespace) -> int:
    """Carries out ``chatpose verify``: 0 if all is compared and within the tolerance, 1 if a stage is not, 3 if parts could not
    be compared. Raises UserError."""
    from chatpose_jax.weights.verify import verify

    left_out: list[str] = []

    stages = verify(
        args.source,
        args.converted,
        vision=args.vision,
        projector=args.projector,
        adapter=args.adapter,
        lora_alpha=args.lora_alpha,
        layout=args.layout,
        layers=args.layers,
        prompts=args.prompt,
        images=args.image,
        image_fit=args.image_fit,
        left_out=left_out,
    )
    failed, worst = 0, 0.0
    for number, stage in enumerate(stages):
        if not number:
            print(f"{'prompt':<9} {'stage':<15} {'largest':>10} {'max diff':>10} {'mean diff':>10} {'relative':>10}")
        good = stage.within(args.tolerance)
        failed += not good
        worst = max(worst, stage.relative / stage.slack)
        print(
            f"{stage.prompt:<9} {stage.stage:<15} {stage.largest:>10.4g} {stage.maximum:>10.2e} {stage.mean:>10.2e} "
            f"{stage.relative:>10.2e}{'' if good else '  above tolerance'}",
            flush=True,
        )
    if failed:
        print(f"differs: {failed} stages above {args.tolerance:g}")
        return 1
    if left_out:
        print(
            f"incomplete: what was compared is equal (largest relative difference {worst:.2e}); not compared: "
            f"{', '.join(left_out)} of {args.converted}: no weights were given for that, or the head is none that torch knows here; name "
            "every source that chatpose convert had (--vision, --projector, --adapter)"
        )
        return INCOMPLETE
    print(
        f"equal: the largest relative difference between torch and JAX is {worst:.2e}, the tolerance {args.tolerance:g}"
    )
    return 0

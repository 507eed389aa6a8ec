"""``chatpose convert``."""

from __future__ import annotations

import argparse
from typing import get_args

from chatpose_jax.cli.inspect import describe_conversion
from chatpose_jax.cli.source_options import add_source_options, source_of
from chatpose_jax.models.config import DType
from chatpose_jax.weights.convert import convert
from chatpose_jax.weights.spec import Quantize

EXAMPLES = """examples, from a download to an answer:
  hf download llava-hf/llava-1.5-13b-hf --local-dir llava-1.5-13b-hf
  {prog} llava-1.5-13b-hf out/llava --dtype bfloat16
  {prog} llava-v1.5-13b   out/llava --vision clip-vit-large-patch14-336
  {prog} CHATPOSE-V0 out/chatpose   --vision clip-vit-large-patch14-336
  {prog} vicuna-13b-v1.5 out/vicuna --vision clip-vit-large-patch14-336 --init-missing projector
  {prog} llava-1.5-13b-hf out/mine  --adapter my-peft-adapter
  chatpose inspect llava-v1.5-13b       what a download contains, and what is missing
  chatpose verify llava-1.5-13b-hf out/llava      compare the result with PyTorch
  chatpose chat out/llava

docs/weights.md has the table of all layouts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose convert``."""
    parser.epilog = EXAMPLES.replace("{prog}", parser.prog)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "path",
        metavar="source",
        help="folder as downloaded (.safetensors or .bin, whole or in shards, config.json, tokenizer), or one such file, or a .gguf file",
    )
    parser.add_argument(
        "out",
        help="model folder to write, for chatpose chat, chatpose train and chatpose_jax.load; also gs://…, s3://…",
    )
    add_source_options(parser)
    result = parser.add_argument_group("output")
    result.add_argument(
        "--dtype",
        choices=get_args(DType),
        help="dtype of the base weights; default: as stored, bit by bit; of a quantised GGUF file: bfloat16",
    )
    result.add_argument(
        "--quantize",
        choices=get_args(Quantize),
        default="none",
        help="store the decoder's projections in int8, in half of bfloat16's memory, for nearly the same answers; or in int4, in a quarter of it, "
        "for small cards. Only adapters on them can be trained (default none)",
    )
    result.add_argument(
        "--pose-head",
        choices=("auto", "init"),
        default="auto",
        help="auto (default): the source's pose head, or a new one to train if it has none; init: a new one",
    )
    result.add_argument("--seed", type=int, default=0, help="seed of random initialisation (default 0)")
    result.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="accept weights with NaN or infinities, and count them in the report; default: an error",
    )
    result.add_argument("--compress", action="store_true", help="store with zstd: smaller, slower")
    result.add_argument(
        "--overwrite", action="store_true", help="replace a model folder at OUT; never any other folder"
    )
    checks = parser.add_argument_group("checks and messages")
    sums = checks.add_mutually_exclusive_group()
    sums.add_argument(
        "--hashes",
        metavar="FILE",
        help="list of SHA-256 sums, as sha256sum writes it; files are checked while they are read. A file SHA256SUMS "
        "beside the weights is used without this option",
    )
    sums.add_argument(
        "--no-hash", action="store_true", help="neither check nor record SHA-256 sums of the source files; faster"
    )
    checks.add_argument("--quiet", action="store_true", help="no progress bar, no report")


def run(args: argparse.Namespace) -> int:
    """Runs ``chatpose convert`` and returns the exit status. Raises UserError."""
    plan = convert(
        source_of(args),
        args.out,
        hashes=not args.no_hash and (args.hashes or True),
        compress=args.compress,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    if not args.quiet:
        print("\n".join(describe_conversion(plan)))
        print(f"wrote {args.out} ({plan.nbytes / 1e9:.3g} GB)")
    return 0

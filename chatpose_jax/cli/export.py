"""``chatpose export``."""

from __future__ import annotations

import argparse
from typing import get_args

from chatpose_jax.models.config import DType
from chatpose_jax.weights.export import FORMATS, export
from chatpose_jax.weights.export_peft import BASE_CLASSES

__all__ = ["add_arguments", "run"]

EXAMPLES = """examples:
  chatpose export out/model llava-hf --format transformers        LlavaForConditionalGeneration.from_pretrained("llava-hf")
  chatpose export out/model llava    --format llava --dtype float16
  chatpose export out/model CHATPOSE --format chatpose
  chatpose export out/model adapter  --format peft --base-name llava-hf/llava-1.5-13b-hf
  chatpose convert llava-1.5-13b-hf out/again --adapter adapter   and back

docs/weights.md has the table of all layouts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose export``."""
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "folder", help="model folder, as chatpose convert and chatpose train write it; also gs://…, s3://…"
    )
    parser.add_argument("out", help="folder to write; must not exist; also gs://…, s3://…")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="transformers: LlavaForConditionalGeneration, or without a vision tower the language model's class; "
        "llava: LLaVA-1.5's own names; chatpose: CHATPOSE-V0's names, with the "
        "pose head; peft: adapters, token rows and pose head, without the base",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(DType),
        help="default: the base's dtype, as stored; for peft float32, the dtype of adapters",
    )
    parser.add_argument(
        "--no-merge",
        action="store_true",
        help="leave the adapters out instead of merging them; the result is the base of --format peft",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest size of one file of weights, such as 500MB (default 5GB)",
    )
    parser.add_argument(
        "--head",
        metavar="MODULE:CLASS",
        help="the folder's pose head, if it is from a package of your own: files alone never import code",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report")
    peft = parser.add_argument_group("--format peft")
    peft.add_argument("--base-name", metavar="NAME", help="base_model_name_or_path: the base of the adapter")
    peft.add_argument(
        "--base-class",
        choices=BASE_CLASSES,
        help="class that loads the base: llava LlavaForConditionalGeneration, llama the language model's (LlamaForCausalLM, "
        "Qwen2ForCausalLM, …); default: by whether the model has a vision tower",
    )
    peft.add_argument(
        "--with-projector", action="store_true", help="write the projector too (modules_to_save), if it was trained"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``chatpose export`` and returns the exit status. Raises UserError."""
    result = export(
        args.folder,
        args.out,
        args.format,
        merge=not args.no_merge,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        base_name=args.base_name,
        base_class=args.base_class,
        with_projector=args.with_projector,
        head=args.head,
        progress=not args.quiet,
    )
    if not args.quiet:
        print("\n".join(f"  {note}" for note in result.notes))
        print(f"wrote {args.out}: {', '.join(result.files)} ({result.nbytes / 1e9:.3g} GB)")
    return 0

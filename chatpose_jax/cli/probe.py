"""``chatpose probe``: what a base knows of poses before any training."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from chatpose_jax.chat import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose probe``."""
    parser.add_argument("model", help="a model folder, or a checkpoint that chatpose convert reads")
    parser.add_argument(
        "--form",
        choices=("chat", "plain"),
        default="chat",
        help="ask in the model's chat template, or as plain text that it continues (for a base that was not tuned to chat)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write scores and ranks of each situation to this file"
    )
    parser.add_argument(
        "--batch", type=int, default=15, metavar="N", help="answers that run together; fewer take less memory"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="by default that of the folder")


def run(args: argparse.Namespace) -> int:
    """Runs ``chatpose probe``. Returns 0. Raises UserError for a model that cannot be read."""
    from chatpose_jax.chat import load
    from chatpose_jax.evaluation import probe
    from chatpose_jax.settings import whole

    batch = whole("--batch", args.batch, 1)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        new = not args.json.exists()
        args.json.touch()  # an unwritable file is an error now, not after the work
        if new:
            args.json.unlink()  # a model that cannot be read leaves no empty file
    model = load(args.model, dtype=args.dtype)
    found = probe.evaluate_probe(probe.weigh(model, args.form, batch, label="asking" if sys.stderr.isatty() else None))
    print("\n".join(probe.probe_table(found)))
    if args.json is not None:
        about = {"model": str(args.model), "form": args.form, "dtype": model.config.dtype}
        args.json.write_text(json.dumps(probe.probe_to_json(found, about), indent=1) + "\n")
        print(f"\nscores and ranks of each situation: {args.json}")
    return 0

"""``chatpose posescript``: trains PoseScript's networks, and converts its released checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from chatpose_jax.cli.compiled import keep_compiled
from chatpose_jax.train.allocator import cpu_only, keep_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of ``chatpose posescript``."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = (
        "train a retriever or a text-to-pose model on captions; the same command goes on with a run that was stopped"
    )
    train = commands.add_parser("train", help=about, description=about)
    train.add_argument(
        "--config",
        required=True,
        help="a name in configs/posescript (retriever, retriever_tiny, …) or a Python file with get_config()",
    )
    train.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write")
    train.add_argument("--init", type=Path, metavar="FOLDER", help="start from the network in this folder")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a setting: --set train.epochs=20; may be repeated",
    )
    train.set_defaults(run_posescript=_train)
    about = "convert a checkpoint (.pth) of PoseScript's retriever or generator; no code in it is run"
    convert = commands.add_parser("convert", help=about, description=about)
    convert.add_argument("file", type=Path, help="such as best_model.pth")
    convert.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write")
    convert.add_argument(
        "--tokens",
        required=True,
        type=Path,
        metavar="PATH",
        help="its vocabulary (vocab3893.pkl for vocA1H1), or for distilbertUncased the folder of distilbert-base-uncased",
    )
    convert.set_defaults(run_posescript=_convert)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand and returns its exit status. Raises UserError."""
    return args.run_posescript(args)


def _train(args: argparse.Namespace) -> int:
    from chatpose_jax.posescript.config import load_posescript_config
    from chatpose_jax.posescript.run import run_posescript

    if cpu_only():
        keep_freed_memory()
    config = load_posescript_config(args.config, args.overrides)
    keep_compiled()
    print(f"folder: {run_posescript(config, args.out, init=args.init)}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from chatpose_jax.posescript.released import convert_released

    print(f"folder: {convert_released(args.file, args.out, args.tokens)}")
    return 0

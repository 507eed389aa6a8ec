"""Command line options that choose a configuration and change it: ``--config``, ``--set KEY=VALUE`` and ``--config.KEY=VALUE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from chatpose_jax.errors import UserError
from chatpose_jax.storage import Location, location

PREFIX = "--config."


def address(text: str) -> Location:
    """``type=`` of an option or argument that names a file or folder, on a disk or a bucket."""
    if not text:
        raise argparse.ArgumentTypeError("expected a file or folder, found ''")
    try:
        return location(text)
    except UserError as error:  # argparse hides the words of any ValueError
        raise argparse.ArgumentTypeError(str(error)) from None


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the argument ``model``, for ``model_or_toy``, and the options of loading it: ``--dtype``, ``--head`` and ``--body``."""
    parser.add_argument(
        "model",
        type=location,
        nargs="?",
        help="model folder, or the folder of a training or demo; also gs://…, s3://…; default: the toy model that comes with the package",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: the folder's, or float32 where that is faster",
    )
    parser.add_argument(
        "--head",
        metavar="MODULE:CLASS",
        help="the model's pose head, if it is from a package of your own: a folder alone never imports code",
    )
    parser.add_argument(
        "--body",
        type=Path,
        help="SMPL, SMPL-H or SMPL-X file (.npz, .pkl); default: the body that comes with the package",
    )


def model_or_toy(model: Location | None) -> Location:
    """The model that the user named. Else that of the package, and a line on stderr says so."""
    from chatpose_jax.chat import DEMO, TOY

    if model is not None:
        return model
    print(f"note: {TOY}", file=sys.stderr)
    return DEMO


def add_config(parser: argparse.ArgumentParser, default: str, example: str = "train.steps=100") -> None:
    """Adds the options ``config``, a name or a file, and ``overrides``, a list of ``KEY=VALUE``."""
    parser.add_argument(
        "--config",
        default=default,
        help=f"a name in configs/ (tiny, chatpose_7b, chatpose_13b) or a Python file with get_config(); {default} by default",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help=f"override a setting: --set {example}; {PREFIX}{example} and '{PREFIX}{example.replace('=', ' ')}' do the same",
    )


def head_flag(name: str) -> str:
    """What ``chatpose chat`` needs on its command line to load a model with this head: nothing, or ``--head`` for a class of one's own."""
    return f" --head {name}" if ":" in name else ""


def read_mesh(text: str) -> tuple[int, int, int]:
    """The sizes (data, fsdp, tensor) that ``--mesh DATAxFSDPxTENSOR`` names. Raises UserError for another text."""
    try:
        data, fsdp, tensor = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UserError(f"--mesh {text}: expected DATAxFSDPxTENSOR, such as 1x8x1") from None
    return data, fsdp, tensor


def as_overrides(words: Sequence[str]) -> list[str]:
    """Rewrites ``--config.KEY=VALUE`` and ``--config.KEY VALUE`` in a list of arguments as ``--set=KEY=VALUE``.

    Raises UserError for a key without a value.
    """
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            return [*found, word, *rest]
        if word.startswith(PREFIX):
            key, equals, value = word.removeprefix(PREFIX).partition("=")
            if not equals:
                value = next(rest, "--")
            if value.startswith("--"):
                raise UserError(f"{word}: expected a value, such as {PREFIX}train.steps=100")
            word = f"--set={key}={value}"
        found.append(word)
    return found

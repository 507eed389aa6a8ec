"""The command line: ``chatpose COMMAND …``. Commands are a table; errors that the user can fix are one line and exit status 2."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatpose_jax import __version__
from chatpose_jax.cli.flags import as_overrides
from chatpose_jax.errors import UserError
from chatpose_jax.settings import did_you_mean

# name: (module, what it does). A module has add_arguments(parser) and run(args) -> exit status.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("chatpose_jax.cli.demo", "train a small ChatPose on generated data, evaluate it, ask it for poses"),
    "pretrained": (
        "chatpose_jax.cli.pretrained",
        "make a ChatPose that talks out of a small pretrained model, from the package index alone",
    ),
    "data": ("chatpose_jax.cli.data", "prepare data sets from their original files; check, show and build data"),
    "train": ("chatpose_jax.cli.train", "train by a configuration; the same command resumes"),
    "eval": ("chatpose_jax.cli.eval", "the paper's tables: models, baselines and predictions answer, side by side"),
    "posescript": (
        "chatpose_jax.cli.posescript",
        "train PoseScript's retriever or text-to-pose model, or convert its released checkpoints",
    ),
    "chat": ("chatpose_jax.cli.chat", "ask a model: interactively, or with --prompt and --image"),
    "serve": ("chatpose_jax.cli.serve", "serve a model over HTTP, by OpenAI's API, with poses in the answers"),
    "convert": (
        "chatpose_jax.cli.convert",
        "PyTorch weights (LLaVA, ChatPose, a language model) or a GGUF file to a model folder",
    ),
    "export": ("chatpose_jax.cli.export", "a model folder to PyTorch weights: merged, or only the adapters"),
    "inspect": ("chatpose_jax.cli.inspect", "say what a folder of weights contains"),
    "verify": ("chatpose_jax.cli.verify", "run converted weights and their PyTorch source side by side, and compare"),
    "probe": ("chatpose_jax.cli.probe", "does a base know poses that nobody told it? asked before any training"),
    "plan": ("chatpose_jax.cli.plan", "will a training or decoding step fit a machine, and how fast could it be"),
    "fit": ("chatpose_jax.cli.fit", "bodies from keypoints in images, joints in space or markers"),
    "render": ("chatpose_jax.cli.render", "draw a pose file, or export it as OBJ, GLB or npz"),
}
MOVED = {"evaluate": "chatpose eval poses MODEL --data SOURCE --out FOLDER"}
"""Commands of earlier versions -> what to type now."""


class Parser(argparse.ArgumentParser):
    """A parser that answers an unknown flag with the usage of its command and a similar flag."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        words = list(sys.argv[1:] if args is None else args)
        if "--set" in self._option_string_actions:
            try:
                words = as_overrides(words)
            except UserError as error:
                self.error(str(error))
        for word in words:
            flag, options = word.split("=", 1)[0], self._option_string_actions
            if word == "--" or (self._subparsers and not word.startswith("-")):
                break  # the rest contains no flags, or belongs to a command
            if word.startswith("-") and " " not in flag and not _is_number(word):
                begins = flag.startswith("--") and any(option.startswith(flag) for option in options)
                if word != "-" and flag not in options and not begins:
                    self.error(f"no option {flag}{did_you_mean(flag, options)}")
        return super().parse_known_args(words, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """An address where only a path on a disk is read or written is an error. argparse would put a text of its own in the place of a UserError,
        which is a ValueError.
        """
        if action.type is Path and "://" in arg_string:
            raise argparse.ArgumentError(action, f"expected a path on a disk, found {arg_string.split('://')[0]}://…")
        try:
            return self._registry_get("type", action.type, action.type)(arg_string)  # type: ignore[attr-defined]
        except UserError as error:
            raise argparse.ArgumentError(action, str(error)) from None
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            return super()._get_value(action, arg_string)  # type: ignore[misc]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit status: 0 done, 2 bad input, 130 interrupted. Training that can be resumed has others, see ``cli.train``."""
    before, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        return _main(argv)
    except KeyboardInterrupt:  # also while the modules of a command are imported, which takes seconds
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = before


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning without the line of code that gave it."""
    return f"warning: {message}\n"


def _main(argv: Sequence[str] | None) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # hides "no GPU found"
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="chatpose", description="Language models that understand 3D human pose, in JAX.")
    parser.add_argument("--version", action="version", version=f"chatpose-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), None)
    if asked in MOVED:
        print(f"error: chatpose {asked} has a new name: {MOVED[asked]}", file=sys.stderr)
        return 2
    if asked is not None and asked not in COMMANDS:
        parser.error(
            f"no command {asked!r}{did_you_mean(asked, COMMANDS) or '; expected one of ' + ', '.join(COMMANDS)}"
        )
    for name, (module, about) in COMMANDS.items():
        sub = commands.add_parser(name, help=about, description=about)
        if name == asked:  # other commands are not imported, so that `chatpose --help` starts quickly
            command = importlib.import_module(module)
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    from smpl_jax.errors import BodyFileError, PoseFileError

    try:
        return args.run(args)
    except (UserError, BodyFileError, PoseFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:  # no permission, no space: nothing that a traceback would explain
        name = error.filename2 or error.filename  # of a renaming, the file that the user named
        where = f"{name}: " if name else ""
        print(f"error: {where}{error.strerror or ' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "status", 2)  # of a run that can go on: not that of bad input


if __name__ == "__main__":
    sys.exit(main())

"""``chatpose data``: its subcommands, as a table like that of ``cli.main``."""

from __future__ import annotations

import argparse
import importlib

# name: (module, what it does). A module has add_arguments(parser) and run(args) -> exit status.
COMMANDS: dict[str, tuple[str, str]] = {
    "list": ("chatpose_jax.cli.data_list", "the data sets, with licences and where to get them"),
    "prepare": ("chatpose_jax.cli.data_prepare", "write the folder that training reads, from the original files"),
    "check": (
        "chatpose_jax.cli.data_check",
        "look for damage, wrong frames, filler values, duplicates and leaks; draw samples",
    ),
    "show": ("chatpose_jax.cli.data_show", "print one row, and draw its images and body"),
    "build": (
        "chatpose_jax.cli.data_build",
        "write questions and descriptions with a language model, or by rules, for review",
    ),
    "schema": (
        "chatpose_jax.cli.data_schema",
        "print the JSON Schema of rows of your own data (the data set jsonlines)",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of ``chatpose data``."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        sub = commands.add_parser(name, help=about, description=about)
        command = importlib.import_module(module)
        command.add_arguments(sub)
        sub.set_defaults(run_data=command.run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand and returns its exit status. Raises UserError."""
    return args.run_data(args)

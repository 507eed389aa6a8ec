"""``chatpose data list``."""

from __future__ import annotations

import argparse

from chatpose_jax.data.datasets import DATA_SETS
from chatpose_jax.data.prepare import find_reader, reader_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose data list``."""
    parser.add_argument("name", nargs="?", help="print the files and options of this data set")


def run(args: argparse.Namespace) -> int:
    """Prints the table, or one data set. Raises UserError for an unknown name."""
    if args.name is None:
        width = max(map(len, DATA_SETS)) + 2
        for name in sorted(DATA_SETS):
            about = find_reader(name).about
            print(f"{name:{width}}{about.title}", about.licence, about.page, sep="\n" + " " * width)
        return 0
    kind = find_reader(args.name)
    about = kind.about
    print(f"{about.title}\nlicence: {about.licence}\npage: {about.page}\n--source FOLDER with")
    print("\n".join(f"  {line}" for line in about.files))
    if options := reader_options(kind):
        print("--set OPTION=VALUE")
        print("\n".join(f"  {line}" for line in [*about.options, *options]))
    return 0

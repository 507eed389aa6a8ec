"""``chatpose data schema``."""

from __future__ import annotations

import argparse

from chatpose_jax.data.readers.jsonlines import schema_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``chatpose data schema`` has no options."""


def run(args: argparse.Namespace) -> int:
    """Prints the JSON Schema of a row of one's own data."""
    print(schema_text(), end="")
    return 0

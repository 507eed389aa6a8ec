"""``chatpose convert``."""

from __future__ import annotations

import argparse

from chatpose_jax.processing.processor import Processor
from chatpose_jax.weights.cli import add_convert_arguments
from chatpose_jax.weights.cli import run_convert as run

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose convert``. The finished tokenizer is read back and checked against the model before the folder counts as whole."""
    add_convert_arguments(parser)
    parser.set_defaults(finish=lambda folder, config: Processor.load(folder, config).save(folder))

"""Converts PyTorch weights (LLaVA-1.5, CHATPOSE-V0, Vicuna) to a folder that chatpose_jax.load takes. PyTorch is not
needed, nothing in a file is run, and memory does not grow with the model. The same as: chatpose convert.
"""

import argparse
import sys
from pathlib import Path

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.processing.processor import Processor
from chatpose_jax.weights.cli import add_convert_arguments, run_convert


def complete_processor(tokenizer: Path, config: ModelConfig) -> None:
    """Checks that the tokenizer fits the model, and writes the processor's settings beside it."""
    Processor.load(tokenizer, config).save(tokenizer)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python convert_weights.py", description=__doc__)
    add_convert_arguments(parser)
    parser.set_defaults(finish=complete_processor)
    try:
        return run_convert(parser.parse_args())
    except UserError as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

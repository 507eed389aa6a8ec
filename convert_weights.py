"""Converts PyTorch weights (LLaVA-1.5, CHATPOSE-V0) to a folder that ``chatpose_jax.load`` takes; the same as
``chatpose convert``.
"""

import argparse
import sys
from pathlib import Path

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.processing.processor import Processor
from chatpose_jax.weights.cli import add_convert_arguments, run_convert

EXAMPLES = """examples:
  python convert_weights.py llava-1.5-13b-hf out/llava --dtype bfloat16
  python convert_weights.py llava-v1.5-13b out/llava --vision clip-vit-large-patch14-336
  python convert_weights.py CHATPOSE-V0 out/chatpose --vision clip-vit-large-patch14-336

docs/weights.md has the table of layouts."""


def complete_processor(tokenizer: Path, config: ModelConfig) -> None:
    """Checks that the tokenizer fits the model, and writes the processor's settings beside it."""
    Processor.load(tokenizer, config).save(tokenizer)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_convert_arguments(parser)
    parser.set_defaults(finish=complete_processor)
    try:
        return run_convert(parser.parse_args())
    except UserError as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

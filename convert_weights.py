"""Converts PyTorch weights (LLaVA-1.5, CHATPOSE-V0) to a folder that ``chatpose_jax.load`` takes; the same as
``chatpose convert``.
"""

import argparse
import sys

from chatpose_jax.errors import UserError
from chatpose_jax.weights.cli import add_convert_arguments, run_convert

EXAMPLES = """examples:
  python convert_weights.py llava-1.5-13b-hf out/llava --dtype bfloat16
  python convert_weights.py llava-v1.5-13b out/llava --vision clip-vit-large-patch14-336
  python convert_weights.py CHATPOSE-V0 out/chatpose --vision clip-vit-large-patch14-336

docs/weights.md has the table of layouts."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_convert_arguments(parser)
    try:
        return run_convert(parser.parse_args())
    except UserError as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Converts PyTorch weights (LLaVA-1.5, CHATPOSE-V0, Vicuna) to a folder for chatpose_jax.load. It does not need PyTorch, runs no code from a file,
and its memory does not grow with the model. The same as chatpose convert.
"""

import sys

from chatpose_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))

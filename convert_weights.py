"""Converts PyTorch weights (LLaVA-1.5, CHATPOSE-V0, Vicuna) to a folder that chatpose_jax.load takes. PyTorch is not
needed, nothing in a file is run, and memory does not grow with the model. The same as: chatpose convert.
"""

import sys

from chatpose_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))

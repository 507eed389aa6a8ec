"""``chatpose inspect``."""

from chatpose_jax.weights.cli import add_inspect_arguments as add_arguments
from chatpose_jax.weights.cli import run_inspect as run

__all__ = ["add_arguments", "run"]

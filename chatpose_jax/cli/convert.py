"""``chatpose convert``."""

from chatpose_jax.weights.cli import add_convert_arguments as add_arguments
from chatpose_jax.weights.cli import run_convert as run

__all__ = ["add_arguments", "run"]

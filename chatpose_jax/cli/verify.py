"""``chatpose verify``."""

from chatpose_jax.weights.cli import add_verify_arguments as add_arguments
from chatpose_jax.weights.cli import run_verify as run

__all__ = ["add_arguments", "run"]

"""The paper's recipe on LLaVA-1.5-7B."""

from chatpose_jax.cli.config import run_config


def get_config():
    return run_config(model="chatpose_7b")

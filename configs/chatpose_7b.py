"""The paper's recipe on LLaVA-1.5-7B."""

from chatpose_jax.train.run_config import run_config


def get_config():
    config = run_config(model="chatpose_7b")
    config.data.source = "mixture"  # text, instructions and pictures as 1 : 1 : 2; name your own in data.sources
    return config

"""The paper's recipe on LLaVA-1.5-7B."""

from chatpose_jax.train.run_config import run_config


def get_config():
    config = run_config(model="chatpose_7b")
    config.data.sources = (  # the paper's proportions of text, instructions and images, on generated rows; name your own sets here
        ("synthetic", 1.0, {"kind": "text"}),
        ("synthetic", 1.0, {"kind": "instruction"}),
        ("synthetic", 2.0, {"kind": "image"}),
    )
    return config

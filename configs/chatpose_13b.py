"""The paper's ChatPose: LLaVA-1.5-13B, LoRA r 128 on q and v, the pose head, the new token's rows (the defaults of TrainConfig)."""

from chatpose_jax.train.run_config import run_config


def get_config():
    config = run_config(model="chatpose_13b")
    config.data.source = "mixture"  # text, instructions and pictures as 1 : 1 : 2; name your own in data.sources
    return config

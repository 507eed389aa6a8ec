"""A ChatPose that learns from nothing in minutes on two CPU cores: the demo."""

from chatpose_jax.cli.config import run_config
from chatpose_jax.train.trainable import EVERYTHING


def get_config():
    config = run_config(model="tiny")
    config.model.lora = None  # nothing is frozen, so there is nothing to adapt

    config.data.template = "plain"
    config.data.train_size = 8000

    config.train.trainable = EVERYTHING
    config.train.steps = 1200
    config.train.batch_size = 32
    config.train.accumulate = 1
    config.train.max_length = 320
    config.train.learning_rate = 1e-3
    config.train.schedule = "cosine"
    config.train.lambda_pose = 5.0
    config.train.remat = False
    config.train.save_every = 200
    config.train.eval_every = 200
    return config

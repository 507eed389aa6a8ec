"""A ChatPose that learns from nothing in minutes on two CPU cores: the demo."""

from chatpose_jax.train.run_config import run_config
from chatpose_jax.train.trainable import EVERYTHING


def get_config():
    config = run_config(model="tiny")
    config.model.lora = None  # nothing is frozen, so there is nothing to adapt
    config.model.text.num_layers = 1  # two learn no faster, and each step takes longer

    config.data.template = "plain"
    tasks = {
        "text": 7, "text_short": 2, "situation": 2, "text_turns": 7,
        "image": 66, "image_turns": 8, "image_words": 4, "words": 1,
    }  # fmt: skip
    config.data.sources = (("synthetic", 1.0, {"train_size": 12000, "tasks": tasks}),)

    config.data.buckets = 3  # a fourth saves less padding than its compilation takes

    config.train.trainable = EVERYTHING
    config.train.optimizer = "muon"
    config.train.steps = 3000
    config.train.batch_size = 16
    config.train.accumulate = 1
    config.train.max_length = 320
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = 200
    config.train.b2 = 0.98  # a memory of 50 updates: the first gradients are far larger than all later ones
    # From nothing, the pose must outweigh the choice among answers that differ in words alone.
    config.train.lambda_pose = 20.0
    config.train.mesh.fsdp = 1  # too small to be worth splitting
    config.train.remat = "none"
    config.train.save_every = 1500
    config.train.eval_every = 1500
    return config

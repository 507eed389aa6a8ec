"""LLaVA*-S in small: the model of ``tiny`` learns from nothing to write the keypoints of generated images as text.

The system "keypoints" fits poses to what it writes (docs/evaluation.md).
"""

from chatpose_jax.train.run_config import run_config
from chatpose_jax.train.trainable import EVERYTHING


def get_config():
    config = run_config(model="tiny")
    config.model.lora = None  # as in tiny

    config.data.template = "plain"
    config.data.sources = (("keypoints", 1.0, {"of": "synthetic", "train_size": 12000, "scale": 100}),)
    config.data.buckets = 1  # all answers have nearly the same length

    config.train.trainable = EVERYTHING
    config.train.optimizer = "muon"
    config.train.steps = 3000
    config.train.batch_size = 16
    config.train.accumulate = 1
    config.train.max_length = 256
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = 200
    config.train.b2 = 0.98
    config.train.mesh.fsdp = 1
    config.train.remat = "none"
    config.train.save_every = 1500
    return config

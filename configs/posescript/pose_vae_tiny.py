"""A small pose generator that learns the generated set's captions in minutes on two CPU cores."""

from chatpose_jax.posescript.config import posescript_config


def get_config():
    config = posescript_config("pose_vae")
    tasks = {"text": 3, "text_short": 1}
    config.data.sources = (("synthetic", 1.0, {"train_size": 12000, "tasks": tasks}),)
    config.model.joints = 22  # its poses have no fingers
    config.model.width = 256
    config.model.text.word_width = 64
    config.model.log_scale = -3.0  # 5 cm
    config.loss.mesh = 256
    config.train.batch_size = 128
    config.train.epochs = 16
    config.train.learning_rate = 1e-3
    config.train.halve_every = 5
    config.train.eval_every = 2
    return config

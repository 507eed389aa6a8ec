"""A small retriever that learns the generated set's captions in minutes on two CPU cores."""

from chatpose_jax.posescript.config import posescript_config


def get_config():
    config = posescript_config("retriever")
    tasks = {"text": 3, "text_short": 1}
    config.data.sources = (("synthetic", 1.0, {"train_size": 12000, "tasks": tasks}),)
    config.model.joints = 22  # its poses have no fingers
    config.model.latent = 128
    config.model.pose_width = 256
    config.model.text.word_width = 64
    config.loss.noise = 0.1
    config.train.batch_size = 128
    config.train.epochs = 10
    config.train.learning_rate = 1e-3
    config.train.halve_every = 3
    config.train.eval_every = 1
    return config

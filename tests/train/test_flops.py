"""Operations of a step."""

import numpy as np

from chatpose_jax.train.flops import utilisation
from chatpose_jax.train.run_config import load_config


def test_lora_takes_two_thirds_of_what_training_everything_would():
    config = load_config("chatpose_13b")
    batch = {"input_ids": np.zeros((16, 1024), np.int32), "pixel_values": np.zeros((16, 1, 336, 336, 3), np.float32)}
    found = utilisation(config.model, config.train)(batch)
    assert 1.4 < found["mfu_6n"] / found["mfu"] < 1.5
    parameters, tokens = 13.0e9, 16 * 1024
    assert 4 * parameters * tokens < found["mfu"] < 4.4 * parameters * tokens

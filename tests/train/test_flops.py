"""Operations of a step."""

import dataclasses

import numpy as np

from chatpose_jax.train.flops import decode_cost, utilisation
from chatpose_jax.train.run_config import load_config
from chatpose_jax.train.trainable import Rule


def test_lora_takes_two_thirds_of_what_training_everything_would():
    config = load_config("chatpose_13b")
    batch = {"input_ids": np.zeros((16, 1024), np.int32), "pixel_values": np.zeros((16, 1, 336, 336, 3), np.float32)}
    found = utilisation(config.model, config.train)(batch)
    assert 1.4 < found["mfu_6n"] / found["mfu"] < 1.5
    parameters, tokens = 13.0e9, 16 * 1024
    assert 4 * parameters * tokens < found["mfu"] < 4.4 * parameters * tokens


def test_a_tied_table_counts_as_the_lm_head_does():
    config = load_config("tiny", ["model.vision=none", "model.lora=none"])
    tied = config.model.replace(text=dataclasses.replace(config.model.text, tied=True))
    batch = {"input_ids": np.zeros((2, 64), np.int32)}
    train = dataclasses.replace(config.train, trainable=(Rule(".*", 1.0),))
    assert utilisation(tied, train)(batch) == utilisation(config.model, train)(batch)
    assert decode_cost(tied, 1, 64).weights == decode_cost(config.model, 1, 64).weights


def test_layers_before_the_adapters_take_a_forward_pass_alone():
    def cost(last, *rows):
        rules = (*rows, ("decoder/layers/.*/lora_[ab]", 1.0), (".*", None))
        lora = {"rank": 8, "alpha": 16.0, "targets": ("q_proj", "v_proj"), "last_layers": last}
        settings = ["model.vision=none", "model.text.num_layers=8", f"model.lora={lora!r}"]
        config = load_config("tiny", [*settings, f"train.trainable={rules!r}"])
        return utilisation(config.model, config.train)({"input_ids": np.zeros((2, 64), np.int32)})["mfu"]

    tokens, width = 2 * 64, 128
    weights = 2 * tokens * (4 * width * width + 3 * width * 384)
    attention = 2 * 2 * width * 64**2
    adapters = 2 * tokens * 2 * 8 * (width + width)
    found = cost(2)
    assert cost(None) - found == 6 * (weights + 2 * attention + 3 * adapters)
    assert cost(2, ("decoder/embed_tokens/added", 1.0)) - found == 6 * (weights + 2 * attention)

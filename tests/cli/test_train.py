"""What ``chatpose train`` knows of chips, and how it counts."""

import numpy as np
import pytest

from chatpose_jax.cli.config import load_config
from chatpose_jax.cli.train import peak_flops, training_mesh, utilisation


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_chips_are_known_by_the_names_that_jax_gives_them(kind, peak):
    assert peak_flops(kind) == peak


def test_lora_takes_two_thirds_of_what_training_everything_would():
    config = load_config("chatpose_13b")
    batch = {"input_ids": np.zeros((16, 1024), np.int32), "pixel_values": np.zeros((16, 1, 336, 336, 3), np.float32)}
    found = utilisation(config.model, config.train, batch)
    assert 1.4 < found["mfu_6n"] / found["mfu"] < 1.5
    parameters, tokens = 13.0e9, 16 * 1024
    assert 4 * parameters * tokens < found["mfu"] < 4.4 * parameters * tokens


def test_one_device_needs_no_mesh():
    assert training_mesh(load_config("tiny").train) is None
    mesh = training_mesh(load_config("tiny", ["train.mesh.data=-1"]).train)
    assert mesh is not None
    assert dict(mesh.shape) == {"data": mesh.size, "fsdp": 1, "tensor": 1}

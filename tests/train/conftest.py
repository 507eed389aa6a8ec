"""A small model folder that runs start from."""

import dataclasses

import jax
import pytest

from chatpose_jax.models.chatpose import init_params
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.weights.save import save_folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A small model folder to start from, without adapters."""
    model = preset("tiny").replace(lora=None, text=dataclasses.replace(preset("tiny").text, num_layers=1))
    folder = tmp_path_factory.mktemp("base") / "model"
    params = init_params(model, jax.random.key(1))
    return save_folder(folder, model, params, processor=tiny_processor(model, "plain"))

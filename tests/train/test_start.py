"""What a run starts from: weights of a folder, quantised if the configuration says so."""

import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.quantize import QUANTIZATIONS, dequantize
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.train.start import adopt, initial_params
from chatpose_jax.train.trainable import flatten
from chatpose_jax.weights import folder as model_folder
from tests.train.settings import lora


@pytest.mark.parametrize("sizes", [None, (1, 2, 2)])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_quantize_is_no_idle_word_beside_init(base, kind, sizes):
    config, quantization = adopt(lora(f"model.quantize={kind}"), base), QUANTIZATIONS[kind]
    mesh = None if sizes is None else make_mesh(*sizes)
    before = flatten(initial_params(adopt(lora(), base), base, mesh))
    after = flatten(initial_params(config, base, mesh))
    assert {path: leaf.dtype for path, leaf in after.items()} == {
        path: leaf.dtype for path, leaf in flatten(abstract_params(config.model)).items()
    }
    for path, leaf in after.items():
        if leaf.dtype == quantization.codes:
            values = dequantize(leaf, after[quantization.scale_path(path)])
            error = {"int8": 1 / 250, "int4": 0.18}[
                kind
            ]  # half of a step; of int4 what is clipped opposite to the largest value
            assert np.abs(values - before[path]).max() <= np.abs(before[path]).max() * error
        elif path in before:
            np.testing.assert_array_equal(leaf, before[path])


def test_a_base_is_not_quantised_twice(base, monkeypatch):
    config = model_folder.read_config(base).replace(quantize="int8")
    monkeypatch.setattr(model_folder, "read_config", lambda folder: config)
    assert adopt(lora(), base).model.quantize == adopt(lora("model.quantize=int8"), base).model.quantize == "int8"
    with pytest.raises(UserError, match=r"is int8, and model.quantize is int4: leave model.quantize out"):
        adopt(lora("model.quantize=int4"), base)

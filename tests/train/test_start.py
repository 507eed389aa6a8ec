"""What a run starts from: weights of a folder, quantised if the configuration says so."""

import numpy as np
import pytest

from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.train.start import adopt, initial_params
from chatpose_jax.train.trainable import flatten
from tests.train.settings import lora


@pytest.mark.parametrize("sizes", [None, (1, 2, 2)])
def test_int8_is_no_idle_word_beside_init(base, sizes):
    config = lora("model.quantize=int8")
    config = adopt(config, base)
    mesh = None if sizes is None else make_mesh(*sizes)
    before = flatten(initial_params(adopt(lora(), base), base, mesh))
    after = flatten(initial_params(config, base, mesh))
    assert {path: leaf.dtype for path, leaf in after.items()} == {
        path: leaf.dtype for path, leaf in flatten(abstract_params(config.model)).items()
    }
    for path, leaf in after.items():
        if leaf.dtype == np.int8:
            values = leaf * after[f"{path}_scale"][..., None, :]
            assert np.abs(values - before[path]).max() <= np.abs(before[path]).max() / 250
        elif path in before:
            np.testing.assert_array_equal(leaf, before[path])

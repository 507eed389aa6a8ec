"""Int8 kernels: rounding, and a model that computes with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from chatpose_jax.models.chatpose import abstract_params, bind, init_params
from chatpose_jax.models.config import preset
from chatpose_jax.models.quantize import quantize_int8

from ..numerics import agree, rounded
from . import small


def test_rounding_is_symmetric_by_column_and_half_to_even() -> None:
    kernel = np.array([[127.0, 0.0, -2.0], [2.5, 0.0, 1.0], [-3.5, 0.0, 0.0]], np.float32)
    for xp in (np, jnp):
        values, scale = quantize_int8(xp.asarray(kernel))
        assert isinstance(values, np.ndarray) == (xp is np)
        assert values.dtype == np.int8 and scale.dtype == np.float32
        np.testing.assert_array_equal(values, [[127, 0, -127], [2, 0, 64], [-4, 0, 0]])
        np.testing.assert_allclose(scale, [1.0, 1.0, 2 / 127])


def test_stacked_layers_are_quantized_each_for_itself() -> None:
    kernels = np.random.default_rng(0).standard_normal((3, 8, 5)).astype(np.float32)
    values, scales = quantize_int8(kernels)
    for layer in range(3):
        alone = quantize_int8(kernels[layer])
        np.testing.assert_array_equal(values[layer], alone[0])
        np.testing.assert_array_equal(scales[layer], alone[1])
    assert np.abs(values * scales[:, None] - kernels).max() <= scales.max() / 2 * 1.001


def test_numpy_and_xla_round_alike() -> None:
    """A folder that was converted to int8 and one that is quantised while it loads are the same frozen base."""
    kernel = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
    ours, compiled = quantize_int8(kernel), jax.jit(quantize_int8)(kernel)
    np.testing.assert_array_equal(compiled[0], ours[0])
    np.testing.assert_array_equal(compiled[1], ours[1])


def test_a_quantized_model_computes_with_its_rounded_weights() -> None:
    config = small.config(2).replace(quantize="int8")
    params = init_params(config, jax.random.key(0))
    ids = jnp.asarray([small.row(config, 9)])

    def restore(tree: dict) -> dict:
        if "kernel_scale" in tree:
            return {"kernel": tree["kernel"] * tree["kernel_scale"][..., None, :]}
        return {name: restore(value) if isinstance(value, dict) else value for name, value in tree.items()}

    ours = jax.jit(lambda params: bind(config, params)(ids).hidden)(params)
    plain = restore(params)
    assert plain["decoder"]["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.float32
    agree(rounded(jax.jit(lambda params: bind(small.config(2), params)(ids).hidden), plain), ours)


def test_only_the_seven_projections_of_13b_are_int8_and_take_half() -> None:
    config = preset("chatpose_13b")
    plain, small_one = (
        jax.tree.leaves_with_path(abstract_params(c)) for c in (config, config.replace(quantize="int8"))
    )
    quantized = [path for path, leaf in small_one if leaf.dtype == jnp.int8]
    assert len(quantized) == 7
    assert all("layers" in str(path) and "decoder" in str(path) for path in quantized)
    sizes = [sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves) for leaves in (plain, small_one)]
    assert sizes[0] - sizes[1] > 0.46 * sizes[0]

"""Fingerprints tell arrays apart by every bit and its place, and see no difference in how they lie."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.train.fingerprint import fingerprint


def one(array) -> str:
    return fingerprint({"x": array})["x"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4", "int32", "bool"])
def test_every_element_and_its_place_counts(dtype):
    x = np.asarray(
        jnp.arange(24).reshape(2, 3, 4) % 7 > 2 if dtype == "bool" else jnp.arange(24).reshape(2, 3, 4), dtype
    )
    variants = {one(x), one(x[::-1]), one(x.swapaxes(0, 1)), one(np.roll(x, 1, axis=2))}
    for place in itertools.product(*map(range, x.shape)):
        other = x.copy()
        other[place] = not other[place] if dtype == "bool" else other[place] + 1
        variants.add(one(other))
    assert len(variants) == 4 + x.size
    assert one(x) == one(jnp.asarray(x))
    assert len(one(x)) == 16


def test_the_lowest_bit_and_the_sign_of_zero_count():
    x = np.linspace(-1, 1, 50, dtype=np.float32)
    other = x.copy()
    other[17] = np.nextafter(other[17], np.float32(2))
    assert one(x) != one(other)
    assert one(np.zeros(4, np.float32)) != one(-np.zeros(4, np.float32))
    assert one(np.float32(1)) != one(np.zeros((), np.float32))


@pytest.mark.parametrize("spec", [(), ("data",), (None, "tensor"), (("data", "fsdp"), "tensor")])
def test_the_sharding_does_not(spec):
    mesh = make_mesh(2, 2, 2)
    x = jax.random.normal(jax.random.key(0), (8, 6), jnp.bfloat16)
    assert one(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))) == one(x)

"""Chips by the names that JAX gives them."""

import pytest

from chatpose_jax.train.chips import peak_flops


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

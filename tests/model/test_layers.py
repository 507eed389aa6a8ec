"""Products in bfloat16, rematerialisation, attention's mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatpose_jax.models import layers
from chatpose_jax.models.attention import attention
from chatpose_jax.models.chatpose import bind, init_params, unstack_layers
from chatpose_jax.models.config import LoRAConfig
from chatpose_jax.models.layers import contract, matmul
from chatpose_jax.models.remat import POLICIES

from ..numerics import agree, near, rounded
from . import small


@pytest.mark.parametrize("shape", [(1, 1, 32), (1, 32), (2, 5, 32), (4, 32)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width, axes", [(24, "io"), (24, "oi"), (4, "io")])  # 4: a tall, narrow kernel
def test_matmul_and_its_gradients_are_those_of_numpy(shape: tuple[int, ...], dtype: str, width: int, axes: str) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    stored = (32, width) if axes == "io" else (width, 32)
    x, kernel, weight = (
        jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, (shape, stored, (*shape[:-1], width)))
    )
    tolerance = 1e-5 if dtype == "float32" else 2**-8

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum((matmul(x, kernel, axes) * weight).astype(jnp.float32))

    y, (dx, dkernel) = (
        jax.jit(partial(matmul, axes=axes))(x, kernel),
        jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel),
    )
    assert {str(z.dtype) for z in (y, dx, dkernel)} == {dtype}
    a, b, w = (np.asarray(z, np.float64) for z in (x, kernel, weight))
    rows, cotangents = a.reshape(-1, 32), w.reshape(-1, width)
    if axes == "oi":
        b, dkernel = b.T, dkernel.T
    for found, expected in ((y, a @ b), (dx, w @ b.T), (dkernel, rows.T @ cotangents)):
        assert np.abs(np.asarray(found, np.float64) - expected).max() <= tolerance * np.abs(expected).max()


def test_a_frozen_operand_keeps_nothing_for_its_gradient() -> None:
    x, kernel = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((4, 2), jnp.bfloat16)
    _, pullback = jax.vjp(lambda x: contract("ai,io->ao", x, kernel), x)
    kept = {leaf.shape for leaf in jax.tree.leaves(pullback)}
    assert kernel.shape in kept and x.shape not in kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(scan: bool, dtype: str) -> None:
    config = small.config(2, scan=scan, lora=LoRAConfig(rank=4, dropout=0.5)).replace(dtype=dtype, param_dtype=dtype)
    params = init_params(config, jax.random.key(0))
    ids = jnp.asarray([small.row(config, 8)] * 2)

    def gradients(remat: str) -> Callable[[Any], Any]:
        def loss(decoder: dict) -> jax.Array:
            hidden = bind(config, params | {"decoder": decoder})(ids, dropout_key=jax.random.key(1), remat=remat).hidden
            return jnp.sum(hidden.astype(jnp.float32) ** 3)

        return jax.jit(jax.grad(loss))

    policies = set(POLICIES) - {"none"} if scan and dtype == "float32" else {"full"}
    plain = rounded(gradients("none"), params["decoder"])
    for policy in sorted(policies):
        jax.tree.map(partial(agree, message=policy), plain, gradients(policy)(params["decoder"]))


def test_bfloat16_stays_near_float32() -> None:
    exact = small.config(2)
    config = exact.replace(dtype="bfloat16")
    params = init_params(exact, jax.random.key(0))
    ids = jnp.asarray([small.row(config, 12)])
    expected = jax.jit(lambda params: bind(exact, params)(ids).hidden)(params)
    found = jax.jit(lambda params: bind(config, params)(ids).hidden)(params)
    assert found.dtype == jnp.bfloat16
    assert jnp.abs(found - expected).max() < 0.1 * jnp.abs(expected).max()


def test_attention_is_grouped_masked_and_finite_on_empty_rows() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = jax.random.normal(keys[0], (1, 3, 4, 8)), *(jax.random.normal(key, (1, 2, 5, 8)) for key in keys[1:])
    mask = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    found = np.asarray(attention(q, k, v, mask[None])).reshape(3, 4, 8)
    assert np.isfinite(found).all()
    for head in range(4):
        np.testing.assert_allclose(found[0, head], v[0, head // 2, 0], rtol=1e-6)
        scores = np.asarray(k[0, head // 2]) @ np.asarray(q[0, 1, head]) / np.sqrt(8)
        weights = np.where(mask[1], np.exp(scores), 0)
        near(found[1, head], weights / weights.sum() @ np.asarray(v[0, head // 2]))


def test_unrolled_layers_have_the_gradients_of_scanned_ones() -> None:
    scanned, unrolled = small.config(2), small.config(2, scan=False)
    params = init_params(scanned, jax.random.key(0))
    ids = jnp.asarray([small.row(scanned, 8)])

    def gradient(config, params):  # type: ignore[no-untyped-def]
        return jax.grad(lambda params: jnp.sum(bind(config, params)(ids).hidden ** 3))(params)

    apart = rounded(jax.jit(lambda params: unstack_layers(gradient(scanned, params))["decoder"]), params)
    alone = jax.jit(partial(gradient, unrolled))(unstack_layers(params))["decoder"]
    jax.tree.map(agree, apart, alone)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16)])
def test_products_elsewhere_are_those_of_the_cpu(shape, monkeypatch):
    """GPU and TPU multiply without flattening rows; only the way differs."""
    x, kernel = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), (16, 8))
    here = rounded(lambda operands: layers.matmul(*operands), (x, kernel))
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    agree(here, layers.matmul(x, kernel))

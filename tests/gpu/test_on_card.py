"""What only a card can show: its kernels against the portable ones, and that it rounds no more than it should.

Each test runs twice: with the portable kernels on any machine, which shows that the test works, and marked ``gpu`` on a card, where
``pytest -m gpu tests/gpu`` runs it (``bench/on_gpu.sh``). Yardsticks are measured: the error of the portable computation in the same dtype.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatpose_jax import generate
from chatpose_jax.models.attention import causal_attention
from chatpose_jax.models.chatpose import bind, fake_batch, init_params, unstack_layers
from chatpose_jax.models.config import LoRAConfig, ModelConfig
from chatpose_jax.models.quantize import dequantize
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.planning.plan import trace_decoding
from chatpose_jax.train.checkpoints import Checkpoints
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.fingerprint import fingerprint
from chatpose_jax.train.step import init_state, make_step
from smpl_jax import load_body, vertices
from tests.train import test_step

from ..smpl.models import SMPL_PARENTS, random_arrays, random_rotations

CONFIG = test_step.CONFIG.replace(
    text=dataclasses.replace(test_step.CONFIG.text, hidden_size=256, intermediate_size=512, head_dim=128),
    lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.0),
)
"""Heads as wide as cuDNN's kernels want them."""
ROUNDING = 2.0**-8
"""Of bfloat16."""


@pytest.fixture(params=["portable", pytest.param("gpu", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> str:
    """``gpu`` on a card, ``portable`` on any machine."""
    if request.param == "gpu" and jax.default_backend() != "gpu":
        pytest.skip("JAX finds no CUDA device here")
    return request.param


def error(found: Any, expected: Any) -> float:
    """Root mean square of the difference, of that of what is expected; the largest of all arrays."""

    def one(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        return float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))

    return max(jax.tree.leaves(jax.tree.map(one, found, expected)))


def weighed(attend: Callable[..., jax.Array], counts: jax.Array, *qkv: jax.Array) -> Any:
    """Output and gradients in float32."""

    def total(*qkv: jax.Array) -> Any:
        y = attend(*qkv).astype(jnp.float32) * counts
        return jnp.sum(jnp.sin(3 * y)), y

    (_, y), slopes = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return y, slopes


@pytest.mark.parametrize(
    ("packed", "length", "heads"), [(False, 384, (4, 4)), (True, 577, (4, 2))], ids=["whole", "packed"]
)
def test_attention_and_its_gradients(where: str, packed: bool, length: int, heads: tuple[int, int]) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, length, heads[0], 128), jnp.bfloat16)
    k, v = (jax.random.normal(key, (2, heads[1], length, 128), jnp.bfloat16) for key in keys[1:])
    ids = 1 + np.arange(length)[None] // 150 + np.zeros((2, 1), int)
    ids[:, length - 20 :] = 0  # padding
    segments = jnp.asarray(ids, jnp.int32) if packed else None
    counts = jnp.asarray(ids > 0)[..., None] if packed else jnp.ones((2, length, 1))

    def run(setting: str, dtype: Any, segments: Any = segments) -> Any:
        attend = causal_attention(setting, length, 128, dtype, segments)
        return weighed(attend, counts, *(x.astype(dtype) for x in (q, k, v)))

    with jax.default_matmul_precision("highest"):
        exact = run("xla", jnp.float32)
    yardstick = error(run("xla", jnp.bfloat16), exact)
    if where == "gpu":
        attend = causal_attention("auto", length, 128, jnp.bfloat16, segments)
        assert "fmha" in jax.jit(attend).lower(q, k, v).as_text()
    assert error(run("auto", jnp.bfloat16), exact) < 2 * max(yardstick, ROUNDING)
    other = jnp.asarray(1 + np.arange(length)[None] // 100 + np.zeros((2, 1), int), jnp.int32)
    assert error(run("auto", jnp.bfloat16, other), exact) > 0.1  # another mask is seen


@pytest.mark.parametrize(("quantize", "rows"), [("int8", 1), ("int4", 1), ("int4", 48)])
def test_quantised_kernels(where: str, rows: int, quantize: str) -> None:
    """A decoder with codes for kernels against one with the values that they stand for, in float32: no more error than bfloat16 gives."""
    dtype = "bfloat16" if where == "gpu" else "float32"
    config = CONFIG.replace(quantize=quantize, lora=None)
    params = init_params(config, jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 64, (1, rows)))

    def run(config: ModelConfig, params: Any) -> jax.Array:
        return jax.jit(lambda params: bind(config, params)(ids).hidden)(params)

    def values(tree: dict[str, Any]) -> dict[str, Any]:
        scale = next((tree[name] for name in ("kernel_scale", "group_scale") if name in tree), None)
        if scale is not None:
            return {"kernel": dequantize(tree["kernel"], scale)}
        return {name: values(value) if isinstance(value, dict) else value for name, value in tree.items()}

    plain, whole = config.replace(quantize="none"), values(params)
    with jax.default_matmul_precision("highest"):
        exact = run(plain.replace(dtype="float32"), whole)
    yardstick = error(run(plain.replace(dtype=dtype), whole), exact)
    assert error(run(config.replace(dtype=dtype), params), exact) < 2 * max(yardstick, ROUNDING)


def settings() -> TrainConfig:
    return TrainConfig(steps=4, batch_size=2, accumulate=1, warmup_steps=1, learning_rate=1e-3, remat="full")


def test_a_step_in_bfloat16_is_the_one_in_float32(where: str) -> None:
    """Losses of three steps."""
    params = init_params(CONFIG, jax.random.key(0))
    batch = fake_batch(CONFIG, batch=2, length=300)

    def losses(dtype: str) -> list[float]:
        config = CONFIG.replace(dtype=dtype)
        state, frozen = init_state(settings(), jax.tree.map(jnp.array, params))
        step = make_step(config, settings(), params)
        found = []
        for _ in range(3):
            state, metrics = step(state, frozen, batch)
            found.append(float(metrics["loss"]))
        return found

    with jax.default_matmul_precision("highest"):
        exact = losses("float32")
    assert exact[0] > exact[2]
    np.testing.assert_allclose(losses("bfloat16"), exact, rtol=3 * ROUNDING)


def test_a_resumed_step(where: str, tmp_path: Path) -> None:
    """A checkpoint gives the state back to the last bit, and the step after it is the one of the run that was not interrupted."""
    params = init_params(CONFIG, jax.random.key(0))
    batch = fake_batch(CONFIG, batch=2, length=32)
    step = make_step(CONFIG, settings(), params)
    state, frozen = init_state(settings(), params)

    def open_checkpoints() -> Checkpoints:
        return Checkpoints(tmp_path, keep=2, identity={}, frozen=fingerprint(frozen), result=tmp_path / "result")

    checkpoints = open_checkpoints()
    for _ in range(2):
        state, _ = step(state, frozen, batch)
    checkpoints.save(state, {"position": 2})
    checkpoints.wait()
    checkpoints.close()
    saved = jax.device_get(state)
    state, metrics = step(state, frozen, batch)
    checkpoints = open_checkpoints()
    resumed, data = checkpoints.restore(state)
    checkpoints.close()
    assert data == {"position": 2} and int(resumed.step) == 2
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), saved)
    _, again = step(resumed, frozen, batch)
    assert float(again["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert float(again["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-3)


def test_decoding_is_the_forward_pass(where: str) -> None:
    """In float32: each greedy token is the best of the logits of a forward pass over all tokens before it."""
    config = CONFIG.replace(dtype="float32", lora=None, eos_token_id=-1, scan_layers=False)
    params = unstack_layers(init_params(config.replace(scan_layers=True), jax.random.key(0)))
    prompts = [np.arange(3, 20, dtype=np.int32), np.arange(40, 51, dtype=np.int32)]
    with jax.default_matmul_precision("highest"):
        tokens = generate.generate(config, params, prompts, max_new_tokens=12).tokens
        model = bind(config, params)
        for prompt, answer in zip(prompts, tokens):
            ids = np.concatenate([prompt, answer])[None]
            logits = np.asarray(model.logits(model(jnp.asarray(ids)).hidden))[0, len(prompt) - 1 : -1]
            chosen = np.take_along_axis(logits, answer[:, None], axis=1)[:, 0]
            np.testing.assert_allclose(chosen, logits.max(axis=1), atol=1e-4)


def test_a_decoded_token_copies_no_weights(where: str) -> None:
    """XLA for GPUs would put the weights of queries, keys and values side by side in every step."""
    config = CONFIG.replace(dtype="bfloat16", lora=None, scan_layers=False)
    text = trace_decoding(config, make_mesh(1, 1, 1, devices=jax.devices()[:1]), 1, 128).lower().compile().as_text()
    assert "[256,768]" not in text


def test_the_body_is_float32(where: str, tmp_path: Path) -> None:
    """Against float64: tensor cores would round to 10 bits, which is a millimetre."""
    arrays = random_arrays("smpl", num_vertices=500)
    (tmp_path / "SMPL_NEUTRAL.pkl").write_bytes(pickle.dumps(arrays))
    body = load_body(tmp_path / "SMPL_NEUTRAL.pkl")
    rng = np.random.default_rng(0)
    rotations, betas = random_rotations(rng, 8, 24), rng.normal(size=(8, 10)).astype(np.float32)
    expected = skinned(arrays, rotations.astype(np.float64), betas.astype(np.float64))
    assert np.abs(np.asarray(vertices(body, rotations, betas)) - expected).max() < 1e-5


def skinned(arrays: dict[str, np.ndarray], rotations: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """Vertices (B, V, 3) of Loper et al. 2015 in float64."""
    shaped = arrays["v_template"] + np.einsum("vcs,bs->bvc", arrays["shapedirs"], betas)
    rest = np.einsum("jv,bvc->bjc", arrays["J_regressor"], shaped)
    bent = (rotations[:, 1:] - np.eye(3)).reshape(len(betas), -1)
    shaped = shaped + np.einsum("vcp,bp->bvc", arrays["posedirs"], bent)
    turned, moved = np.empty_like(rotations), np.empty_like(rest)
    for joint, parent in enumerate(SMPL_PARENTS):
        if parent < 0:
            turned[:, joint], moved[:, joint] = rotations[:, joint], rest[:, joint]
            continue
        turned[:, joint] = turned[:, parent] @ rotations[:, joint]
        offset = rest[:, joint] - rest[:, parent]
        moved[:, joint] = moved[:, parent] + np.einsum("bij,bj->bi", turned[:, parent], offset)
    shift = moved - np.einsum("bjik,bjk->bji", turned, rest)
    placed = np.einsum("vj,bjik,bvk->bvi", arrays["weights"], turned, shaped)
    return placed + np.einsum("vj,bji->bvi", arrays["weights"], shift)

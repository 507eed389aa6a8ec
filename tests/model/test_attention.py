"""Attention's implementations against each other, packing, and whom a token sees."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chatpose_jax.errors import UserError
from chatpose_jax.models.attention import attention, causal_attention
from chatpose_jax.models.chatpose import Params, bind, init_params
from chatpose_jax.models.sharding import make_mesh, on_mesh

from ..numerics import agree, rounded
from . import small

SEGMENTS = np.array([[1] * 90 + [2] * 60 + [0] * 10, [1] * 30 + [2] * 30 + [3] * 100], np.int32)


def heads(length: int, width: int = 128, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    """q (2, T, 4, K), k and v (2, 2, T, K)."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, length, 4, width), dtype)
    k, v = (jax.random.normal(key, (2, 2, length, width), dtype) for key in keys[1:])
    return q, k, v


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
def test_splash_attention_is_the_portable_one(segments: np.ndarray | None) -> None:
    """Interpreted; grouped heads, a length that blocks do not divide, and the gradients."""
    q, k, v = heads(160)
    ids = None if segments is None else jnp.asarray(segments)
    counts = np.ones((2, 160, 1)) if segments is None else (segments > 0)[..., None]

    def run(setting: str):  # type: ignore[no-untyped-def]
        attend = causal_attention(setting, 160, 128, q.dtype, ids)

        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = attend(q, k, v) * counts
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)

    jax.tree.map(agree, rounded(lambda qkv: run("xla")(*qkv), (q, k, v)), run("splash")(q, k, v))


def test_splash_attention_over_a_mesh() -> None:
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    q, k, v = heads(128)
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])

    @jax.jit
    def split(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with on_mesh(mesh):
            return causal_attention("splash", 128, 128, q.dtype, None)(q, k, v)

    whole = causal_attention("xla", 128, 128, q.dtype, None)
    agree(rounded(lambda qkv: whole(*qkv), (q, k, v)), split(q, k, v))


def test_cudnn_lowers_for_a_gpu_and_is_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        causal_attention("cudnn", 128, 128, jnp.bfloat16, None)
    from jax._src.cudnn import fused_attention_stablehlo

    from chatpose_jax.models import attention

    # Lowering asks the library for its version; there is none here.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    assert attention._choose("auto", 128, jnp.dtype("bfloat16")) == "cudnn"
    assert attention._choose("auto", 128, jnp.dtype("float32")) == "xla"
    for segments in (None, jnp.asarray(SEGMENTS)):
        attend = causal_attention("auto", 160, 128, jnp.bfloat16, segments)
        text = jax.jit(attend).trace(*heads(160, dtype="bfloat16")).lower(lowering_platforms=("cuda",)).as_text()
        assert "fmha" in text


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("length", [257, 600])
def test_halves_are_the_whole_square(length: int, packed: bool) -> None:
    q, k, v = heads(length, 16)
    ids = np.minimum(np.arange(length)[None] // 100, 4) + np.array([[1], [2]]) if packed else np.ones((2, length), int)
    ids[:, length - 20 :] *= not packed  # the end is padding
    mask = np.tri(length, dtype=bool) & (ids[:, :, None] == ids[:, None, :])
    counts = jnp.asarray(ids > 0)[..., None]
    attend = causal_attention("xla", length, 16, q.dtype, jnp.asarray(ids, jnp.int32) if packed else None)

    def run(attend):  # type: ignore[no-untyped-def]
        def total(qkv):  # type: ignore[no-untyped-def]
            y = attend(*qkv) * counts
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(total, has_aux=True)

    whole = run(lambda q, k, v: attention(q, k, v, jnp.asarray(mask)))
    jax.tree.map(agree, rounded(whole, (q, k, v)), run(attend)((q, k, v)))


def test_halves_gather_nothing_twice() -> None:
    """Two key/value heads over four devices are gathered: once, as for the whole square."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    q, k, v = heads(300, 16)
    mesh = make_mesh(1, 1, 4, devices=jax.devices()[:4])

    def split(attend):  # type: ignore[no-untyped-def]
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            with on_mesh(mesh):
                return jnp.sum(jnp.sin(attend(q, k, v)))

        by_head, by_width = (
            NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, None, "tensor"), (None, None, None, "tensor"))
        )
        return jax.jit(jax.value_and_grad(total, (0, 1, 2)), in_shardings=[by_head, by_width, by_width])

    with on_mesh(mesh):
        attend = causal_attention("xla", 300, 16, q.dtype, None)
    ours, plain = split(attend), split(partial(attention, mask=jnp.tri(300, dtype=bool)[None]))
    agree(rounded(lambda qkv: plain(*qkv)[0], (q, k, v)), ours(q, k, v)[0])
    counts = [step.lower(q, k, v).compile().as_text().count(" all-gather(") for step in (ours, plain)]
    assert counts[0] == counts[1] > 0


def test_rotary_angles_are_computed_once() -> None:
    """XLA's CPU backend once computed them anew for every head of every unrolled layer."""
    if jax.default_backend() != "cpu":
        pytest.skip("of XLA's CPU backend")
    config = small.config(scan=False)
    ids = jnp.zeros((2, 8), jnp.int32)
    program = (
        jax.jit(lambda params: bind(config, params)(ids).hidden).lower(init_params(config, jax.random.key(0))).compile()
    )
    assert program.as_text().count(" cosine(") == 1


def test_packed_conversations_are_those_on_their_own() -> None:
    """Hidden states of two conversations with images in one row, padding behind, against rows of their own."""
    config = small.config(2)
    params = init_params(config, jax.random.key(0))
    first, second = small.row(config, 3, 0, 7), small.row(config, 0, 12, seed=1)
    images = small.pixels(config, 2)
    ids = jnp.asarray([[*first, *second, 0, 0, 0]])
    segments = jnp.asarray([[1] * len(first) + [2] * len(second) + [0] * 3], jnp.int32)

    @jax.jit
    def run(params: Params, ids: jax.Array, pixels: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        return bind(config, params)(ids, pixel_values=pixels, segment_ids=segments).hidden[0]

    packed = rounded(jax.jit(lambda params: run(params, ids, images[None], segments)), params)
    for start, row, image in ((0, first, images[:1]), (len(first), second, images[1:])):
        alone = run(params, jnp.asarray([row]), image[None])
        agree(packed[start : start + len(row)], alone)

"""Low-rank adapters against peft, and what dropout does to them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from chatpose_jax.models.chatpose import bind, init_params
from chatpose_jax.models.config import LoRAConfig, preset
from chatpose_jax.models.layers import Linear

from ..numerics import agree, rounded
from . import small

QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("targets", [QV, ALL], ids=["q,v", "all"])
def test_logits_and_gradients_match_peft(targets: tuple[Any, ...]) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from . import peers

    lora = LoRAConfig(rank=4, alpha=10.0, dropout=0.0, targets=targets)
    config = small.config(2, lora=lora, scan=False)
    settings = peft.LoraConfig(
        r=4, lora_alpha=10, lora_dropout=0.0, target_modules=rf".*language_model.*\.({'|'.join(targets)})"
    )
    model = peft.get_peft_model(peers.llava(config), settings).eval()
    generator = torch.Generator().manual_seed(3)
    adapters = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(targets) * config.text.num_layers
    with torch.no_grad():
        for weight in adapters.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
    ids, mask = small.pad([small.row(config, 9), small.row(config, 6, seed=1)])
    cotangent = np.random.default_rng(0).standard_normal((*ids.shape, config.text.vocab_size), dtype=np.float32)
    cotangent *= mask[..., None]
    output = model(input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask)).logits
    (output * torch.from_numpy(cotangent)).mean().backward()

    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        ours = bind(config, params)
        logits = ours.logits(ours(ids, attention_mask=mask).hidden)
        return (logits * cotangent).mean(), logits

    params = peers.to_tree(model, config)
    with jax.default_matmul_precision("highest"):
        (_, logits), gradients = rounded(jax.jit(jax.value_and_grad(run, has_aux=True)), params)
    agree(logits[mask == 1], output.detach().numpy()[mask == 1])
    for name, weight in adapters.items():
        *_, layer, part, projection, factor, _, _ = name.split(".")
        part = {"self_attn": "attn"}.get(part, part)
        ours = gradients["decoder"]["layers"][int(layer)][part][projection][factor.lower()]
        expected = weight.grad.numpy().T
        assert np.abs(expected).max() > 0
        agree(ours, expected, message=name)


def test_a_fresh_adapter_changes_nothing() -> None:
    """Exactly in a layer; in a whole model as closely as two programs agree, which XLA may fuse in different ways."""
    adapted = Linear(16, 8, lora=LoRAConfig(rank=4), rngs=nnx.Rngs(0))
    base = Linear(16, 8, rngs=nnx.Rngs(0))
    base.kernel[...] = adapted.kernel[...]
    x = jax.random.normal(jax.random.key(2), (3, 16))
    np.testing.assert_array_equal(adapted(x), base(x))

    config = small.config(lora=LoRAConfig(rank=4, targets=ALL))
    params = init_params(config, jax.random.key(0))
    flat = flatten_dict(params)
    factors = {path: leaf for path, leaf in flat.items() if path[-1] == "lora_b"}
    assert factors
    assert not any(leaf.any() for leaf in factors.values())
    stripped = unflatten_dict({path: leaf for path, leaf in flat.items() if path[-1] not in ("lora_a", "lora_b")})
    ids = jnp.asarray([small.row(config, 8)])
    agree(
        rounded(jax.jit(lambda params: bind(config.replace(lora=None), params)(ids).hidden), stripped),
        jax.jit(lambda params: bind(config, params)(ids).hidden)(params),
    )


def test_dropout_needs_a_key_and_is_unbiased() -> None:
    lora = LoRAConfig(rank=4, alpha=4.0, dropout=0.25)
    linear = Linear(16, 8, lora=lora, rngs=nnx.Rngs(0))
    linear.lora_b[...] = jax.random.normal(jax.random.key(1), (4, 8))
    x = jax.random.normal(jax.random.key(2), (3, 16))
    plain = linear(x)
    factors = (linear.kernel[...], linear.lora_a[...], linear.lora_b[...])
    agree(rounded(lambda factors: x @ factors[0] + x @ factors[1] @ factors[2], factors), plain)
    draws = jax.vmap(lambda key: linear(x, key))(jax.random.split(jax.random.key(3), 4000))
    spread = np.asarray(draws).std(axis=0)
    assert (spread > 0.05).all()
    assert (np.abs(np.asarray(draws).mean(axis=0) - plain) < 5 * spread / np.sqrt(4000)).all()
    no_dropout = Linear(16, 8, lora=dataclasses.replace(lora, dropout=0.0), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(no_dropout(x, jax.random.key(3)), no_dropout(x))


def test_dropout_differs_between_layers_and_adapters() -> None:
    """One key for the whole model must not drop the same entries everywhere."""
    config = small.config(lora=LoRAConfig(rank=4, dropout=0.5, targets=QV))
    params = init_params(config, jax.random.key(0))
    for name in QV:
        adapter = params["decoder"]["layers"]["attn"][name]
        adapter["lora_b"] = jnp.ones_like(adapter["lora_b"])
    ids = jnp.asarray([small.row(config, 8)] * 2)

    @jax.jit
    def run(key: jax.Array | None) -> jax.Array:
        return bind(config, params)(ids, dropout_key=key).hidden

    first = run(jax.random.key(0))
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    assert np.abs(first - run(jax.random.key(1))).max() > 1e-3
    assert np.abs(first[0] - first[1]).max() > 1e-3
    assert np.abs(first - run(None)).max() > 1e-3


def test_adapters_alone_train_through_rematerialised_bfloat16_layers() -> None:
    """The first layer's input is frozen there, which once confused the product's own gradient."""
    config = preset("tiny").replace(scan_layers=False, dtype="bfloat16", param_dtype="bfloat16")
    flat = flatten_dict(init_params(config, jax.random.key(0)))
    adapters = {path: leaf for path, leaf in flat.items() if path[-1] in ("lora_a", "lora_b")}

    def gradient(remat: str) -> Any:
        def loss(adapters: Any) -> jax.Array:
            hidden = bind(config, unflatten_dict({**flat, **adapters}))(
                np.arange(3, 11, dtype=np.int32)[None], remat=remat
            ).hidden
            return jnp.sum(hidden[..., :7].astype(jnp.float32))  # all of it squared would be the norm, which is fixed

        return jax.jit(jax.grad(loss))

    again, kept = gradient("full")(adapters), gradient("none")(adapters)
    for path in (path for path in adapters if path[-2:] == ("v_proj", "lora_b")):
        size = float(jnp.abs(kept[path]).max())
        assert size > 0
        # Layers round to bfloat16: eight of its roundings, two of which were seen.
        np.testing.assert_allclose(again[path], kept[path], rtol=0, atol=8 * 2**-8 * size, err_msg=str(path))

"""Presets: parameter counts without allocation, a real tiny model, a fake batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params, attend_evenly, bind, fake_batch, init_params
from chatpose_jax.models.config import PRESETS, ModelConfig, TextConfig, preset
from tests.heads import matrices


def count(tree: Any, part: str = "") -> int:
    return sum(math.prod(x.shape) for path, x in jax.tree.leaves_with_path(tree) if part in jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("name", "llama", "lora"),
    [("chatpose_13b", 13_015_864_320, 104_857_600), ("chatpose_7b", 6_738_415_616, 67_108_864)],
)
def test_parameter_counts_of_the_presets(name: str, llama: int, lora: int) -> None:
    params = abstract_params(preset(name))
    decoder = params["decoder"]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    assert count(decoder, "lora_") == lora
    assert count(decoder) - count(decoder, "lora_") - count(decoder, "added") == llama
    width = preset(name).text.hidden_size
    assert count(params["pose_head"]) == width * width + width + width * 144 + 144
    assert params["vision"]["layers"]["attn"]["q_proj"]["kernel"].shape == (23, 1024, 1024)
    trained = {x.dtype for path, x in jax.tree.leaves_with_path(params) if "lora" in jax.tree_util.keystr(path)}
    assert trained == {jnp.dtype("float32")}


def test_scanned_and_unrolled_hold_the_same_parameters() -> None:
    scanned = preset("tiny")
    assert count(abstract_params(scanned)) == count(abstract_params(scanned.replace(scan_layers=False)))


def test_fake_batch_runs_through_tiny() -> None:
    config = preset("tiny")
    params, batch = init_params(config, jax.random.key(0)), fake_batch(config, images=2)

    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        model = bind(config, params)
        hidden = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch["pixel_values"]
        ).hidden
        return model.logits(hidden[:, -1]), matrices(
            model, jnp.take_along_axis(hidden, batch["pose_index"][..., None], axis=1)
        )

    logits, poses = jax.jit(run)(params)
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(config))
    assert logits.shape == (2, config.text.vocab_size) and poses.shape == batch["poses"].rotations.shape
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(poses @ poses.swapaxes(-1, -2), batch["poses"].rotations, atol=1e-5)
    np.testing.assert_array_equal(batch["input_ids"][np.arange(2), batch["pose_index"][:, 0] + 1], config.pose_token_id)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_its_fake_batch(name: str) -> None:
    """Traced with abstract parameters: 13B too, without allocating it."""
    config = preset(name)
    batch = fake_batch(config)

    def run(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        model = bind(config, params)
        hidden = model(batch["input_ids"], pixel_values=batch["pixel_values"]).hidden
        return model.logits(hidden), matrices(
            model, jnp.take_along_axis(hidden, batch["pose_index"][..., None], axis=1)
        )

    logits, poses = jax.eval_shape(run, abstract_params(config), batch)
    assert logits.shape == (*batch["labels"].shape, config.text.vocab_size)
    assert poses.shape == batch["poses"].rotations.shape
    made = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_params(config)
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    assert ModelConfig.from_json(preset(name).to_json()) == preset(name)


def test_bad_configurations_are_named() -> None:
    with pytest.raises(UserError, match="no model preset 'huge'"):
        preset("huge")
    with pytest.raises(UserError, match="unknown setting 'hidden'"):
        ModelConfig.from_json({"text": {"hidden": 3}})
    with pytest.raises(UserError, match="must divide"):
        ModelConfig(text=TextConfig(num_heads=6, num_kv_heads=4))


def test_even_attention_reads_a_bag_of_words() -> None:
    tiny = preset("tiny")
    config = tiny.replace(text=dataclasses.replace(tiny.text, num_layers=1))
    params = init_params(config, jax.random.key(0))
    ids = np.random.default_rng(0).integers(3, 1000, (1, 12), np.int32)
    shuffled = np.concatenate([ids[:, 10::-1], ids[:, 11:]], axis=1)

    def change(params: Any) -> float:
        a, b = (bind(config, params)(x).hidden[:, -1] for x in (ids, shuffled))
        return float(jnp.abs(a - b).max())

    assert change(attend_evenly(params)) < 0.1 * change(params)

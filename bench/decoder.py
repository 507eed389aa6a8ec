"""This project's model as the benchmarks use it: sizes, configuration, random weights and ids. Imports no torch."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chatpose_jax.models.chatpose import Params, abstract_params
from chatpose_jax.models.config import HeadConfig, LoRAConfig, ModelConfig, TextConfig, VisionConfig
from chatpose_jax.models.quantize import QUANTIZATIONS
from chatpose_jax.train.chips import CHIPS, Chip, chip_of

SIZES = {
    "13b": TextConfig(vocab_size=32000),
    "full": TextConfig(
        vocab_size=32000,
        base_vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_layers=20,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        max_position_embeddings=2048,
    ),
    "small": TextConfig(
        vocab_size=256,
        base_vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_position_embeddings=1024,
    ),
}
"""``13b`` is the paper's decoder; ``full`` has 322 M parameters; ``small`` only shows that a script runs."""


def cores() -> int:
    """Cores that this process may use; torch is given as many threads, as XLA takes by itself."""
    return len(os.sched_getaffinity(0))


def our_config(text: TextConfig, dtype: str, *, scan: bool, lora: LoRAConfig | None = None) -> ModelConfig:
    """A model of this decoder with a least vision tower and no end of sequence: every run decodes the same count."""
    vision = VisionConfig(image_size=16, patch_size=8, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=1)
    return ModelConfig(
        vision=vision,
        text=text,
        lora=lora,
        head=HeadConfig(),
        pose_token_id=text.vocab_size - 1,
        eos_token_id=-1,
        scan_layers=scan,
        dtype=dtype,
        param_dtype=dtype,
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Natural scale: standard deviation 1/sqrt(fan_in). Made a row or a layer at a time, so that no float32 copy of a whole stack exists."""

    def part(key: jax.Array) -> jax.Array:
        if jnp.issubdtype(dtype, jnp.integer):
            most = jnp.iinfo(dtype).max
            return jax.random.randint(key, shape[1:], -most, most + 1, jnp.int32).astype(dtype)
        return (jax.random.normal(key, shape[1:]) * shape[-2] ** -0.5).astype(dtype)

    return jax.lax.map(part, jax.random.split(key, shape[0]))


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Random parameters in the layout of ``config``, made where they stay; never much more memory than they take. Adapters change nothing.

    For timings: what they compute is of no use, but finite, and numbers are as random as trained ones (a card is faster with zeros).
    """

    def one(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        if name in ("scale", "lora_b", "bias") or leaf.size == 0:
            return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
        if name in (
            "kernel_scale",
            "group_scale",
        ):  # of even integers, whose standard deviation is this part of the largest
            codes = QUANTIZATIONS[config.quantize].codes
            return jnp.full(leaf.shape, 3**0.5 / jnp.iinfo(codes).max * config.text.hidden_size**-0.5, leaf.dtype)
        numbers[0] += 1
        shape = leaf.shape if leaf.ndim > 2 else (1, *leaf.shape)
        return _random(jax.random.key(seed + numbers[0]), shape, leaf.dtype).reshape(leaf.shape)

    numbers = [0]
    return jax.tree_util.tree_map_with_path(one, abstract_params(config))


def random_ids(batch: int, length: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """(batch, length) int32 ids above the special ones."""
    return np.random.default_rng(seed).integers(3, vocabulary, (batch, length), dtype=np.int32)


def card() -> tuple[str, Chip | None]:
    """The name of the default device, and its maker's figures where they are known."""
    kind = jax.devices()[0].device_kind
    name = chip_of(kind)
    return kind, None if name is None else CHIPS[name]


def peak_memory() -> float | None:
    """Most bytes of the default device's memory that this process had in use; None where the backend does not count them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, whole or not at all: what ends a program later does not lose what it had measured."""
    if path is not None:
        beside = path.with_name(path.name + ".new")
        beside.write_text(json.dumps(result, indent=1))
        beside.replace(path)

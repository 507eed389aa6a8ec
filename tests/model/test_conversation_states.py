"""A pose head that reads the conversation: decoding with a cache shows it what one whole forward pass shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatpose_jax.generate import (
    CAPACITY_STEP,
    Generated,
    generate,
    init_cache,
    pose_key,
    pose_states,
)
from chatpose_jax.models.chatpose import Params, bind, init_params, unstack_layers
from chatpose_jax.models.config import HeadConfig, ModelConfig
from chatpose_jax.models.sharding import make_mesh, shardings

from ..numerics import Rounded, agree, rounded
from . import small
from .test_generate import END, POSE, WIDTH, prompt, script

KEY = jax.random.key(0)


def config(scan: bool = False) -> ModelConfig:
    return small.config(2, scan=scan).replace(head=HeadConfig("tests.model.toy_heads:Looking"))


def scripted(*chains: Sequence[int]) -> Params:
    """Layers stacked; see ``test_generate.script``."""
    return {**script(*chains), "pose_head": init_params(config(True), jax.random.key(5))["pose_head"]}


@partial(jax.jit, static_argnums=0)
def _forward(
    config: ModelConfig, params: Params, ids: jax.Array, mask: jax.Array, pixels: Any, index: jax.Array
) -> Any:
    model = bind(config, params)
    hidden = model(ids, attention_mask=mask, pixel_values=pixels).hidden
    return model.poses(model.states(hidden, index), KEY).rotations


def expected(params: Params, whole: Sequence[int], places: Sequence[int], images: np.ndarray | None = None) -> Rounded:
    """(P, 24, 3, 3): poses of the tokens at ``places`` of one row, by one forward pass over it."""
    ids, mask = np.zeros((1, WIDTH), np.int32), np.arange(WIDTH)[None] < len(whole)
    ids[0, : len(whole)] = whole
    pixels = None if images is None else images[None]
    index = np.asarray(places, np.int32)[None] - 1
    return rounded(lambda params: _forward(config(True), params, ids, mask, pixels, index), params)[0]


@partial(jax.jit, static_argnums=0)
def _poses(config: ModelConfig, params: Params, states: Any) -> jax.Array:
    return bind(config, params).pose_head.sample(states, KEY, 1).rotations[0]


def decoded(params: Params, answer: Generated) -> tuple[np.ndarray, np.ndarray]:
    states, mask = pose_states(config(), answer)
    return np.asarray(_poses(config(), params, states)), mask


def run(
    params: Params, prompts: Sequence[Sequence[int]], images: Any = None, *, scan: bool = False, **settings: Any
) -> Any:
    rows = [np.asarray(ids, np.int32) for ids in prompts]
    laid = params if scan else unstack_layers(params)
    return generate(config(scan), laid, rows, images, **{"max_new_tokens": 8, **settings})


def check(params: Params, answer: Generated, before: Sequence[Sequence[int]], images: Sequence[Any]) -> int:
    """Each row's poses are those of the whole forward pass over prompt and answer. Returns how many there were."""
    poses, mask = decoded(unstack_layers(params), answer)
    count = 0
    for b, tokens in enumerate(answer.tokens):
        places = len(before[b]) + np.flatnonzero(tokens == POSE)
        assert mask[b].sum() == len(places)
        if len(places):
            agree(expected(params, [*before[b], *tokens.tolist()], places, images[b]), poses[b][mask[b]])
        count += len(places)
    return count


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_three_turns_of_two_rows_with_images(scan: bool) -> None:
    """Rows of different lengths, which stop apart; an image in the first turn of one and in the second of the other."""
    params = scripted([10, 11, POSE, 12, POSE, END], [20, POSE, END])
    images = small.pixels(small.config(), 2)
    turns = [
        [prompt(2, 0, 3, last=10), prompt(5, last=20)],
        [prompt(3, last=20), prompt(0, 2, last=10)],
        [prompt(2, last=10)] * 2,
    ]
    asked = [[[images[0]], []], [[], [images[1]]], None]
    histories: list[list[int]] = [[], []]
    cache = None
    for new, shown in zip(turns, asked):
        held = [0, 0] if cache is None else cache.lengths
        given = [history[int(n) :] + ids for history, n, ids in zip(histories, held, new)]
        answer = run(params, given, shown, scan=scan, cache=cache)
        cache = answer.cache
        before = [history + ids for history, ids in zip(histories, new)]
        seen = [images[b : b + 1] if small.IMAGE in before[b] else None for b in range(2)]
        assert check(params, answer, before, seen) >= 2
        histories = [ids + tokens.tolist() for ids, tokens in zip(before, answer.tokens)]


def test_a_conversation_that_is_cut_back_or_grows_is_seen_as_it_is() -> None:
    params = scripted([10, 11, POSE, END], [20, POSE, 21, END])
    first = [prompt(6, last=10), prompt(3, last=20, seed=1)]
    answer = run(params, first)
    again = [prompt(5, last=20, seed=7), prompt(2, last=10, seed=8)]
    kept = dataclasses.replace(answer.cache, lengths=jnp.array([4, 3]))
    second = run(params, again, cache=kept, max_new_tokens=CAPACITY_STEP)
    assert second.cache.capacity > CAPACITY_STEP
    check(params, second, [row[:keep] + more for row, keep, more in zip(first, (4, 3), again)], [None, None])


def test_what_came_before_shows_in_the_pose() -> None:
    """So that the comparisons above can see states that are missing or another row's: two first words differ, the last ones do not."""
    params = scripted([10, POSE, END])
    rows = [prompt(6, last=10), prompt(6, last=10)]
    rows[1][0] = rows[0][0] + 1
    answer = run(params, rows)
    poses, _ = decoded(unstack_layers(params), answer)
    states, _ = pose_states(config(), answer)
    blind = dataclasses.replace(states, before=states.before.at[:, :, 1:].set(False))
    assert np.abs(poses - np.asarray(_poses(config(), unstack_layers(params), blind))).max() > 1e-2
    with pytest.raises(AssertionError):
        check(params, answer, rows[::-1], [None, None])


def test_over_a_mesh_it_sees_the_same() -> None:
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    params = scripted([10, 11, POSE, END], [20, POSE, END])
    mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
    rows = [prompt(6, last=10), prompt(3, last=20, seed=1)]
    laid = unstack_layers(jax.device_put(params, shardings(params, mesh)))
    answer = generate(config(), laid, [np.asarray(ids, np.int32) for ids in rows], max_new_tokens=8)
    assert answer.cache.states.sharding.spec[0] is not None, "rows are split"
    poses, mask = decoded(laid, answer)
    one, _ = decoded(unstack_layers(params), run(params, rows))
    for b, ids in enumerate(rows):
        places = len(ids) + np.flatnonzero(answer.tokens[b] == POSE)
        wanted = expected(params, [*ids, *answer.tokens[b].tolist()], places)
        agree(wanted, poses[b][mask[b]], one[b][mask[b]])


def test_heads_that_read_the_token_alone_pay_nothing() -> None:
    assert init_cache(small.config(2), 1, CAPACITY_STEP).states is None
    kept = init_cache(config().replace(dtype="bfloat16"), 1, CAPACITY_STEP)
    assert (kept.states.shape, kept.states.dtype) == ((1, CAPACITY_STEP, 64), jnp.bfloat16)


def test_what_a_head_draws_from_is_no_tokens_key() -> None:
    seeds = [jax.random.key_data(pose_key(seed)) for seed in (0, 0, 1)]
    assert (seeds[0] == seeds[1]).all() and (seeds[0] != seeds[2]).any()
    first = [jax.random.fold_in(jax.random.key(0), step) for step in range(4096)]
    assert all((jax.random.key_data(key) != seeds[0]).any() for key in first)

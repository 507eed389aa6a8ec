"""Cached decoding against the cache-free forward, wherever a pose token stands; stops, sampling, streaming, forced poses."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from chatpose_jax.errors import UserError
from chatpose_jax.generate import (
    CAPACITY_STEP,
    DecodeState,
    Sampling,
    _choose,
    begin,
    bucket,
    decode,
    generate,
    init_cache,
    read,
)
from chatpose_jax.models.chatpose import Params, bind, init_params, unstack_layers
from chatpose_jax.models.config import ModelConfig
from tests.heads import matrices

from ..numerics import Rounded, agree, rounded
from . import small

POSE, END = small.POSE, 2
WIDTH = 64
TAIL = (50, POSE, END)


@cache
def _base() -> Params:
    """Random weights in which the newest token weighs most, so that ``script`` can steer, and context still moves the states."""
    params = init_params(small.config(2), jax.random.key(0))
    params["decoder"]["embed_tokens"] = {
        name: jax.random.normal(jax.random.key(i), table.shape)
        for i, (name, table) in enumerate(params["decoder"]["embed_tokens"].items())
    }
    layers = params["decoder"]["layers"]
    for part, name in (("attn", "o_proj"), ("mlp", "down_proj")):
        layers[part][name]["kernel"] = layers[part][name]["kernel"] * 0.3
    # The fresh head ends near the identity; a livelier one makes a wrong state show in the pose.
    head = params["pose_head"]["fc2"]
    head["kernel"] = head["kernel"] * 10
    return params


def script(*chains: Sequence[int]) -> Params:
    """Weights whose greedy answer follows these chains: each id is followed by the next."""
    params = dict(_base(), decoder=dict(_base()["decoder"]))
    tables, head = params["decoder"]["embed_tokens"], params["decoder"]["lm_head"]
    rows = np.concatenate([tables["embedding"], tables["added"]])
    columns = np.concatenate([head["kernel"], head["added"]], axis=1).copy()
    for chain in chains:
        for token, following in itertools.pairwise(chain):
            columns[:, following] += rows[token]
    base = head["kernel"].shape[1]
    params["decoder"]["lm_head"] = {"kernel": jnp.asarray(columns[:, :base]), "added": jnp.asarray(columns[:, base:])}
    return params


@cache
def _forward(config: ModelConfig) -> Any:
    def run(params: Params, ids: jax.Array, mask: jax.Array, pixels: jax.Array | None) -> Any:
        model = bind(config, params)
        hidden = model(ids, attention_mask=mask, pixel_values=pixels).hidden
        return hidden, model.logits(hidden).argmax(-1), matrices(model, hidden)

    return jax.jit(run)


def without_cache(
    params: Params, whole: Sequence[int], images: np.ndarray | None = None
) -> tuple[Rounded, np.ndarray, Rounded]:
    """States (T, D), greedy next tokens (T,) and poses (T, 24, 3, 3) of one row, by the forward that has no cache."""
    ids, mask = np.zeros((1, WIDTH), np.int32), np.arange(WIDTH)[None] < len(whole)
    ids[0, : len(whole)] = whole
    run, pixels = _forward(small.config(2)), None if images is None else images[None]
    states, greedy, poses = rounded(lambda params: run(params, ids, mask, pixels), params)
    return states[0, : len(whole)], greedy[0, : len(whole)], poses[0, : len(whole)]


def check(
    params: Params, prompt: Sequence[int], tokens: np.ndarray, hidden: np.ndarray, images: np.ndarray | None = None
) -> None:
    """One row's answer is what the forward without a cache says: the greedy token after every prefix, its state, its pose.

    By induction over the answer, this is greedy decoding without a cache.
    """
    states, greedy, poses = without_cache(params, [*prompt, *tokens.tolist()], images)
    place = slice(len(prompt) - 1, len(prompt) + len(tokens) - 1)
    np.testing.assert_array_equal(tokens, greedy[place])
    agree(states[place], hidden)
    agree(poses[place], matrices(bind(small.config(2), params), jnp.asarray(hidden)))


def run(
    params: Params, prompts: Sequence[Sequence[int]], images: Any = None, *, scan: bool = False, **settings: Any
) -> Any:
    config = small.config(2, scan=scan)
    rows = [np.asarray(ids, np.int32) for ids in prompts]
    return generate(
        config, params if scan else unstack_layers(params), rows, images, **{"max_new_tokens": 8, **settings}
    )


def prompt(*parts: int, last: int, seed: int = 0) -> list[int]:
    return [*small.row(small.config(), *parts, seed=seed), last]


PLACES = {
    "first": ([10, POSE, 11, 12, END], [POSE, 11, 12, END]),
    "middle": ([10, 11, POSE, 12, END], [11, POSE, 12, END]),
    "last before the end": ([10, 11, 12, POSE, END], [11, 12, POSE, END]),
    "last that fits": ([10, 11, 12, 13, 14, 15, 16, 17, POSE], [11, 12, 13, 14, 15, 16, 17, POSE]),
    "several": ([10, POSE, 12, POSE], [POSE, 12] * 4),
}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("rows", [1, 3], ids=["single", "batched"])
@pytest.mark.parametrize("place", PLACES)
def test_a_pose_token_at_any_place_has_the_state_of_the_cache_free_forward(place: str, rows: int, scan: bool) -> None:
    """In each of three turns; of a batch, another row in each, beside rows of other lengths that enter the chain later and stop sooner."""
    chain, expected = PLACES[place]
    params = script(chain)
    starts = [token for token in chain if token not in (POSE, END)]
    histories: list[list[int]] = [[] for _ in range(rows)]
    cache, held = None, np.zeros(rows, int)
    for turn in range(3):
        new = [prompt(3 + 2 * b, last=starts[(b - turn) % len(starts) if rows > 1 else 0], seed=b) for b in range(rows)]
        # What the cache lacks of the last answer is its last token, which opens the next prompt: the pose itself, where it came last.
        given = [history[n:] + ids for history, n, ids in zip(histories, held, new)]
        answer = run(params, given, scan=scan, cache=cache)
        cache, held = answer.cache, np.asarray(answer.cache.lengths)
        assert answer.tokens[turn % rows].tolist() == expected
        for b, (tokens, hidden) in enumerate(zip(answer.tokens, answer.hidden)):
            check(params, histories[b] + new[b], tokens, hidden)
            histories[b] += new[b] + tokens.tolist()


def test_states_of_different_contexts_differ() -> None:
    """So that the comparisons above can see a state taken from the wrong place or row."""
    params = script([10, 11, POSE, 12, END])
    answer = run(params, [prompt(6, last=10), prompt(6, last=10, seed=1)])
    assert np.abs(answer.hidden[0][1] - answer.hidden[1][1]).max() > 1e-2
    with pytest.raises(AssertionError):
        check(params, prompt(6, last=10, seed=1), answer.tokens[0], answer.hidden[0])


def test_rows_of_different_lengths_stop_apart() -> None:
    params = script([10, 11, 12, POSE, 13, END])
    rows = [prompt(6, last=10), prompt(13, last=12, seed=1), prompt(2, last=11, seed=2), prompt(4, last=13, seed=3)]
    answer = run(params, rows)
    assert [tokens.tolist() for tokens in answer.tokens] == [
        [11, 12, POSE, 13, END], [POSE, 13, END], [12, POSE, 13, END], [END],
    ]  # fmt: skip
    for ids, tokens, hidden in zip(rows, answer.tokens, answer.hidden):
        check(params, ids, tokens, hidden)
    np.testing.assert_array_equal(answer.cache.lengths, [len(r) + len(t) - 1 for r, t in zip(rows, answer.tokens)])


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_later_turns_reuse_the_cache(scan: bool) -> None:
    """Three turns of two rows of different lengths, an image in the first turn of one and in the second of the other."""
    params = script([10, 11, POSE, END], [20, POSE, 21, END])
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
        # What the cache lacks of the last answer is its end of sequence: it opens the next prompt.
        given = [
            history[int(held) :] + ids
            for history, held, ids in zip(histories, [0, 0] if cache is None else cache.lengths, new)
        ]
        answer = run(params, given, shown, scan=scan, cache=cache)
        cache = answer.cache
        for b in range(2):
            before = histories[b] + new[b]
            has_image = small.IMAGE in before
            check(params, before, answer.tokens[b], answer.hidden[b], images[b : b + 1] if has_image else None)
            assert POSE in answer.tokens[b]
            histories[b] = before + answer.tokens[b].tolist()


def test_a_lower_length_forgets_the_end_of_a_conversation() -> None:
    params = script([10, 11, POSE, END], [20, POSE, 21, END])
    first = [prompt(6, last=10), prompt(3, last=20, seed=1)]
    answer = run(params, first)
    kept = dataclasses.replace(answer.cache, lengths=jnp.array([4, 3]))
    again = [prompt(5, last=20, seed=7), prompt(2, last=10, seed=8)]
    second = run(params, again, cache=kept)
    for b, keep in enumerate((4, 3)):
        check(params, first[b][:keep] + again[b], second.tokens[b], second.hidden[b])


def test_a_growing_cache_keeps_what_it_holds() -> None:
    params = script([10, 11, POSE, END])
    ids = prompt(6, last=10)
    first = run(params, [ids])
    before, history = first.cache.capacity, ids + first.tokens[0].tolist()
    more = [history[int(first.cache.lengths[0]) :] + prompt(8, last=10)]
    second = run(params, more, cache=first.cache, max_new_tokens=CAPACITY_STEP)
    assert second.cache.capacity > before == CAPACITY_STEP
    check(
        params,
        history + prompt(8, last=10),
        second.tokens[0],
        second.hidden[0],
    )


def test_force_pose_adds_a_tail_only_where_the_model_offers_none() -> None:
    params = script([10, 11, END], [20, 21, POSE, 22, END], [30, 31, 30])
    rows = [prompt(4, last=10), prompt(4, last=20), prompt(4, last=30)]
    plain = run(params, rows)
    assert plain.tokens[0].tolist() == [11, END] and plain.tokens[2].tolist() == [31, 30] * 4
    forced = run(params, rows, force_tail=TAIL)
    assert forced.tokens[0].tolist() == [11, *TAIL]
    assert forced.tokens[1].tolist() == plain.tokens[1].tolist() == [21, POSE, 22, END]
    assert forced.tokens[2].tolist() == [31, 30, 31, 30, 31, *TAIL]
    # The forced pose's state is the one before its token, as for an offered one.
    states, *_ = without_cache(params, rows[0] + forced.tokens[0].tolist())
    agree(states[len(rows[0]) + 1], forced.hidden[0][2])


def test_an_offered_pose_in_the_last_place_counts() -> None:
    """The tail needs the last three places: a pose offered in the place before them makes it unnecessary."""
    params = script([10, 11, 12, 13, 14, POSE, 15, 16, 17])
    assert run(params, [prompt(4, last=10)], force_tail=TAIL).tokens[0].tolist() == [11, 12, 13, 14, POSE, 15, 16, 17]


def test_streamed_pieces_join_to_the_answer() -> None:
    params = script([10, 11, 12, POSE, 13, END], [20, END])
    rows = [prompt(4, last=10), prompt(6, last=20)]
    whole = run(params, rows)
    for every in (1, 3):
        pieces: list[np.ndarray] = []
        counts: list[np.ndarray] = []

        def keep(tokens: np.ndarray, count: np.ndarray, pieces: Any = pieces, counts: Any = counts) -> None:
            pieces.append(tokens)
            counts.append(count)

        streamed = run(params, rows, on_tokens=keep, stream_every=every)
        joined = np.concatenate(pieces, axis=1)
        for b, tokens in enumerate(whole.tokens):
            np.testing.assert_array_equal(streamed.tokens[b], tokens)
            np.testing.assert_array_equal(joined[b, : counts[-1][b]], tokens)
            states, *_ = without_cache(params, rows[b] + tokens.tolist())
            agree(states[len(rows[b]) - 1 : -1], whole.hidden[b], streamed.hidden[b])
        assert len(pieces) == {1: 5, 3: 3}[every]


def test_sampling_is_reproducible_and_cools_to_greedy() -> None:
    params, rows = _base(), [prompt(6, last=10), prompt(4, last=11, seed=1)]

    def tokens(**settings: Any) -> list[list[int]]:
        return [t.tolist() for t in run(params, rows, sampling=Sampling(**settings)).tokens]

    assert tokens(temperature=3.0, seed=1) == tokens(temperature=3.0, seed=1)
    assert tokens(temperature=3.0, seed=1) != tokens(temperature=3.0, seed=2)
    assert tokens(temperature=1e-4, seed=1) == tokens()
    assert tokens(temperature=3.0, top_p=1e-6, seed=1) == tokens()


def test_top_p_draws_from_the_nucleus_in_proportion() -> None:
    probabilities = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))[None]

    def frequencies(temperature: float, top_p: float) -> np.ndarray:
        rows, all_of = jnp.repeat(logits, 20000, 0), partial(jnp.full, 20000)
        keys = jax.random.split(jax.random.key(0), 20000)
        draws = jax.jit(_choose, static_argnums=4)(rows, keys, all_of(temperature), all_of(top_p), False)
        return np.bincount(draws, minlength=5) / 20000

    def expect(found: np.ndarray, weights: Any) -> None:
        expected = np.asarray(weights) / np.sum(weights)
        assert ((found > 0) == (expected > 0)).all()
        assert (np.abs(found - expected) < 5 * np.sqrt(0.25 / 20000)).all()

    expect(frequencies(1.0, 1.0), probabilities)
    expect(frequencies(1.0, 0.8), [0, 0.4, 0.15, 0.3, 0])  # 0.4 + 0.3 < 0.8 <= 0.4 + 0.3 + 0.15
    expect(frequencies(1.0, 0.6), [0, 0.4, 0, 0.3, 0])
    expect(frequencies(1.0, 0.3), [0, 1, 0, 0, 0])
    expect(frequencies(0.5, 1.0), probabilities**2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 510}, "has 7 tokens .* 510, but the context is 512"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 2, "force_tail": TAIL}, "at least 3"),
    ],
)
def test_impossible_lengths_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(_base(), [prompt(6, last=10)], **settings)


def test_a_conversation_longer_than_the_context_is_refused_in_a_later_turn() -> None:
    full = dataclasses.replace(init_cache(small.config(2, scan=False), 1, 512), lengths=jnp.array([500]))
    with pytest.raises(UserError, match="has 507 tokens"):
        run(_base(), [prompt(6, last=10)], cache=full)


def test_bad_sampling_is_refused() -> None:
    with pytest.raises(UserError, match="temperature"):
        Sampling(temperature=-1)
    with pytest.raises(UserError, match="top_p"):
        Sampling(top_p=0)


def test_prompts_of_one_bucket_compile_once() -> None:
    params = unstack_layers(_base())
    config = small.config(2, scan=False)
    assert bucket(19) == bucket(30) == 32
    generate(config, params, [np.full(20, 5, np.int32)], max_new_tokens=8)
    size = read._cache_size()
    generate(config, params, [np.full(31, 5, np.int32)], max_new_tokens=8)
    assert read._cache_size() == size


def test_decoding_copies_values_once() -> None:
    """Beside the state stand two copies of the values of each layer, which XLA's CPU backend makes of a single row, and little else."""
    if jax.default_backend() != "cpu":
        pytest.skip("of XLA's CPU backend")
    config = small.config(scan=False)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def temporaries(capacity: int) -> int:
        def start() -> DecodeState:
            rows = begin([0], [Sampling()], [8], [False])
            return DecodeState(init_cache(config, 1, capacity), rows)

        program = decode.lower(
            config, params, jax.eval_shape(start), jnp.int32(8), jnp.array(TAIL), greedy=True
        ).compile()
        return program.memory_analysis().temp_size_in_bytes

    text, more = config.text, 4096
    layer = 4 * text.num_kv_heads * text.head_dim * more  # bytes of so many values of one layer
    assert temporaries(512 + more) - temporaries(512) < (2 * text.num_layers + 0.5) * layer


@pytest.mark.parametrize("place", ["decoder/lm_head/kernel", "decoder/norm/scale", "decoder/embed_tokens/embedding"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(place: str, value: float) -> None:
    """At the first token or at a later one, before it is handed out; and the row that has them ends."""
    params = script([10, 11, 12, 13, 14, END])
    flat = flatten_dict(params, sep="/")
    # The row of a token: of the embedding, one that is not yet in the prompt.
    where = {"decoder/lm_head/kernel": (0, 30), "decoder/norm/scale": (0,), "decoder/embed_tokens/embedding": (12, 0)}[
        place
    ]
    flat[place] = jnp.asarray(flat[place]).at[where].set(value)
    broken = unflatten_dict(flat, sep="/")
    with pytest.raises(
        UserError, match=r"logits for a token of the answer are not finite\. Either its weights contain NaN"
    ):
        run(broken, [prompt(4, last=10)])
    got: list[int] = []
    with pytest.raises(UserError, match="are not finite"):
        run(broken, [prompt(4, last=10)], on_tokens=lambda tokens, counts: got.extend(tokens[0].tolist()))
    assert got == ([11, 12] if place == "decoder/embed_tokens/embedding" else [])


def test_rows_that_are_done_may_be_anything() -> None:
    """The cache of a row that has ended is not read: a batch of rows of other lengths gives no false alarm."""
    answer = run(script([10, END], [20, 21, 22, 23, 24, 25, END]), [prompt(4, last=10), prompt(9, last=20)])
    assert [len(tokens) for tokens in answer.tokens] == [1, 6]

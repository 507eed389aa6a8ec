"""How likely a model finds given answers, and its states of the question. No answer is generated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.generate import bucket
from chatpose_jax.models.chatpose import Params, bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.decoder import KVCache, init_cache
from chatpose_jax.settings import one_line

_STEP = 8
"""Answers are padded to a multiple of so many tokens."""


class Likelihoods(NamedTuple):
    """log_probabilities: (A,) float64, of each answer given the question, in nats; sums over its tokens. states: (T, D) float32, the final states of
    the question's tokens.
    """

    log_probabilities: np.ndarray
    states: np.ndarray

    def __repr__(self) -> str:
        return one_line(self)


def likelihoods(
    config: ModelConfig, params: Params, question: Sequence[int], answers: Sequence[Sequence[int]], batch: int = 16
) -> Likelihoods:
    """Log-probabilities of answers to one question. The question runs once; its keys and values serve all answers.

    Args:
        config, params: as ``ChatPose`` has them.
        question: ids of the prompt, at least one.
        answers: ids of each answer, at least one; they follow the question.
        batch: answers that run together. The memory is that of so many caches, and of the logits of one answer.

    Raises:
        UserError for an empty question or answer, one that exceeds the context, and log-probabilities that are not finite.
    """
    longest = max(map(len, answers), default=0)
    if not len(question) or not all(map(len, answers)):
        raise UserError("likelihoods: a question and each answer need at least one token")
    if len(question) + longest > config.text.max_position_embeddings:
        raise UserError(
            f"the question has {len(question)} tokens and the longest answer {longest}, but the model's context holds "
            f"{config.text.max_position_embeddings}"
        )
    width = -(-max(longest, 1) // _STEP) * _STEP
    padded = bucket(len(question))
    cache, states = _read(config, params, _pad([question], padded), np.int32(len(question)), padded + width)
    found: list[np.ndarray] = []
    for start in range(0, len(answers), batch):
        part = list(answers[start : start + batch])
        full = part + part[:1] * (batch - len(part))  # one program for all batches
        lengths = np.array([len(answer) for answer in full], np.int32)
        found.append(
            np.asarray(_weigh(config, params, cache, states[len(question) - 1], _pad(full, width), lengths))[
                : len(part)
            ]
        )
    log_probabilities = np.concatenate(found).astype(np.float64) if found else np.zeros(0)
    if not np.isfinite(log_probabilities).all():
        raise UserError("the log-probability of an answer is not finite: the weights contain NaN or infinities")
    return Likelihoods(log_probabilities, np.asarray(states[: len(question)], np.float32))


def first_layers(config: ModelConfig, params: Params, count: int) -> tuple[ModelConfig, Params]:
    """A model of the first layers alone, with the whole model's final norm; params: with unrolled layers. Raises UserError for other numbers."""
    if config.scan_layers or not 1 <= count <= config.text.num_layers:
        raise UserError(
            f"first_layers: expected unrolled layers and 1 to {config.text.num_layers} of them, found {count}"
        )
    decoder = params["decoder"]
    kept = {**params, "decoder": {**decoder, "layers": {i: decoder["layers"][i] for i in range(count)}}}
    return config.replace(text=dataclasses.replace(config.text, num_layers=count)), kept


def _pad(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    return np.stack([np.pad(np.asarray(row, np.int32), (0, width - len(row))) for row in rows])


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def _read(
    config: ModelConfig, params: Params, ids: jax.Array, length: jax.Array, capacity: int
) -> tuple[KVCache, jax.Array]:
    """The cache of one question (1, T), and its final states (T, D)."""
    output = bind(config, params)(
        ids, attention_mask=jnp.arange(ids.shape[1])[None] < length, cache=init_cache(config, 1, capacity)
    )
    assert output.cache is not None
    return output.cache, output.hidden[0]


@functools.partial(jax.jit, static_argnames="config")
def _weigh(
    config: ModelConfig, params: Params, cache: KVCache, last: jax.Array, ids: jax.Array, lengths: jax.Array
) -> jax.Array:
    """(A,) log-probabilities. last: (D,) the state that predicts the first token. ids: (A, L), padded on the right."""
    model = bind(config, params)
    count, width = ids.shape
    many = dataclasses.replace(
        cache,
        keys=jax.tree.map(lambda x: _copies(x, count, config), cache.keys),
        values=jax.tree.map(lambda x: _copies(x, count, config), cache.values),
        lengths=jnp.repeat(cache.lengths, count),
        states=None if cache.states is None else jnp.broadcast_to(cache.states, (count, *cache.states.shape[1:])),
    )
    present = jnp.arange(width) < lengths[:, None]
    hidden = model(ids, attention_mask=present, cache=many).hidden
    before = jnp.concatenate(
        [jnp.broadcast_to(last, (count, 1, len(last))).astype(hidden.dtype), hidden[:, :-1]], axis=1
    )

    def one(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        states, tokens, counted = row
        chosen = jnp.take_along_axis(jax.nn.log_softmax(model.logits(states)), tokens[:, None], axis=1)[:, 0]
        return jnp.where(counted, chosen, 0).sum()

    return jax.lax.map(
        one, (before, ids, present)
    )  # the logits of one answer at a time: they are as wide as the vocabulary


def _copies(x: jax.Array, count: int, config: ModelConfig) -> jax.Array:
    """Keys or values of one row as those of ``count``; scanned layers have an axis before the batch's."""
    axis = 1 if config.scan_layers else 0
    return jnp.repeat(x, count, axis=axis)

"""Does a model still talk: perplexity of texts and answers, repetition, and whether a pose comes when one is asked for and only then."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from chatpose_jax.chat import ChatPose, Reply
from chatpose_jax.models.chatpose import Params, bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.processing.processor import IGNORE

BATCH = 8
STEP = 128
"""Rows are padded to a multiple of this, so that few shapes are compiled."""


def answer_alone(
    model: ChatPose,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    label: str | None = None,
) -> list[Reply]:
    """The greedy answer to each question, alone in its conversation. label: names the progress bar; None shows none."""
    order = sorted(
        range(len(questions)), key=lambda i: len(questions[i])
    )  # questions of a batch are padded to one length
    replies: dict[int, Reply] = {}
    for start in tqdm(
        range(0, len(order), batch_size), desc=label, unit="batch", disable=label is None, leave=False, mininterval=1
    ):
        batch = order[start : start + batch_size]
        filled = batch + batch[:1] * (batch_size - len(batch))
        asked = [[{"role": "user", "content": questions[i]}] for i in filled]
        replies.update(zip(batch, model.chat(asked, max_new_tokens=max_new_tokens)))
    model.forget()
    return [replies[i] for i in range(len(questions))]


def text_perplexity(model: ChatPose, texts: Sequence[str]) -> float:
    """exp of the mean negative log-likelihood of a token, over all tokens of all texts but the first of each. No template stands around them; a
    token that begins everything does (``Template.begin``), and then the first token of a text counts too."""
    rows = [model.processor.encode([{"role": "text", "content": text}], add_generation_prompt=False) for text in texts]
    return _perplexity(model, [row.input_ids for row in rows], [row.labels for row in rows])


def answer_perplexity(model: ChatPose, questions: Sequence[str], replies: Sequence[Reply]) -> float:
    """The same of answers to questions, as this model would read them in its conversation; their poses and ends of sequence do not count."""
    rows, labels = [], []
    config = model.config
    for question, reply in zip(questions, replies):
        words = reply.ids[(reply.ids != config.pose_token_id) & ~np.isin(reply.ids, config.end_token_ids)]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "ids": words.tolist()}]
        if not len(words):
            continue
        encoded = model.processor.encode(messages, add_generation_prompt=False)
        rows.append(encoded.input_ids)
        labels.append(np.where(encoded.input_ids == config.eos_token_id, IGNORE, encoded.labels))
    return _perplexity(model, rows, labels)


def _perplexity(model: ChatPose, rows: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> float:
    if not rows:
        return float("nan")
    context = model.processor.ids.context
    length = min(-(-max(map(len, rows)) // STEP) * STEP, context)
    total = count = 0.0
    for start in range(0, len(rows), BATCH):
        ids = np.full((BATCH, length), model.config.pad_token_id, np.int32)
        wanted = np.full((BATCH, length), IGNORE, np.int32)
        for i, (row, label) in enumerate(zip(rows[start : start + BATCH], labels[start : start + BATCH])):
            ids[i, : len(row)], wanted[i, : len(row)] = row[:length], label[:length]
        nll, found = _likelihood(model.config, model.params, ids, wanted)
        total, count = total + float(nll), count + int(found)
    return float(np.exp(total / count))


@functools.partial(jax.jit, static_argnums=0)
def _likelihood(config: ModelConfig, params: Params, ids: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of −log p of the labelled tokens, and their number. Rows one after the other: the logits of all take much memory."""

    def row(one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens, target = one
        model = bind(config, params)
        logits = jax.nn.log_softmax(model.logits(model(tokens[None]).hidden)[0, :-1])
        chosen = jnp.take_along_axis(logits, jnp.maximum(target[1:], 0)[:, None], axis=1)[:, 0]
        return -jnp.where(target[1:] >= 0, chosen, 0).sum(), (target[1:] >= 0).sum()

    nll, count = jax.lax.map(row, (ids, labels))
    return nll.sum(), count.sum()


def repetition(text: str, n: int = 4) -> float:
    """The share of a text's n-grams of words that it has had before; 0 for a text of fewer words."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def decisions(
    model: ChatPose, pose: Sequence[str], words: Sequence[str], *, label: str | None = None
) -> dict[str, Any]:
    """Whether answers to messages that want a pose have one, and answers to those that want words have none.

    Returns ``asked`` and ``given`` (messages that want a pose; those that get one), ``words`` and ``kept`` (that want words; that get words
    alone), ``missed`` and ``unasked``: the messages where it went wrong.
    """
    replies = answer_alone(model, [*pose, *words], max_new_tokens=48, label=label)
    missed = [question for question, reply in zip(pose, replies) if not reply.poses]
    unasked = [question for question, reply in zip(words, replies[len(pose) :]) if reply.poses]
    return {
        "asked": len(pose),
        "given": len(pose) - len(missed),
        "words": len(words),
        "kept": len(words) - len(unasked),
        "missed": missed,
        "unasked": unasked,
    }

"""Answers many conversations at once. Each takes a row of one cache; it joins at the next step and leaves when it is done.

What a row holds stays there until another conversation needs the row, so the next turn of a conversation reads only what is new.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from chatpose_jax.errors import UserError
from chatpose_jax.generate import (
    CAPACITY_STEP,
    STEPS,
    AnswerRows,
    DecodeState,
    Sampling,
    begin,
    decode,
    decode_shardings,
    grow,
    not_finite,
    pose_key,
    read,
    see,
)
from chatpose_jax.models.chatpose import Params, bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.decoder import KVCache, init_cache
from chatpose_jax.models.heads.base import States
from chatpose_jax.models.sharding import mesh_of
from chatpose_jax.settings import one_line
from smpl_jax.pose import Pose

CHUNKS = (16, 64, 256)
"""Tokens of a prompt that are read at a time. Between them, other answers go on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """ids: (T,) of the prompt, with expanded image placeholders; the last one is no image. keys: (T,) int64, equal where a token of another prompt
    is the same, images included. images: (S, S, 3) each, in order of appearance. every: tokens after which the answer wants to be told.
    """

    ids: np.ndarray
    keys: np.ndarray
    sampling: Sampling
    images: Sequence[np.ndarray] = ()
    max_new_tokens: int = 128
    force_pose: bool = False
    samples: int = 1
    every: int = STEPS

    __repr__ = one_line


@dataclasses.dataclass(eq=False)
class Completion:
    """An answer under way. tokens: ids so far, including the end of sequence. poses: of each pose token, its samples as a pose of batch shape
    (samples,). done: nothing comes any more. error: why it ended early.

    tell: called after each piece, under the engine's lock; it must not block.
    """

    request: Request
    tell: Callable[[Completion], Any] | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    poses: list[Pose] = dataclasses.field(default_factory=list)
    done: bool = False
    error: Exception | None = None
    cancelled: bool = False
    reused: int = 0
    """Tokens of the prompt that were in the cache already."""

    __repr__ = one_line


@dataclasses.dataclass(eq=False)
class _Row:
    """keys: of the tokens that the cache holds in this row, or will once its prompt is read. read: tokens of the prompt that it holds so far.
    features: (N, D) of each image of the prompt that is not read yet, by its number.
    """

    keys: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    used: int = 0
    answer: Completion | None = None
    read: int = 0
    reading: bool = False
    features: jax.Array | None = None


class Engine:
    """Answers to questions about one model. Methods may be called from any thread; whoever calls ``step`` does the work for all.

    slots: answers under way at once. capacity: tokens of a prompt and its answer, at most; by default as many as come, up to the context.
    """

    def __init__(
        self, config: ModelConfig, params: Params, tail: Sequence[int], *, slots: int = 1, capacity: int | None = None
    ):
        """tail: the ids that end an answer that must have a pose and has none; the last one is the end of sequence."""
        self.config, self.params, self.tail = config, params, jnp.asarray(tail, jnp.int32)
        self.mesh: Mesh | None = mesh_of(params)
        self.lock = threading.RLock()
        self.context = config.text.max_position_embeddings if capacity is None else capacity
        self._least = 0 if capacity is None else capacity
        self._waiting: collections.deque[Completion] = collections.deque()
        self._state: DecodeState | None = None
        self._clock = 0
        self._rows = [_Row() for _ in range(slots)]

    @property
    def slots(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Questions that have no row yet."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Answers that have a row."""
        return sum(row.answer is not None for row in self._rows)

    @property
    def use(self) -> float:
        """The share of the cache's slots that hold tokens."""
        capacity = 0 if self._state is None else self._state.cache.capacity * self.slots
        return sum(len(row.keys) for row in self._rows) / capacity if capacity else 0.0

    @property
    def idle(self) -> bool:
        return not self._waiting and not self.active

    def resize(self, slots: int) -> bool:
        """Another number of slots, if no answer is under way; what the rows held is forgotten. Returns whether there are so many now."""
        with self.lock:
            if slots != self.slots and self.idle:
                self._state, self._rows = None, [_Row() for _ in range(slots)]
            return slots == self.slots

    def forget(self) -> None:
        """Frees the cache, if no answer is under way."""
        with self.lock:
            if self.idle:
                self._state, self._rows = None, [_Row() for _ in self._rows]

    def check(self, request: Request) -> None:
        """Raises UserError for a request that can have no answer."""
        length, new = len(request.ids), request.max_new_tokens
        if request.force_pose and new < len(self.tail):
            raise UserError(f"max_new_tokens={new} leaves no room for a pose: at least {len(self.tail)} are needed")
        if length + new > self.context:
            raise UserError(
                f"the prompt has {length} tokens (an image counts {self.config.image_tokens}) and the answer may have {new}, "
                f"but the context is {self.context}: shorten the conversation or lower max_new_tokens"
            )
        if request.images and self.config.vision is None:
            raise UserError(f"the prompt has {len(request.images)} images, and this model has no vision tower")
        places = int((request.ids == self.config.image_token_id).sum())
        if places != self.config.image_tokens * len(request.images):
            raise UserError(
                f"the prompt has {places} image placeholders and {len(request.images)} images, which need {self.config.image_tokens} "
                "placeholders each"
            )
        if not length or request.ids[-1] == self.config.image_token_id:
            raise UserError("a prompt must end with a token of text, from which the answer goes on")

    def submit(self, request: Request, tell: Callable[[Completion], Any] | None = None) -> Completion:
        """Puts a request into the queue. Raises UserError as ``check`` does."""
        self.check(request)
        answer = Completion(request, tell)
        with self.lock:
            self._waiting.append(answer)
        return answer

    def cancel(self, answer: Completion) -> None:
        """Nobody waits for the answer any more: its row is free at the next step."""
        with self.lock:
            answer.cancelled = True
            if answer in self._waiting:
                self._waiting.remove(answer)
                answer.done = True

    def finish(self, answers: Iterable[Completion]) -> None:
        """Works until these answers are done, whoever else works too. Raises the error of the first that has one."""
        answers = list(answers)
        try:
            for answer in answers:
                while not answer.done:
                    self.work(answer)
                if answer.error is not None:
                    raise answer.error
        finally:
            for answer in answers:
                if not answer.done:
                    self.cancel(answer)

    def work(self, answer: Completion) -> None:
        """One step, unless the answer has come further meanwhile."""
        before = len(answer.tokens)
        with self.lock:
            if not answer.done and len(answer.tokens) == before:
                self.step()

    def step(self) -> None:
        """Gives rows to waiting questions, reads a piece of one prompt, and writes a piece of all answers that are being written."""
        with self.lock:
            try:
                self._leave()
                self._admit()
                self._read()
                self._write()
            except Exception as error:  # the cache was given away to a program that failed
                self._state = None
                for row in self._rows:
                    if row.answer is not None:
                        self._end(row, error)
                    row.keys = np.zeros(0, np.int64)

    def _leave(self) -> None:
        for slot, row in enumerate(self._rows):
            if row.answer is not None and row.answer.cancelled:
                if self._state is not None:
                    self._state = _stop(self._state, jnp.int32(slot))
                if row.reading:
                    row.keys = row.keys[: row.read]
                self._end(row)

    def _admit(self) -> None:
        while self._waiting and (free := [row for row in self._rows if row.answer is None]):
            answer = self._waiting.popleft()
            request = answer.request
            row, keep = self._choose(free, request.keys)
            self._reserve(len(request.ids) + request.max_new_tokens)
            assert self._state is not None
            slot = self._rows.index(row)
            self._state = _cut(self._state, jnp.int32(slot), jnp.int32(keep))
            self._clock += 1
            row.answer, row.keys, row.used, row.read, row.reading = answer, request.keys, self._clock, keep, True
            answer.reused = keep
            seen = int((request.ids[:keep] == self.config.image_token_id).sum()) // max(self.config.image_tokens, 1)
            new = [
                see(self.config, self.params, jnp.asarray(image, jnp.float32)[None, None], mesh=self.mesh)[0]
                for image in request.images[seen:]
            ]
            row.features = jnp.concatenate(new) if new else None

    def _choose(self, free: list[_Row], keys: np.ndarray) -> tuple[_Row, int]:
        """A free row, and how many of its tokens the prompt begins with. A row whose conversation goes on; else the one that rested longest."""
        shared = [_shared(row.keys, keys) for row in free]
        best = int(np.argmax(shared))
        if 2 * shared[best] < len(free[best].keys):
            best = min(range(len(free)), key=lambda i: free[i].used)
        return free[best], shared[best]

    def _reserve(self, tokens: int) -> None:
        """Makes the cache hold so many tokens in each row."""
        tokens = max(tokens, self._least) + CHUNKS[0]  # the last piece of a prompt is padded
        capacity = -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
        if self._state is None:
            row = begin(0, Sampling(), 0, False)
            rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.slots, *x.shape)), row)
            rows = dataclasses.replace(rows, done=jnp.ones(self.slots, bool))
            self._state = self._placed(DecodeState(init_cache(self.config, self.slots, capacity, self.mesh), rows))
        elif self._state.cache.capacity < capacity:
            self._state = self._placed(dataclasses.replace(self._state, cache=grow(self._state.cache, capacity)))

    def _placed(self, state: DecodeState) -> DecodeState:
        return state if self.mesh is None else jax.device_put(state, decode_shardings(state, self.mesh))

    def _read(self) -> None:
        """The next tokens of the prompt that waits longest; of a short one all."""
        reading = [row for row in self._rows if row.reading]
        if not reading:
            return
        row = min(reading, key=lambda row: row.used)
        assert row.answer is not None and self._state is not None
        slot, request = self._rows.index(row), row.answer.request
        if left := len(request.ids) - 1 - row.read:
            room = self._state.cache.capacity - row.read
            size = next((size for size in CHUNKS if size >= left), CHUNKS[-1])
            size = max(each for each in CHUNKS if each <= min(size, max(room, CHUNKS[0])))
            ids = request.ids[row.read : row.read + min(size, left)]
            features = None
            if (images := int((ids == self.config.image_token_id).sum())) and row.features is not None:
                part, row.features = row.features[:images], row.features[images:]
                features = jnp.pad(part, ((0, size - images), (0, 0)))[None]
            padded = np.pad(ids, (0, size - len(ids)), constant_values=self.config.pad_token_id).astype(np.int32)
            cache = read(
                self.config, self.params, self._state.cache, jnp.asarray(padded[None]), jnp.asarray([len(ids)], jnp.int32),
                features, jnp.int32(slot), mesh=self.mesh,
            )  # fmt: skip
            self._state = dataclasses.replace(self._state, cache=cache)
            row.read += len(ids)
        if row.read == len(request.ids) - 1:
            start = begin(int(request.ids[-1]), request.sampling, request.max_new_tokens, request.force_pose)
            self._state = _start(self._state, jnp.int32(slot), start)
            row.reading, row.features = False, None

    def _write(self) -> None:
        """The next tokens of all answers that are being written."""
        writing = [(slot, row) for slot, row in enumerate(self._rows) if row.answer is not None and not row.reading]
        if not writing:
            return
        assert self._state is not None
        answers = [row.answer for _, row in writing if row.answer is not None]
        others = bool(self._waiting) or any(row.reading for row in self._rows)
        count = 1 if others else min(answer.request.every for answer in answers)
        greedy = all(answer.request.sampling.temperature == 0 for answer in answers)
        self._state, tokens, states = decode(
            self.config, self.params, self._state, jnp.int32(count), self.tail, greedy=greedy, mesh=self.mesh
        )
        # One transfer for all, because each transfer waits for the device.
        rows = self._state.rows
        ids, steps, done, finite = jax.device_get((tokens, rows.step, rows.done, rows.finite))
        for (slot, row), answer in zip(writing, answers):
            new = ids[slot, : steps[slot] - len(answer.tokens)]
            if not finite[slot]:
                self._end(row, not_finite(self.config))
                continue
            try:
                for place in np.flatnonzero(new == self.config.pose_token_id):
                    position = len(answer.request.ids) - 1 + len(answer.tokens) + int(place)
                    answer.poses.append(self._pose(answer, slot, states[slot, int(place)], position))
            except UserError as error:
                self._state = _stop(self._state, jnp.int32(slot))
                self._end(row, error)
                continue
            answer.tokens += new.tolist()
            row.keys = np.concatenate([answer.request.keys, np.asarray(answer.tokens, np.int64)])
            if done[slot]:
                self._end(row)
            elif answer.tell is not None:
                answer.tell(answer)

    def _pose(self, answer: Completion, slot: int, state: jax.Array, position: int) -> Pose:
        request = answer.request
        key = jax.random.fold_in(pose_key(request.sampling), len(answer.poses))
        assert self._state is not None
        drawn = _draw(
            self.config, self.params, self._state.cache.states, state, jnp.int32(slot), jnp.int32(position), key,
            samples=request.samples,
        )  # fmt: skip
        drawn = jax.device_get(drawn)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(drawn)):
            raise UserError(
                "a pose of the answer is not finite: the weights of the pose head contain NaN or infinities"
            )
        return drawn

    def _end(self, row: _Row, error: Exception | None = None) -> None:
        answer, row.answer, row.reading, row.features = row.answer, None, False, None
        if answer is None:
            return
        if answer.tokens:  # the last token is not in the cache
            row.keys = row.keys[: len(answer.request.ids) + len(answer.tokens) - 1]
        answer.error, answer.done = error, True
        if answer.tell is not None:
            answer.tell(answer)


def _shared(held: np.ndarray, new: np.ndarray) -> int:
    """Tokens that both begin with, less than all of ``new``, since the last one begins the answer; images are shared whole or not at all."""
    size = min(len(new) - 1, len(held))
    differs = np.flatnonzero(new[:size] != held[:size])
    shared = int(differs[0]) if len(differs) else size
    while 0 < shared < len(new) and new[shared] < 0 and new[shared - 1] == new[shared]:
        shared -= 1
    return shared


@functools.partial(jax.jit, donate_argnames="state")
def _cut(state: DecodeState, slot: jax.Array, keep: jax.Array) -> DecodeState:
    """The row keeps its first ``keep`` tokens."""
    cache: KVCache = dataclasses.replace(state.cache, lengths=state.cache.lengths.at[slot].set(keep))
    return dataclasses.replace(state, cache=cache)


@functools.partial(jax.jit, donate_argnames="state")
def _start(state: DecodeState, slot: jax.Array, row: AnswerRows) -> DecodeState:
    return dataclasses.replace(state, rows=jax.tree.map(lambda all, one: all.at[slot].set(one), state.rows, row))


@functools.partial(jax.jit, donate_argnames="state")
def _stop(state: DecodeState, slot: jax.Array) -> DecodeState:
    rows = dataclasses.replace(state.rows, done=state.rows.done.at[slot].set(True))
    return dataclasses.replace(state, rows=rows)


@functools.partial(jax.jit, static_argnames=("config", "samples"))
def _draw(
    config: ModelConfig,
    params: Params,
    conversations: jax.Array | None,
    state: jax.Array,
    slot: jax.Array,
    position: jax.Array,
    key: jax.Array,
    *,
    samples: int,
) -> Pose:
    """Samples of one pose, of batch shape (samples,). state: (D,), which predicted its token at ``position``; conversations: (B, S, D) or None."""
    token = state[None, None]
    if conversations is None:
        states = States(token)
    else:
        own = jax.lax.dynamic_index_in_dim(conversations, slot, keepdims=True)
        states = States(token, own, (jnp.arange(own.shape[1]) <= position)[None, None])
    return jax.tree.map(lambda x: x[:, 0, 0], bind(config, params).pose_head.sample(states, key, samples))

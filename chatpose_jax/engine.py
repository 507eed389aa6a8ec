"""Answers many conversations at once. Each takes a row of one cache; it joins at the next step and leaves when it is done.

What a row holds stays there until another conversation needs the row, so the next turn of a conversation reads only what is new. A prompt that
begins as another row does (the same system text, a second answer to one question) copies that row.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
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
    """keys: of the prompt, and of the answer so far. read: tokens of the prompt that the cache holds, while it is read.
    features: (M, D) of image tokens that come next in the prompt, as far as their images were seen; on the host, because a program for each number
    of them would be compiled.
    """

    keys: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    used: int = 0
    answer: Completion | None = None
    read: int = 0
    reading: bool = False
    features: np.ndarray | None = None

    @property
    def held(self) -> np.ndarray:
        """The keys of the tokens that the cache holds. The newest token of an answer, or of a prompt, is not in it yet."""
        if self.answer is None:
            return self.keys
        return self.keys[: self.read] if self.reading else self.keys[:-1]


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
        self._door = threading.Lock()  # of the waiting questions alone: who asks or leaves waits for no step
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

    def warm(self, samples: int = 1) -> Pose:
        """Compiles and runs every program that an answer may need, and makes the cache. Needs an idle engine, and a capacity.

        samples: of a pose, at most. Returns a pose of batch shape (samples,) that it drew.
        """
        config, count = self.config, itertools.count(1 << 40)
        token, tail = config.eos_token_id, len(self.tail)

        def ask(ids: Sequence[int], **settings: Any) -> Completion:
            keys = np.fromiter(itertools.islice(count, len(ids)), np.int64)  # of no other prompt
            images = [np.zeros((config.image_size,) * 2 + (3,), np.float32)] * (config.image_token_id in ids)
            settings = {"sampling": Sampling(), "max_new_tokens": tail, **settings}
            answer = self.submit(Request(np.asarray(ids, np.int32), keys, images=images, **settings))
            self.finish([answer])
            return answer

        with self.lock:
            for size in CHUNKS:
                if size + 1 + tail <= self.context:
                    ask([token] * (size + 1))
            if config.vision is not None and config.image_tokens + 1 + tail <= self.context:
                ask([config.image_token_id] * config.image_tokens + [token])
            for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.5)):
                for drawn in sorted({_draws(each) for each in range(1, samples + 1)}):
                    answer = ask([token], sampling=sampling, force_pose=True, samples=drawn)
            assert self._state is not None
            self._state = _copy(self._state, np.int32(0), np.int32(0), np.int32(0))
            self._state = _stop(self._state, np.int32(0))
            self._rows = [_Row() for _ in self._rows]
            return answer.poses[0]

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
        with self._door:
            self._waiting.append(answer)
        return answer

    def cancel(self, answer: Completion) -> None:
        """Nobody waits for the answer any more: its row is free at the next step."""
        with self._door:
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
                    self._end(row, error)
                    row.keys = np.zeros(0, np.int64)

    def _leave(self) -> None:
        for slot, row in enumerate(self._rows):
            if row.answer is not None and row.answer.cancelled:
                if self._state is not None:
                    self._state = _stop(self._state, np.int32(slot))
                self._end(row)

    def _admit(self) -> None:
        while free := [row for row in self._rows if row.answer is None]:
            with self._door:
                if not self._waiting:
                    return
                answer = self._waiting.popleft()
            request = answer.request
            row, keep = self._choose(free, request.keys)
            self._clock += 1
            row.answer, row.keys, row.used, row.read, row.reading = answer, request.keys, self._clock, keep, True
            answer.reused = keep
            self._reserve(len(request.ids) + request.max_new_tokens)
            assert self._state is not None
            self._state = _cut(self._state, np.int32(self._rows.index(row)), np.int32(keep))

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
        self._borrow(row, slot)
        if left := len(request.ids) - 1 - row.read:
            room = self._state.cache.capacity - row.read
            size = next((size for size in CHUNKS if size >= left), CHUNKS[-1])
            size = max(each for each in CHUNKS if each <= min(size, max(room, CHUNKS[0])))
            ids = request.ids[row.read : row.read + min(size, left)]
            features = None
            if self.config.vision is not None:  # always, so that reading with images and without is one program
                images = int((ids == self.config.image_token_id).sum())
                if self._see(row, images):
                    return
                features = self._features(row, images, size)
            padded = np.pad(ids, (0, size - len(ids)), constant_values=self.config.pad_token_id).astype(np.int32)
            cache = read(
                self.config, self.params, self._state.cache, padded[None], np.asarray([len(ids)], np.int32),
                features, np.int32(slot), mesh=self.mesh,
            )  # fmt: skip
            self._state = dataclasses.replace(self._state, cache=cache)
            row.read += len(ids)
        if row.read == len(request.ids) - 1:
            start = begin(int(request.ids[-1]), request.sampling, request.max_new_tokens, request.force_pose)
            self._state = _start(self._state, np.int32(slot), start)
            row.reading, row.features = False, None

    def _borrow(self, row: _Row, slot: int) -> None:
        """Copies what another row holds of this row's prompt, if that saves a piece of reading."""
        shared = [_shared(other.held, row.keys) if other is not row else 0 for other in self._rows]
        best = int(np.argmax(shared))
        if shared[best] - row.read < CHUNKS[0]:
            return
        assert row.answer is not None and self._state is not None
        self._state = _copy(self._state, np.int32(best), np.int32(slot), np.int32(shared[best]))
        row.answer.reused += shared[best] - row.read
        row.read, row.features = shared[best], None

    def _see(self, row: _Row, images: int) -> bool:
        """Sees the next image of a prompt, if the next ``images`` image tokens need it. One at a time: meanwhile others go on."""
        ready = 0 if row.features is None else len(row.features)
        if images <= ready:
            return False
        assert row.answer is not None
        request = row.answer.request
        past = int((request.ids[: row.read] == self.config.image_token_id).sum())
        image = np.asarray(request.images[(past + ready) // self.config.image_tokens], np.float32)
        new = np.asarray(see(self.config, self.params, image[None, None], mesh=self.mesh)[0])
        row.features = new if row.features is None else np.concatenate([row.features, new])
        return True

    def _features(self, row: _Row, images: int, size: int) -> np.ndarray:
        """(1, size, D), of the next ``images`` image tokens and zeros."""
        shape = (size, self.config.text.hidden_size)
        if row.features is None:
            return np.zeros((1, *shape), jnp.dtype(self.config.dtype))
        padded = np.zeros(shape, row.features.dtype)
        padded[:images], row.features = row.features[:images], row.features[images:]
        return padded[None]

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
            self.config, self.params, self._state, np.int32(count), self.tail, greedy=greedy, mesh=self.mesh
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
                    answer.poses.append(self._pose(answer, slot, states, int(place), position))
            except UserError as error:
                self._state = _stop(self._state, np.int32(slot))
                self._end(row, error)
                continue
            answer.tokens += new.tolist()
            row.keys = np.concatenate([answer.request.keys, np.asarray(answer.tokens, np.int64)])
            if done[slot]:
                self._end(row)
            elif answer.tell is not None:
                answer.tell(answer)

    def _pose(self, answer: Completion, slot: int, states: jax.Array, place: int, position: int) -> Pose:
        request = answer.request
        key = jax.random.fold_in(pose_key(request.sampling), len(answer.poses))
        assert self._state is not None
        drawn = _draw(
            self.config, self.params, self._state.cache.states, states, np.int32(slot), np.int32(place), np.int32(position),
            key, samples=_draws(request.samples),
        )  # fmt: skip
        drawn = jax.tree.map(lambda x: np.asarray(x)[: request.samples], drawn)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(drawn)):
            raise UserError(
                "a pose of the answer is not finite: the weights of the pose head contain NaN or infinities"
            )
        return drawn

    def _end(self, row: _Row, error: Exception | None = None) -> None:
        answer = row.answer
        if answer is None:
            return
        row.keys = row.held if error is None else np.zeros(0, np.int64)
        row.answer, row.reading, row.features = None, False, None
        answer.error, answer.done = error, True
        if answer.tell is not None:
            answer.tell(answer)


def _draws(samples: int) -> int:
    """Samples that are drawn where ``samples`` are wanted: a power of two, so that few programs are compiled."""
    return 1 << (samples - 1).bit_length()


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
def _copy(state: DecodeState, source: jax.Array, target: jax.Array, keep: jax.Array) -> DecodeState:
    """The row ``target`` holds the first ``keep`` tokens of the row ``source``."""

    def put(x: jax.Array, axis: int) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(x, source, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis)

    cache = state.cache
    keys, values = jax.tree.map(lambda x: put(x, x.ndim - 4), (cache.keys, cache.values))
    states = None if cache.states is None else put(cache.states, 0)
    cache = KVCache(keys, values, cache.lengths.at[target].set(keep), states)
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
    newest: jax.Array,
    slot: jax.Array,
    place: jax.Array,
    position: jax.Array,
    key: jax.Array,
    *,
    samples: int,
) -> Pose:
    """Samples of one pose, of batch shape (samples,). newest: (B, STEPS, D); that of (slot, place) predicted its token at ``position``.
    conversations: (B, S, D) or None.
    """
    token = newest[slot, place][None, None]
    if conversations is None:
        states = States(token)
    else:
        own = jax.lax.dynamic_index_in_dim(conversations, slot, keepdims=True)
        states = States(token, own, (jnp.arange(own.shape[1]) <= position)[None, None])
    return jax.tree.map(lambda x: x[:, 0, 0], bind(config, params).pose_head.sample(states, key, samples))

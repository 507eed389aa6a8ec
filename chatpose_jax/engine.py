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
import time
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
    not_finite,
    pose_key,
    read,
    resize,
    see,
)
from chatpose_jax.models.chatpose import Params, bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.decoder import KVCache, init_cache
from chatpose_jax.models.heads.base import States
from chatpose_jax.models.sharding import mesh_of, on_mesh, platform
from chatpose_jax.settings import one_line
from smpl_jax.pose import Pose

CHUNKS = (16, 64, 256)
"""Tokens of a prompt that are read at a time. Between them, other answers go on, and a shorter prompt comes first."""
CHUNKS_OF_CPUS = CHUNKS[:2]
"""A CPU reads as many tokens a second in pieces of 64, and whoever comes waits less."""
TOGETHER = (4, 1)
"""Prompts that are read at a time, with at most ``CHUNKS[-1]`` tokens in all; while somebody reads an answer along, with as many as one may read."""
CAPACITIES = (256, 1024, 4096, 16384)
"""Tokens that a row may hold, beside the most. The whole engine has the least that suffices: each step attends to all that rows may hold."""
TURNS = 4
"""Pieces are of the prompt that will be whole first. After TURNS - 1 that were not of the one that waits longest, the next one is."""
PACE = 0.03
"""Seconds after which an answer tells again, if it does not say after how many tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """ids: (T,) of the prompt, with expanded image placeholders; the last one is no image. keys: (T,) int64, equal where a token of another prompt
    is the same, images included; those of image tokens are negative, and others are not. images: (S, S, 3) each, in order of appearance. every:
    tokens after which the answer wants to be told; 0 for about ``PACE`` seconds.
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

    tell: called after each piece, under the engine's lock; it must not block. An answer that is done has forgotten it.
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

    def say(self) -> None:
        if (tell := self.tell) is not None:
            tell(self)


@dataclasses.dataclass(eq=False)
class _Row:
    """keys: of the prompt, or of all tokens once its answer is done. read: tokens of the prompt that the cache holds, while it is read.
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
        if self.reading:
            return self.keys[: self.read]
        return np.concatenate([self.keys, np.asarray(self.answer.tokens, np.int64)])[:-1]

    @property
    def size(self) -> int:
        """How many tokens that are."""
        answer = self.answer
        if answer is None:
            return len(self.keys)
        return self.read if self.reading else len(self.keys) + len(answer.tokens) - 1

    @property
    def left(self) -> int:
        """Tokens of the prompt to be read; the answer begins with the last one, which is not."""
        return len(self.keys) - 1 - self.read


class Engine:
    """Answers to questions about one model. Methods may be called from any thread; whoever calls ``step`` does the work for all.

    slots: answers under way at once. capacity: tokens of a prompt and its answer, at most; by default the context of the model.
    """

    def __init__(
        self, config: ModelConfig, params: Params, tail: Sequence[int], *, slots: int = 1, capacity: int | None = None
    ):
        """tail: the ids that end an answer that must have a pose and has none; the last one is the end of sequence."""
        self.config, self.params, self.tail = config, params, jnp.asarray(tail, jnp.int32)
        self.mesh: Mesh | None = mesh_of(params)
        with on_mesh(self.mesh):
            self.cpu = platform() == "cpu"
        self.chunks = CHUNKS_OF_CPUS if self.cpu else CHUNKS
        self.lock = threading.RLock()
        # Of the waiting questions alone: who asks or leaves waits for no step. A stream that is garbage collected leaves in any thread, at any time.
        self._door = threading.RLock()
        self.context = config.text.max_position_embeddings if capacity is None else capacity
        most = (
            -(-(self.context + self.chunks[0]) // CAPACITY_STEP) * CAPACITY_STEP
        )  # the last piece of a prompt is padded
        self._capacities = [each for each in CAPACITIES if each <= most / 2] + [most]
        self._waiting: collections.deque[Completion] = collections.deque()
        self._state: DecodeState | None = None
        self._clock, self._least = 0, 0
        self._passed = 0
        """Pieces since the prompt that waits longest had one."""
        self._seconds = collections.defaultdict[Any, float](float)
        """Of a step, about; for each of the programs that write."""
        self._own, self._rows = slots, [_Row() for _ in range(slots)]
        self.failures = 0
        """Steps that failed since one wrote a token."""

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
        state = self._state  # another thread may lose it meanwhile
        return 0.0 if state is None else sum(row.size for row in self._rows) / (state.cache.capacity * self.slots)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self.active

    @property
    def _watched(self) -> bool:
        """Whether somebody reads along while an answer is being written."""
        return any(row.answer and not row.reading and row.answer.request.every < STEPS for row in self._rows)

    def resize(self, slots: int) -> bool:
        """Another number of slots, but no fewer than at first, if no answer is under way; what the rows held is forgotten. Returns whether there are
        so many now.
        """
        with self.lock:
            self._leave()
            slots = max(slots, self._own)
            if slots != self.slots and self.idle:
                self._state, self._rows = None, [_Row() for _ in range(slots)]
            return slots == self.slots

    def forget(self) -> None:
        """Frees the cache, if no answer is under way."""
        with self.lock:
            self._leave()
            if self.idle:
                self._state, self._rows = None, [_Row() for _ in self._rows]

    def warm(self, samples: int = 1) -> Pose:
        """Compiles and runs every program that an answer may need, also at the largest capacity. Needs an idle engine.

        samples: of a pose, at most. Returns a pose of batch shape (samples,) that it drew.
        """
        config, count = self.config, itertools.count(1 << 40)
        token, tail = config.eos_token_id, len(self.tail)

        def ask(length: int, together: int = 1, image: bool = False, **settings: Any) -> Completion:
            """Answers so many prompts of this length at once, of which no other has the beginning."""
            images = [np.zeros((config.image_size,) * 2 + (3,), np.float32)] * image
            ids = np.full(length, token, np.int32)
            ids[: config.image_tokens * image] = config.image_token_id
            settings = {"sampling": Sampling(), "max_new_tokens": tail, **settings}
            answers = []
            for _ in range(together):
                keys = np.fromiter(itertools.islice(count, length), np.int64)
                keys[: config.image_tokens * image] = -keys[0]
                answers.append(self.submit(Request(ids, keys, images=images, **settings)))
            self.finish(answers)
            return answers[0]

        with self.lock:
            for capacity in self._capacities:
                self._rows, self._least = [_Row() for _ in self._rows], capacity - self.chunks[0]
                self._resize(capacity)
                for size, together in itertools.product(self.chunks, TOGETHER):
                    if together <= self.slots and size * together <= CHUNKS[-1] and size + 1 + tail <= self.context:
                        ask(size + 1, together)
                if config.vision is not None and config.image_tokens + 1 + tail <= self.context:
                    for together in TOGETHER:
                        if together <= self.slots:
                            ask(config.image_tokens + 1, together, image=True)
                for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.5)):
                    for drawn in sorted({_draws(each) for each in range(1, samples + 1)}):
                        answer = ask(1, sampling=sampling, force_pose=True, samples=drawn)
                    ask(1, min(2, self.slots), sampling=sampling)
                assert self._state is not None
                self._state = _copy(self._state, np.int32(0), np.int32(0))
                self._state = _stop(self._state, np.int32(0))
            for capacities in itertools.permutations(self._capacities, 2):  # from each to each
                for capacity in capacities:
                    self._resize(capacity)
            self._resize(self._capacities[0])
            self._rows, self._least = [_Row() for _ in self._rows], 0
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
            answer.cancelled, answer.tell = True, None
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
                self._begin()
                self._write()
            except BaseException as error:  # the cache was given away to a program that failed, or whose result is lost
                self._state, self.failures = None, self.failures + 1
                failed = error if isinstance(error, Exception) else UserError("the answer was interrupted; ask again")
                for row in self._rows:
                    self._end(row, failed)
                    row.keys = np.zeros(0, np.int64)
                if failed is not error:
                    raise

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
            self._reserve()

    def _choose(self, free: list[_Row], keys: np.ndarray) -> tuple[_Row, int]:
        """A free row, and how many of its tokens the prompt begins with. A row whose conversation goes on; else the one that rested longest."""
        shared = [_shared(row.keys, keys) for row in free]
        best = int(np.argmax(shared))
        if 2 * shared[best] < len(free[best].keys):
            best = min(range(len(free)), key=lambda i: free[i].used)
        return free[best], shared[best]

    def _reserve(self) -> None:
        """The least capacity for the answers under way, and for what rows hold that were used lately."""
        lately = self._clock - self.slots
        needs = [
            row.size if row.answer is None else len(row.answer.request.ids) + row.answer.request.max_new_tokens
            for row in self._rows
            if row.answer is not None or row.used > lately
        ]
        most = max(*needs, 0, self._least) + self.chunks[0]
        self._resize(next(each for each in self._capacities if each >= most))

    def _resize(self, capacity: int) -> None:
        """Another capacity. Rows that hold more keep the beginning."""
        if self._state is None:
            rows = begin([0] * self.slots, [Sampling()] * self.slots, [0] * self.slots, [False] * self.slots)
            rows = dataclasses.replace(rows, done=jnp.ones(self.slots, bool))
            cache = init_cache(self.config, self.slots, capacity, self.mesh)
        elif self._state.cache.capacity != capacity:
            rows, cache = self._state.rows, resize(self._state.cache, capacity)
        else:
            return
        self._state = self._placed(DecodeState(cache, rows))
        for row in self._rows:
            if row.answer is None:
                row.keys = row.keys[: capacity - self.chunks[0]]

    def _placed(self, state: DecodeState) -> DecodeState:
        return state if self.mesh is None else jax.device_put(state, decode_shardings(state, self.mesh))

    def _read(self) -> None:
        """The next tokens of one prompt, and of others that have as many left; or the images that they need."""
        reading = [row for row in self._rows if row.reading and row.left]
        if not reading:
            return
        assert self._state is not None
        oldest = min(reading, key=lambda row: row.used)
        passed = self._passed >= TURNS - 1
        reading.sort(key=lambda row: (row.used if passed else row.left, row.used))
        most = self.chunks[-1] if self._watched else CHUNKS[-1]
        there, rows, size = [row.held for row in self._rows], list[_Row](), 0
        for row in reading:
            if rows and self._size(row) != size:
                continue
            self._borrow(row, there)
            if not row.left or (rows and self._size(row) != size):
                continue
            if any(self._saves(row, _shared(other.keys, row.keys)) for other in rows):
                continue  # it waits, and copies what the other reads
            rows.append(row)
            size = self._size(row)
            if (len(rows) + 1) * size > most:
                break
        if not rows:
            return
        rows = rows[: next(n for n in TOGETHER if n <= len(rows))]
        pieces = [row.keys[row.read :][: min(size, row.left)] for row in rows]
        seen = self._see(rows, [int((keys < 0).sum()) for keys in pieces])
        self._passed = 0 if oldest in (seen or rows) else self._passed + 1
        if seen:
            return
        ids = np.full((len(rows), size), self.config.pad_token_id, np.int32)
        for place, row, keys in zip(ids, rows, pieces):
            assert row.answer is not None
            place[: len(keys)] = row.answer.request.ids[row.read :][: len(keys)]
        counts, held = ([f(x) for x in range(len(rows))] for f in (lambda i: len(pieces[i]), lambda i: rows[i].read))
        slots = [self._rows.index(row) for row in rows]
        self._within(*(start + size for start in held))
        cache = read(
            self.config, self.params, self._state.cache, ids, np.array(counts, np.int32), self._features(rows, pieces, size),
            np.array(slots, np.int32), np.array(held, np.int32), mesh=self.mesh,
        )  # fmt: skip
        if any(row.answer is not None and row.answer.request.every < STEPS for row in self._rows):
            # Else all pieces of a long prompt would be under way before anybody who comes is heard.
            cache = dataclasses.replace(cache, lengths=jax.block_until_ready(cache.lengths))
        self._state = dataclasses.replace(self._state, cache=cache)
        for row, count in zip(rows, counts):
            row.read += count

    def _within(self, *ends: int) -> None:
        """Raises RuntimeError if a row would be written beyond the cache's end, which no program would notice."""
        assert self._state is not None
        if max(ends) > self._state.cache.capacity:
            raise RuntimeError(f"a row needs {max(ends)} places, and the cache has {self._state.cache.capacity}")

    def _size(self, row: _Row) -> int:
        """Tokens of the piece that a row reads next, with padding: less than half is padding, except in the smallest."""
        assert self._state is not None
        most = min(2 * row.left - 1, self._state.cache.capacity - row.read)
        return max((size for size in self.chunks if size <= most), default=self.chunks[0])

    def _saves(self, row: _Row, shared: int) -> bool:
        """Whether it saves a piece to copy a row that holds so many tokens of this row's prompt."""
        return shared - row.read >= self.chunks[0]

    def _borrow(self, row: _Row, held: list[np.ndarray]) -> None:
        """Copies what another row holds of this row's prompt, if that saves enough. held: of all rows."""
        shared = [_shared(keys, row.keys) if other is not row else 0 for other, keys in zip(self._rows, held)]
        best = int(np.argmax(shared))
        if not self._saves(row, shared[best]):
            return
        assert row.answer is not None and self._state is not None
        self._state = _copy(self._state, np.int32(best), np.int32(self._rows.index(row)))
        row.answer.reused += shared[best] - row.read
        row.read, row.features = shared[best], None

    def _see(self, rows: list[_Row], images: list[int]) -> list[_Row]:
        """Sees the next image of each prompt that needs it for its next ``images`` image tokens; where somebody reads along, one at a time, so that
        other answers go on. Returns the rows whose image was seen.
        """
        blind = [row for row, count in zip(rows, images) if count > (0 if row.features is None else len(row.features))]
        if not blind:
            return []
        blind = blind[: 1 if self._watched else next(n for n in TOGETHER if n <= len(blind))]
        given = []
        for row in blind:
            assert row.answer is not None
            ready = 0 if row.features is None else len(row.features)
            past = int((row.keys[: row.read] < 0).sum())
            given.append(row.answer.request.images[(past + ready) // self.config.image_tokens])
        seen = np.asarray(see(self.config, self.params, np.stack(given)[:, None].astype(np.float32), mesh=self.mesh))
        for row, new in zip(blind, seen):
            row.features = new if row.features is None else np.concatenate([row.features, new])
        return blind

    def _features(self, rows: list[_Row], pieces: list[np.ndarray], size: int) -> np.ndarray | None:
        """(R, size, D), of the image tokens of these pieces and zeros; always, so that reading with images and without is one program."""
        if self.config.vision is None:
            return None
        features = np.zeros((len(rows), size, self.config.text.hidden_size), jnp.dtype(self.config.dtype))
        for place, row, keys in zip(features, rows, pieces):
            if row.features is not None and (images := int((keys < 0).sum())):
                place[:images], row.features = row.features[:images], row.features[images:]
        return features

    def _begin(self) -> None:
        """Begins the answers whose prompts are read."""
        ready = [row.answer if row.reading and not row.left else None for row in self._rows]
        if not any(ready):
            return
        assert self._state is not None
        asked = [None if answer is None else answer.request for answer in ready]
        rows = begin(
            [0 if each is None else int(each.ids[-1]) for each in asked],
            [Sampling() if each is None else each.sampling for each in asked],
            [0 if each is None else each.max_new_tokens for each in asked],
            [each is not None and each.force_pose for each in asked],
        )
        lengths = np.array([-1 if each is None else len(each.ids) - 1 for each in asked], np.int32)
        self._state = _start(self._state, rows, lengths)
        for row, answer in zip(self._rows, ready):
            if answer is not None:
                row.reading, row.features = False, None

    def _write(self) -> None:
        """The next tokens of all answers that are being written."""
        writing = [(slot, row) for slot, row in enumerate(self._rows) if row.answer is not None and not row.reading]
        reading = any(row.reading for row in self._rows)
        if not writing or (reading and not self._watched):  # rows are few, so reading ends
            return
        assert self._state is not None
        answers = [row.answer for _, row in writing if row.answer is not None]
        greedy = all(answer.request.sampling.temperature == 0 for answer in answers)
        # On a CPU a row more takes time, even one that nobody needs.
        few = len(writing) == 1 < self.slots and self.cpu and self.mesh is None
        lone = {"rows": np.array([writing[0][0]], np.int32)} if few else {}
        seconds = self._seconds[greedy, few]
        paced = min(max(1, int(PACE / seconds)), STEPS) if seconds else 1
        count = 1 if reading else min(answer.request.every or (paced if answer.tokens else 1) for answer in answers)
        begun, before = time.perf_counter(), [len(answer.tokens) for answer in answers]
        self._within(
            *(len(a.request.ids) - 1 + n + min(count, a.request.max_new_tokens - n) for a, n in zip(answers, before))
        )
        self._state, tokens, states = decode(
            self.config, self.params, self._state, np.int32(count), self.tail, **lone, greedy=greedy, mesh=self.mesh
        )
        # One transfer for all, because each transfer waits for the device.
        rows = self._state.rows
        ids, steps, done, finite = jax.device_get((tokens, rows.step, rows.done, rows.finite))
        self.failures = 0
        self._seconds[greedy, few] = (time.perf_counter() - begun) / max(
            1, *(steps[slot] - n for (slot, _), n in zip(writing, before))
        )
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
            if done[slot]:
                self._end(row)
            else:
                answer.say()

    def _pose(self, answer: Completion, slot: int, states: jax.Array, place: int, position: int) -> Pose:
        request = answer.request
        assert self._state is not None
        drawn = _draw(
            self.config, self.params, self._state.cache.states, states, np.int32(slot), np.int32(place), np.int32(position),
            np.uint32(request.sampling.seed), np.int32(len(answer.poses)), samples=_draws(request.samples),
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
        answer.say()
        # Whoever listens often holds the answer. This breaks the circle, so that its memory is free at once.
        answer.tell = None


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
def _copy(state: DecodeState, source: jax.Array, target: jax.Array) -> DecodeState:
    """The row ``target`` holds what the row ``source`` does; whoever reads or begins it says how much of that it keeps."""

    def put(x: jax.Array, axis: int) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(x, source, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis)

    cache = state.cache
    keys, values = jax.tree.map(lambda x: put(x, x.ndim - 4), (cache.keys, cache.values))
    states = None if cache.states is None else put(cache.states, 0)
    lengths = cache.lengths.at[target].set(cache.lengths[source])
    return dataclasses.replace(state, cache=KVCache(keys, values, lengths, states))


@functools.partial(jax.jit, donate_argnames="state")
def _start(state: DecodeState, new: AnswerRows, lengths: jax.Array) -> DecodeState:
    """Begins the answers of rows whose ``lengths`` (B,), the tokens that they hold, are not negative."""
    starts = lengths >= 0
    rows = jax.tree.map(lambda old, each: jnp.where(starts, each, old), state.rows, new)
    cache: KVCache = dataclasses.replace(state.cache, lengths=jnp.where(starts, lengths, state.cache.lengths))
    return DecodeState(cache, rows)


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
    seed: jax.Array,
    number: jax.Array,
    *,
    samples: int,
) -> Pose:
    """Samples of one pose, of batch shape (samples,), the answer's pose of this number. newest: (B, STEPS, D); that of (slot, place) predicted its
    token at ``position``. conversations: (B, S, D) or None.
    """
    key = jax.random.fold_in(pose_key(seed), number)
    token = newest[slot, place][None, None]
    if conversations is None:
        states = States(token)
    else:
        own = jax.lax.dynamic_index_in_dim(conversations, slot, keepdims=True)
        states = States(token, own, (jnp.arange(own.shape[1]) <= position)[None, None])
    return jax.tree.map(lambda x: x[:, 0, 0], bind(config, params).pose_head.sample(states, key, samples))

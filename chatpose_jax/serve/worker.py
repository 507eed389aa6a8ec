"""The thread that works for all requests, and what a request hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from chatpose_jax.chat import ChatPose
from chatpose_jax.engine import Completion, Request
from chatpose_jax.errors import UserError
from chatpose_jax.serve.metrics import Metrics, compiled_programs
from chatpose_jax.serve.openai import pose_in_words
from chatpose_jax.serve.poses import pose_json
from chatpose_jax.settings import one_line
from smpl_jax.pose import Pose
from smpl_jax.posed import PosedBody

NO_MEMORY = (
    "the device has too little memory for the model and its cache: fewer --slots, a smaller --context, --dtype bfloat16, or --mesh over several "
    "devices. chatpose plan --decode says what fits"
)
STALLED_SECONDS = 120.0
"""Of one step, which writes one token of each answer or a few, and compiles nothing any more."""


class Piece(NamedTuple):
    """What is new of an answer. poses: those of ``text``, each of batch shape (samples,). finish: why the answer ends, with the last piece."""

    text: str
    poses: list[Pose]
    finish: str | None = None

    def __repr__(self) -> str:
        return one_line(self)


class Full(Exception):
    """The queue is full. seconds: after which it is worth to try again."""

    def __init__(self, seconds: float):
        super().__init__(f"too many requests wait; try again in {seconds:.0f} s")
        self.seconds = seconds


class Stopped(Exception):
    """The answer will not be completed, because the server ends."""


class Worker:
    """Loads a model, warms it up, and drives its engine, all in one thread.

    load: gives the model. queue: answers that may wait for a row. samples: of a pose, at most; their programs are compiled at the start.
    patience: seconds that an answer may take in all. failed: called, in the thread, when it ends by an error, which is in ``error`` then.

    Methods are for the event loop.
    """

    def __init__(
        self,
        load: Callable[[], ChatPose],
        metrics: Metrics,
        *,
        queue: int = 64,
        samples: int = 16,
        patience: float = 600.0,
        failed: Callable[[], None] = lambda: None,
    ):
        self.load, self.metrics, self.queue, self.samples, self.patience = load, metrics, queue, samples, patience
        self.failed = failed
        self.error: Exception | None = None
        self.model: ChatPose | None = None
        self.closing = False
        self.answers: set[Answering] = set()
        self._wake = threading.Condition()
        self._step: float | None = None
        """When the step began that is under way."""
        self._seconds = 1.0
        """Of an answer, about; for Retry-After."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stalled(self) -> bool:
        """Whether a step takes so long that the device must have stopped."""
        return (begun := self._step) is not None and time.monotonic() - begun > STALLED_SECONDS

    def close(self, seconds: float = 10) -> None:
        """Ends the thread: answers that somebody still waits for end with an error. A model that is being loaded is left behind."""
        self.closing = True
        for answer in list(self.answers):
            answer.leave()
        with self._wake:
            self._wake.notify()
        if self.model is not None:
            self._thread.join(seconds)
        gc.unfreeze()

    def submit(self, requests: Sequence[Request], stop: tuple[str, ...] = ()) -> list[Answering]:
        """Begins to answer. Raises Full, for all of them, if they cannot all have a row or a place in the queue."""
        assert self.model is not None
        engine = self.model.engine
        if len(self.answers) + len(requests) > engine.slots + self.queue:
            raise Full(max(1.0, self._seconds * len(self.answers) / engine.slots))
        answers = [Answering(self, request, stop) for request in requests]
        with self._wake:
            self._wake.notify()
        return answers

    def took(self, seconds: float) -> None:
        """Hears how long an answer took."""
        self.metrics.answer.observe(seconds)
        self._seconds = 0.9 * self._seconds + 0.1 * seconds

    def _run(self) -> None:
        try:
            model = self.load()
            self._warm(model)
            self.metrics.watch(model.engine)
            self.model = model
            print(f"{model!r} is ready", flush=True)
            while self._wait(model):
                before = self._step = time.monotonic()
                model.engine.step()
                self._step = None
                self.metrics.steps.observe(time.monotonic() - before)
        except Exception as error:
            self.error = UserError(NO_MEMORY) if "RESOURCE_EXHAUSTED" in str(error) else error
            for answer in list(self.answers):
                answer.hear()
            self.failed()

    def _wait(self, model: ChatPose) -> bool:
        """Until there is something to do. False when nothing comes any more."""
        with self._wake:
            self._wake.wait_for(lambda: self.closing or not model.engine.idle)
        return not model.engine.idle

    def _warm(self, model: ChatPose) -> None:
        """Compiles all that answers need."""
        before, count = time.perf_counter(), compiled_programs()[0]
        pose = model.engine.warm(self.samples if model.draws else 1)
        pose_in_words(pose_json([""], [PosedBody(pose[0], model.body)]), "")
        count, seconds = compiled_programs()[0] - count, time.perf_counter() - before
        # The 400,000 objects that are here to stay need not be looked through again for circles of references, which takes a sixth of a second.
        gc.collect()
        gc.freeze()
        print(f"{count} programs compiled, or found in the cache of compiled programs, in {seconds:.1f} s", flush=True)


class Answering:
    """An answer under way. Whoever asked must call ``leave`` in the end: then its row is free."""

    def __init__(self, worker: Worker, request: Request, stop: tuple[str, ...]):
        assert worker.model is not None
        self.worker, self.model, self.request, self.stop = worker, worker.model, request, stop
        self.tokens = 0
        self._loop, self._heard, self._begun = asyncio.get_running_loop(), asyncio.Event(), time.monotonic()
        self.completion = self.model.engine.submit(request, lambda _: self.hear())
        worker.answers.add(self)

    def hear(self) -> None:
        """Something is new; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._heard.set)

    def leave(self) -> None:
        """Nobody listens any more."""
        if self in self.worker.answers:
            self.worker.answers.remove(self)
            self.model.engine.cancel(self.completion)
            self.hear()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of the answer, which ends early at a string of ``stop``. Raises TimeoutError, Stopped, and the error of a failed answer."""
        reading, metrics = Reading(self.model, self.completion, self.stop), self.worker.metrics
        deadline = self._loop.time() + self.worker.patience - (time.monotonic() - self._begun)
        while True:
            async with asyncio.timeout_at(deadline):
                await self._heard.wait()
            self._heard.clear()
            pieces, before = reading.next(), self.tokens
            self.tokens = reading.told
            metrics.tokens.inc(self.tokens - before)
            if self.tokens and not before:
                metrics.first_token.observe(time.monotonic() - self._begun)
                metrics.prompt_tokens.labels("cached").inc(self.completion.reused)
                metrics.prompt_tokens.labels("computed").inc(len(self.request.ids) - self.completion.reused)
            for piece in pieces:
                yield piece
                if piece.finish:
                    self.worker.took(time.monotonic() - self._begun)
                    return
            if self.worker.error is not None or self not in self.worker.answers:
                raise Stopped("the server stopped before the answer was complete")


class Reading:
    """Turns the tokens of an answer into text, piece by piece. No piece splits a character, or ends within what may be a string of ``stop``. Each
    pose comes with the piece that ends with it.
    """

    def __init__(self, model: ChatPose, completion: Completion, stop: tuple[str, ...]):
        self.completion, self.stop, self.config = completion, stop, model.config
        self.told = 0
        self._decoder = model.processor.stream()
        self._text, self._sent = "", 0
        self._poses: list[int] = []
        """For each pose, how many characters the text has with it."""
        self._shown = 0

    def next(self) -> list[Piece]:
        """What is new. Raises the error of an answer that failed."""
        completion, config = self.completion, self.config
        done = completion.done  # first: what is written later is read the next time
        if completion.error is not None:
            raise completion.error
        tokens, pieces = completion.tokens[self.told :], list[Piece]()
        self.told += len(tokens)
        for token in tokens:
            if token not in config.end_token_ids:
                self._add(self._decoder.push(token))
            if token == config.pose_token_id:
                self._poses.append(len(self._text))
                pieces.append(self._release())
        if done:
            self._add(self._decoder.flush())
            ended = bool(completion.tokens) and completion.tokens[-1] in config.end_token_ids
            pieces.append(self._release("stop" if ended else "length"))
        else:
            pieces.append(self._release())
        return [piece for piece in pieces if any(piece)]

    def _add(self, text: str) -> None:
        self._text += text if self._text else text.lstrip(" ")

    def _release(self, finish: str | None = None) -> Piece:
        found = [place for each in self.stop if (place := self._text.find(each, self._sent)) >= 0]
        if found:
            upto, finish = min(found), "stop"
        else:
            rest = self._text[self._sent :]
            upto = len(self._text) - (0 if finish else max((_overlap(rest, each) for each in self.stop), default=0))
        begin, first = self._sent, self._shown
        self._sent = upto
        self._shown = sum(place <= upto for place in self._poses)
        return Piece(self._text[begin:upto], self.completion.poses[first : self._shown], finish)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""The thread that works for all requests, and what a request hears of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from typing import NamedTuple

from chatpose_jax.chat import ChatPose, Reply
from chatpose_jax.engine import Completion, Request
from chatpose_jax.serve.metrics import Metrics
from smpl_jax.posed import PosedBody


class Piece(NamedTuple):
    """What is new of an answer. reply: the whole answer, with the last piece. poses: those whose tokens are in ``text``, each with its samples."""

    text: str
    poses: list[list[PosedBody]]
    tokens: int
    reply: Reply | None = None
    finish: str | None = None


class Full(Exception):
    """The queue is full. seconds: after which it is worth to try again."""

    def __init__(self, seconds: float):
        super().__init__(f"too many requests wait; try again in {seconds:.0f} s")
        self.seconds = seconds


class Worker:
    """Drives a model's engine in one thread. queue: requests that may wait for a row. patience: seconds that an answer may take in all."""

    def __init__(self, model: ChatPose, metrics: Metrics, *, queue: int = 64, patience: float = 600.0):
        self.model, self.metrics, self.queue, self.patience = model, metrics, queue, patience
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._seconds = 1.0
        """Of an answer, about; for Retry-After."""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Takes no more requests; ends when those under way are answered."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    @property
    def closing(self) -> bool:
        return self._closing

    def join(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        engine = self.model.engine
        while True:
            with self._wake:
                while engine.idle and not self._closing:
                    self._wake.wait()
            if engine.idle:
                return
            before = time.perf_counter()
            engine.step()
            self.metrics.step(engine, time.perf_counter() - before)

    async def answer(self, request: Request, stop: tuple[str, ...] = ()) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer. It ends early at a string of ``stop``, which is left out; and its row is free when nobody listens any more.

        Raises Full, TimeoutError, and the UserError of a request that can have no answer.
        """
        engine, loop, heard = self.model.engine, asyncio.get_running_loop(), asyncio.Event()
        engine.check(request)
        if engine.waiting >= self.queue:
            raise Full(max(1.0, self._seconds * engine.waiting / engine.slots))
        begun = time.monotonic()
        completion = engine.submit(request, lambda _: loop.call_soon_threadsafe(heard.set))
        with self._wake:
            self._wake.notify()
        reading = Reading(self.model, completion, stop)
        try:
            while True:
                async with asyncio.timeout_at(loop.time() + self.patience - (time.monotonic() - begun)):
                    await heard.wait()
                heard.clear()
                piece = reading.next()
                if piece.tokens and not reading.heard:
                    self.metrics.first(time.monotonic() - begun)
                    reading.heard = True
                if piece.text or piece.poses or piece.finish:
                    yield piece
                if piece.finish:
                    return
        finally:
            if completion.done:
                self._seconds = 0.9 * self._seconds + 0.1 * (time.monotonic() - begun)
            else:
                engine.cancel(completion)


class Reading:
    """Turns the tokens of a completion into text, piece by piece; no piece splits a character or ends within what may be a string of ``stop``."""

    def __init__(self, model: ChatPose, completion: Completion, stop: tuple[str, ...]):
        self.model, self.completion, self.stop = model, completion, stop
        self.decoder, self.told, self.poses, self.heard = model.processor.stream(), 0, 0, False
        self.held, self.begun = "", False

    def next(self) -> Piece:
        completion, config = self.completion, self.model.config
        if completion.error is not None:
            raise completion.error
        done, tokens = completion.done, completion.tokens[self.told :]
        self.told += len(tokens)
        text = "".join(self.decoder.push(i) for i in tokens if i not in config.end_token_ids)
        if done:
            text += self.decoder.flush()
        if not self.begun:
            text = text.lstrip(" ")
            self.begun = bool(text)
        self.held += text
        found = [place for each in self.stop if (place := self.held.find(each)) >= 0]
        if found:
            text, self.held = self.held[: min(found)], ""
            return self._last(text, "stop", len(tokens))
        kept = 0 if done else max((_overlap(self.held, each) for each in self.stop), default=0)
        text, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        if done:
            return self._last(text, None, len(tokens))
        return Piece(text, self._poses(), len(tokens))

    def _last(self, text: str, finish: str | None, tokens: int) -> Piece:
        reply = self.model.reply(self.completion)
        return Piece(text, self._poses(), tokens, reply, finish or reply.finish_reason)

    def _poses(self) -> list[list[PosedBody]]:
        new = self.completion.poses[self.poses :]
        self.poses += len(new)
        return [[PosedBody(pose[i], self.model.body) for i in range(self.completion.request.samples)] for pose in new]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

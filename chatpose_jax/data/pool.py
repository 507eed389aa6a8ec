"""Work shared by processes of this machine, which end with the one that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from chatpose_jax.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Tick = Callable[[int], None]
"""Is told by the work how many items were done since it was told last."""


def cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(
    work: Callable[[Job, Tick], Result],
    jobs: Sequence[Job],
    workers: int,
    tell: Callable[[int], None] = lambda count: None,
) -> Generator[Result, None, None]:
    """Does ``work(job, tick)`` for each job, and gives the results as they come, in any order. Close the iterator to end early.

    work: is pickled once for each process. With one worker, or one job, this process does all.
    tell: is told about once a second how many items are done in all.

    Raises what the work raises; UserError where a process was killed.
    """
    return (
        _here(work, jobs, tell)
        if min(workers, len(jobs)) < 2
        else _processes(work, jobs, min(workers, len(jobs)), tell)
    )


def _here(
    work: Callable[[Job, Tick], Result], jobs: Sequence[Job], tell: Callable[[int], None]
) -> Generator[Result, None, None]:
    count = 0

    def tick(items: int) -> None:
        nonlocal count
        count += items
        tell(count)

    for job in jobs:
        yield work(job, tick)


def _processes(
    work: Callable[[Job, Tick], Result], jobs: Sequence[Job], workers: int, tell: Callable[[int], None]
) -> Generator[Result, None, None]:
    # They start afresh: JAX's threads do not survive a fork. Each ends when the pipe is closed: at the end of this function, or of this process,
    # even if it is killed.
    context = multiprocessing.get_context("spawn")
    reading, alive = context.Pipe(duplex=False)
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _start, (work, reading, counter))
    try:
        futures: set[Future[Any]] = {pool.submit(_work, job) for job in jobs}
        while futures:
            done, futures = wait(futures, timeout=1.0, return_when=FIRST_COMPLETED)
            tell(counter.value)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was ended from outside, for example because memory ran out; "
            "start again, with fewer workers if memory is short"
        ) from None
    finally:
        alive.close()
        pool.shutdown(cancel_futures=True)
        reading.close()


_work_of_this_process: Any
_tick: Tick


def _start(work: Any, reading: Connection, counter: Any) -> None:
    global _work_of_this_process, _tick

    def tick(items: int) -> None:
        with counter.get_lock():
            counter.value += items

    def watch() -> None:
        with contextlib.suppress(EOFError):
            reading.recv()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=watch, daemon=True).start()
    _work_of_this_process, _tick = work, tick


def _work(job: Any) -> Any:
    return _work_of_this_process(job, _tick)

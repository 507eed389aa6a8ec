"""Several processes that write one folder: what fails in one ends in all."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from chatpose_jax.errors import UserError

_WAIT_SECONDS = 6 * 3600
"""How long a process waits for the others; one that has died is noticed sooner, by JAX's heartbeats."""
_MESSAGE = 1000
_meetings = itertools.count()


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Every process of the run enters the block, and leaves it when all are through. What one raises ends the block in all
    of them: there as it is, elsewhere as a UserError that says where and what. Blocks may be nested.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or getattr(error, "known_everywhere", False):
            raise
        failure = error
    if jax.process_count() == 1:
        return
    # By number, not by place: where one is out of a block early, the others are told at the next block that they leave.
    ocp.multihost.get_barrier_sync_fn()(key=f"all_or_none:{next(_meetings)}", timeout_ms=1000 * _WAIT_SECONDS)
    said = (
        b"" if failure is None else (str(failure).strip() or type(failure).__name__).encode(errors="replace")[:_MESSAGE]
    )
    heard = multihost_utils.process_allgather(np.frombuffer(said.ljust(_MESSAGE, b"\0"), np.uint8))
    messages = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in heard]
    first = next((rank for rank, message in enumerate(messages) if message), None)
    if first is None:
        return
    if failure is None:
        failure = UserError(f"process {first} of {len(messages)} failed, so all end: {messages[first]}")
    failure.known_everywhere = True  # type: ignore[attr-defined]
    raise failure

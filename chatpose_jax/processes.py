"""Several processes that write one folder: an error in one of them ends all."""

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
"""How long a process waits for the others. JAX's heartbeats detect a dead process sooner."""
_MESSAGE = 1000
_meetings = itertools.count()


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Context manager that all processes of a run enter together and leave together. An error in one of them ends the block in all: that process
    raises the error itself, the others a UserError with the process and its message. Blocks may be nested.
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
    # Blocks are counted, not named: if a process leaves one early, the others learn of it at the end of their next block.
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

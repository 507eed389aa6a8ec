"""Counts the tokens of the rows of a prepared folder, if the tokenizer is not that of its index, and keeps the numbers in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Sequence

import numpy as np

from chatpose_jax import storage
from chatpose_jax.data.collate import count_example
from chatpose_jax.data.example import Example, rows_in_turn
from chatpose_jax.data.pool import Tick, cpus, share
from chatpose_jax.errors import UserError
from chatpose_jax.locks import Locked, only_writer
from chatpose_jax.processing.processor import Processor
from chatpose_jax.storage import Location

LENGTHS = np.dtype([("tokens", "<i4"), ("tail", "<i4")])
"""As the fields of these names in the index (``data.store``)."""
_RANGE = 4096
"""Rows that a process counts at a time. For a few times as many, starting processes is not worth while."""


def lengths_file(folder: Location, processor: Processor) -> Location:
    """The file that keeps the lengths of a split for a tokenizer and template."""
    return folder / f"lengths-{processor.fingerprint}.npy"


def lengths_of(rows: Sequence[Example], folder: Location, processor: Processor) -> np.ndarray:
    """(N,) ``LENGTHS`` of the rows of a split, whose folder is given: from its file, or else counted and kept there if the folder can be written.

    If several processes or machines need the same lengths, the others wait for the first.
    """
    file = lengths_file(folder, processor)
    while not file.exists():
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(only_writer(file, file.with_suffix(".lock")))
            except Locked:
                time.sleep(0.5)
                continue
            except UserError:  # the folder cannot be written
                return count_lengths(rows, processor)
            if file.exists():
                break
            found, data = count_lengths(rows, processor), io.BytesIO()
            np.save(data, found)
            with contextlib.suppress(OSError):
                storage.write_bytes(file, data.getvalue())
            return found
    try:
        found = np.load(io.BytesIO(file.read_bytes()))
    except (ValueError, EOFError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it") from None
    if found.dtype != LENGTHS or found.shape != (len(rows),):
        raise UserError(f"{file} does not fit the index beside it; delete it")
    return found


def count_lengths(rows: Sequence[Example], processor: Processor) -> np.ndarray:
    """(N,) ``LENGTHS`` of all rows, counted by all processors of this machine where there are many rows."""
    starts = range(0, len(rows), _RANGE)
    found = np.empty(len(rows), LENGTHS)
    counted = share(_Counter(rows, processor), starts, cpus() if len(starts) > 4 else 1)
    with contextlib.closing(counted):
        for start, some in counted:
            found[start : start + len(some)] = some
    return found


@dataclasses.dataclass(frozen=True)
class _Counter:
    rows: Sequence[Example]
    processor: Processor

    def __call__(self, start: int, tick: Tick) -> tuple[int, np.ndarray]:
        end = min(start + _RANGE, len(self.rows))
        sizes = [count_example(self.processor, row) for row in rows_in_turn(self.rows, range(start, end))]
        patches = self.processor.ids.num_patches
        return start, np.array([(size.tokens - size.images * patches, size.tail) for size in sizes], LENGTHS)

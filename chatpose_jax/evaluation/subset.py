"""Sequences of rows that are read when they are taken; subsets drawn by ids, and kept as a list that people can read."""

from __future__ import annotations

import bisect
import collections
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chatpose_jax.data.example import Example, ExampleRows, Kind, rows_at, rows_from, rows_in_turn
from chatpose_jax.data.store import KINDS
from chatpose_jax.errors import UserError


class Selected(ExampleRows):
    """Some rows of a sequence, read when they are taken. numbers: their places in it."""

    def __init__(self, rows: Sequence[Example], numbers: Sequence[int]) -> None:
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, numbers: Sequence[int]) -> list[Example]:
        """Some rows, read together."""
        return rows_at(self.rows, [self.numbers[number] for number in numbers])


class Chained(ExampleRows):
    """The rows of several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self.parts = parts
        self.ends = list(itertools.accumulate(map(len, parts)))

    @property
    def fingerprint(self) -> str:
        """That of the parts (``Prepared.fingerprint``), "" for those without."""
        return " ".join(str(getattr(part, "fingerprint", "")) for part in self.parts)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitems__(self, numbers: Sequence[int]) -> list[Example]:
        """Some rows; those of one part are read together."""
        return rows_from(self.parts, [self._place(number) for number in numbers])

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect.bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)


def with_poses(rows: Sequence[Example], kind: Kind | None = None) -> Selected:
    """The rows that have poses, of one kind or all. Of a prepared data set only the index is read."""
    entries = getattr(rows, "entries", None)
    if entries is not None:
        chosen = entries["poses"] > 0
        if kind is not None:
            chosen &= entries["kind"] == KINDS.index(kind)
        return Selected(rows, np.flatnonzero(chosen).tolist())
    return Selected(
        rows, [i for i, row in enumerate(rows_in_turn(rows)) if len(row.poses) and kind in (None, row.kind)]
    )


def draw_rows(rows: Sequence[Example], count: int) -> Selected:
    """``count`` rows, or all if there are fewer: those whose ids have the smallest hashes, in the order of the rows.

    So the choice depends on the ids alone; a row more or less in the data set changes it by at most one row.
    """
    hashes = [
        (hashlib.blake2b(row.id.encode(), digest_size=16).digest(), i) for i, row in enumerate(rows_in_turn(rows))
    ]
    return Selected(rows, sorted(i for _, i in sorted(hashes)[:count]))


def listed_rows(rows: Sequence[Example], file: Path) -> Selected:
    """The rows whose ids a file lists, one a line, in the order of the rows. Raises UserError for an id that no row has, or that is listed twice."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--subset {file}: expected a number, or a file with an id in each line ({error})") from None
    wanted = [line for line in lines if line.strip()]
    if twice := [line for line, count in collections.Counter(wanted).items() if count > 1]:
        raise UserError(f"--subset {file}: {twice[0]!r} is listed twice")
    places = {row.id: i for i, row in enumerate(rows_in_turn(rows))}
    if absent := [line for line in wanted if line not in places]:
        raise UserError(
            f"--subset {file}: {len(absent)} of {len(wanted)} ids are in no row, such as {absent[0]!r}; the {len(rows)} rows have ids "
            f"such as {next(iter(places), 'none')!r}"
        )
    if not wanted:
        raise UserError(f"--subset {file}: lists no id")
    return Selected(rows, sorted(places[line] for line in wanted))

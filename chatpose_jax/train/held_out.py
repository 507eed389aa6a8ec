"""Held-out rows: a few of each kind, read once and kept as batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.models.heads import head_family
from chatpose_jax.train import feed
from chatpose_jax.train.evaluators import Context

READ = 1024
"""The largest number of rows that are read; for large ``count``, it is eight times ``count``."""


def held_out_rows(rows: Sequence[Example], count: int) -> tuple[dict[str, list[Example]], int]:
    """Up to ``count`` rows with a pose of each kind, in their order, and how many rows were read for them.

    At most ``max(READ, 8 * count)`` rows are read. They are spread evenly over the set, first far apart and then closer together. Reading stops
    when there are ``count`` rows of each kind seen so far, but not before ``2 * count`` rows, because another kind may still come.

    Raises UserError if no row has a pose.
    """
    groups: dict[str, dict[int, Example]] = {}
    read = 0
    for index in spread(len(rows), max(READ, 8 * count)):
        if read >= 2 * count and groups and all(len(group) == count for group in groups.values()):
            break
        row, read = rows[index], read + 1
        if len(row.poses) and len(groups.setdefault(row.kind, {})) < count:
            groups[row.kind][index] = row
    if not len(rows):
        raise UserError("there are no held-out rows: the split of the data that is asked for is empty")
    if not groups:
        raise UserError(f"none of the {read} held-out rows that were read (of {len(rows)}) has a pose")
    return {kind: [group[index] for index in sorted(group)] for kind, group in groups.items()}, read


def spread(size: int, count: int) -> list[int]:
    """Up to ``count`` evenly spaced indices into ``size`` rows, ordered so that the first ones are about evenly spaced too."""
    count = min(size, count)
    bits = max(count - 1, 0).bit_length()
    order = sorted(range(count), key=lambda place: int(f"{place:0{bits}b}"[::-1], 2))
    places = np.linspace(0, max(size - 1, 0), count).astype(int)
    return [int(places[place]) for place in order]


def held_out_batches(context: Context, rows: Sequence[Example], size: int) -> list[dict[str, Any]]:
    """All rows in batches of ``size`` (without a mesh, of at most as many as there are rows). On a mesh, this process's part of each batch."""
    config, mesh = context.config, context.mesh
    loader = BatchLoader(
        rows,
        context.processor,
        min(size, len(rows)) if mesh is None else size,
        max_length=config.train.max_length,
        family=head_family(config.model.head),
        shuffle=False,
        epochs=1,
        buckets=1,
        rows=feed.local_rows(mesh, size),
    )
    return list(loader)

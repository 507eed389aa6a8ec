"""The source "joined": rows of other sources one after the other in one conversation, so that a model meets a change of subject."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, get_args

import numpy as np

from chatpose_jax.data.config import Split, source_rows
from chatpose_jax.data.example import NO_POSES, Example, ExampleRows, rows_from
from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole
from smpl_jax.pose import concatenate, to_frame


def joined(
    split: Split,
    *,
    of: Sequence[Any],
    seed: int,
    open_source: Callable[..., Sequence[Example]],
    parts: Sequence[int] = (1, 3),
    train_size: int = 8000,
    val_size: int = 256,
    test_size: int = 256,
) -> Joined:
    """The source "joined" of ``data.sources``.

    of: rows (name, weight, options) as in ``data.sources``; a row of the source is drawn for each part. parts: the fewest and the most parts of a
    conversation. train_size, val_size, test_size: conversations of each split. open_source: given by ``data.sources``.

    Raises UserError where ``of`` or ``parts`` does not fit, as those sources do, and where one that takes part has no rows. Of "val" and "test",
    sources without rows take no part.
    """
    sizes = {"train": train_size, "val": val_size, "test": test_size}
    for name, size in sizes.items():
        whole(f"{name}_size", size, 1)
    if len(parts) != 2 or not 1 <= parts[0] <= parts[1]:
        raise UserError(
            f"parts: expected the fewest and the most parts of a conversation, such as (1, 3); found {parts}"
        )
    if not (named := source_rows(tuple(of))):
        raise UserError("of: expected rows of (name, weight, {option: value}), at least one; found none")
    opened = [(open_source(row.name, split, row.options, MappingProxyType({})), row.weight) for row in named]
    kept = [(rows, weight) for rows, weight in opened if split == "train" or len(rows)]
    for row, (rows, _) in zip(named, opened):
        if split == "train" and not len(rows):
            raise UserError(f"its source {row.name!r} has no rows")
    return Joined(
        kept, (int(parts[0]), int(parts[1])), sizes[split] if kept else 0, [seed, get_args(Split).index(split)]
    )


class Joined(ExampleRows):
    """Row i joins rows that are drawn for it alone, with replacement, so it is the same for any size.

    sources: (rows, weight). parts: the fewest and the most parts. size: number of conversations. entropy: seeds the draws.

    The poses of all parts must have one number of joints, and come out in the camera frame. A conversation with poses is of kind "image" or "text".
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[Example], float]],
        parts: tuple[int, int],
        size: int,
        entropy: Sequence[int],
    ) -> None:
        self.rows = [rows for rows, _ in sources]
        weights = np.array([weight for _, weight in sources])
        self.shares = weights / weights.sum()
        self.parts, self.size, self.entropy = parts, size, list(entropy)

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, numbers: Sequence[int]) -> list[Example]:
        """Some rows, whose parts are read together. Raises UserError where poses cannot be joined."""
        drawn = [self._draw_parts(index) for index in numbers]
        parts = iter(rows_from(self.rows, [place for places in drawn for place in places]))
        return [self._join(index, list(itertools.islice(parts, len(places)))) for index, places in zip(numbers, drawn)]

    def _draw_parts(self, index: int) -> list[tuple[int, int]]:
        """(source, row) of each part."""
        rng = np.random.default_rng([*self.entropy, index])
        return [self._draw(rng) for _ in range(rng.integers(self.parts[0], self.parts[1] + 1))]

    def _join(self, index: int, found: list[Example]) -> Example:
        posed = [part for part in found if len(part.poses)]
        try:
            poses = concatenate([to_frame(_plain(part), "camera") for part in posed]) if posed else NO_POSES
        except ValueError as error:
            raise UserError(f"{' and '.join(part.place for part in posed)} cannot be joined: {error}") from None
        kinds: set[Any] = {part.kind for part in found}
        return Example(
            f"joined-{index}",
            next((kind for kind in ("image", "text") if kind in kinds), "instruction"),
            [message for part in found for message in part.messages if message["role"] != "system"],
            poses,
        )

    def _draw(self, rng: np.random.Generator) -> tuple[int, int]:
        source = int(rng.choice(len(self.rows), p=self.shares))
        return source, int(rng.integers(len(self.rows[source])))


def _plain(part: Example) -> Any:
    """The part's poses without shape and translation, which not all sources have."""
    return dataclasses.replace(
        part.poses, betas=None, has_betas=None, shape_space=None, translation=None, has_translation=None
    )

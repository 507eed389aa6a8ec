"""Mixes several data sets in fixed proportions."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

from chatpose_jax.data.example import Example, ExampleRows, rows_from
from chatpose_jax.data.sizes import known_sizes
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import Processor


class Mixture(ExampleRows):
    """The rows of all sources, one source after another; an epoch has rows of each by its weight.

    An epoch has as many rows as all sources together, up to rounding of the shares. A source that is smaller than its share is repeated, in a
    new order each time. A larger one continues in the next epoch where it stopped. The rows of an epoch depend on its number and the seed
    alone.

    sources: sequences of ``Example``. weights: a positive number for each; only their proportions matter.
    """

    def __init__(self, sources: Sequence[Sequence[Example]], weights: Sequence[float]) -> None:
        if not sources or len(sources) != len(weights) or any(weight <= 0 for weight in weights):
            raise UserError(
                f"a mixture needs a positive weight for each of its sources, found {list(weights)} for {len(sources)}"
            )
        if empty := [index for index, source in enumerate(sources) if not len(source)]:
            raise UserError(f"source {empty[0]} of the mixture is empty")
        self.sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, sources)))
        self.shares = [max(1, round(self._ends[-1] * weight / sum(weights))) for weight in weights]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitems__(self, numbers: Sequence[int]) -> list[Example]:
        """Some rows; those of one source are read together."""
        return rows_from(self.sources, [self._place(number) for number in numbers])

    def _place(self, index: int) -> tuple[int, int]:
        """The source of a row, and the row's number in there."""
        source = bisect.bisect_right(self._ends, index)
        return source, index - (self._ends[source] - len(self.sources[source]))

    def sizes(self, processor: Processor, max_length: int) -> np.ndarray:
        """The sizes that the sources know, one source after another; see ``data.sizes.known_sizes``."""
        return np.concatenate([known_sizes(source, processor, max_length) for source in self.sources])

    @property
    def draws(self) -> list[tuple[int, int]]:
        """(rows, rows that an epoch takes) of each source, for ``data.batches``."""
        return list(zip(map(len, self.sources), self.shares))

"""Data settings, as plain frozen data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from chatpose_jax import named
from chatpose_jax.errors import UserError
from chatpose_jax.settings import check_types, one_line, require

Split = Literal["train", "val", "test"]


class SourceRow(NamedTuple):
    """One source of rows.

    name: an entry of ``data.sources.SOURCES``, or ``package.module:function`` of one's own.
    weight: its share of an epoch is this over the sum of all weights.
    options: keyword arguments of the source, checked by its signature.
    """

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        return one_line(self)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they become batches.

    sources: rows of (name, weight, options), see ``SourceRow``; the last two are optional. One row is that data set. Several rows are a
        mixture by weight (``data.mixture``). A name alone is one row.
    root: folder of the prepared data sets, or its address in an object store. The source of a data set reads ``root/NAME``, unless its option
        ``folder`` names another.
    seed: passed to each source that has a parameter ``seed``.
    template: conversation template of ``processing.conversation``, for a model that starts from nothing. Others have one in their folder.
    buckets: number of padded lengths for batches with images, and for batches without. A step is compiled for each.
    packing: put several conversations into each row of ``train.max_length`` tokens, instead of padding each.
    cache_mib: encoded rows that each process keeps, at most so many MiB, with images at the model's size. 0 keeps none. Grain's processes
        keep none.
    threads, workers: threads and processes that prepare batches. From two threads or one process on they are Grain's.
    """

    sources: tuple[SourceRow, ...] = (SourceRow("synthetic"),)
    root: str = "data"
    seed: int = 0
    template: str = "vicuna_v1"
    buckets: int = 4
    packing: bool = False
    cache_mib: int = 1024
    threads: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", source_rows(self.sources))
        check_types(self, "data")
        require(self, "data", "at least 0", lambda value: value >= 0, "seed", "cache_mib", "workers")
        require(self, "data", "at least 1", lambda value: value >= 1, "buckets", "threads")
        if not self.sources:
            raise UserError("data.sources: expected rows of (name, weight, {option: value}), one at least; found none")
        if any(row.weight <= 0 for row in self.sources):
            raise UserError(f"data.sources: weights must be positive, found {[row.weight for row in self.sources]}")


def source_rows(value: Any) -> tuple[SourceRow, ...]:
    """The rows of ``data.sources`` in one form; see ``named.rows``."""
    return named.rows("data.sources", value, SourceRow)

"""Data settings, as plain frozen data, and the table of sources."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Literal

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.settings import check_types, require

Split = Literal["train", "val", "test"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where rows come from.

    source: a name of ``SOURCES``, or ``package.module:function`` of one's own with the same signature.
    seed: of what the source draws.
    train_size, val_size, test_size: rows of each split; 0 is the source's own choice.
    mixture: pairs of (task, weight) where the source has tasks; empty is its own choice.
    template: conversation template of ``processing.conversation``, for a model that starts from nothing; others keep their folder's.
    buckets: padded lengths of batches with pictures, and as many of batches without: each compiles a step.
    """

    source: str = "synthetic"
    seed: int = 0
    train_size: int = 0
    val_size: int = 0
    test_size: int = 0
    mixture: tuple[tuple[str, float], ...] = ()
    template: str = "vicuna_v1"
    buckets: int = 4

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(self, "data", "at least 0", lambda value: value >= 0, "seed", "train_size", "val_size", "test_size")
        require(self, "data", "at least 1", lambda value: value >= 1, "buckets")
        if any(weight < 0 for _, weight in self.mixture):
            raise UserError(f"data.mixture: weights must not be negative, found {self.mixture}")


Source = Callable[[DataConfig, Split, int], Sequence[Example]]
"""(settings, split, picture size in pixels) -> rows by index."""


def _synthetic(config: DataConfig, split: Split, image_size: int) -> Sequence[Example]:
    from chatpose_jax.data.synthetic.dataset import SyntheticDataset

    size = {"train": config.train_size, "val": config.val_size, "test": config.test_size}[split]
    return SyntheticDataset(split, size or None, config.seed, image_size, dict(config.mixture) or None)


SOURCES: dict[str, Source] = {"synthetic": _synthetic}


def examples(config: DataConfig, split: Split, image_size: int) -> Sequence[Example]:
    """The rows of a split; raises UserError for a source that cannot be found."""
    if config.source in SOURCES:
        return SOURCES[config.source](config, split, image_size)
    module, _, name = config.source.partition(":")
    if not name:
        raise UserError(
            f"data.source={config.source!r}: expected one of {', '.join(SOURCES)}, or 'package.module:function'"
        )
    try:
        source: Source = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"data.source={config.source!r} cannot be imported: {error}") from error
    return source(config, split, image_size)

"""How long rows are, which plans an epoch: what a data set knows, and the rest by reading its text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chatpose_jax.data.collate import measure_example
from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import Processor


def measure(
    dataset: Sequence[Example], processor: Processor, max_length: int, rows: Sequence[int] | None = None
) -> np.ndarray:
    """(N, 3) int64: tokens, pictures and poses of the given rows, by default of all.

    What the data set knows (``known_sizes``) is taken from it; of the other rows the text is read. No picture is opened.

    Raises UserError for a malformed row.
    """
    chosen = np.arange(len(dataset)) if rows is None else np.asarray(rows, np.int64)
    sizes = known_sizes(dataset, processor, max_length)[chosen]
    for place in np.flatnonzero(sizes[:, 0] < 0):
        sizes[place] = measure_example(processor, dataset[int(chosen[place])], max_length)
    return sizes


def known_sizes(dataset: Sequence[Example], processor: Processor, max_length: int) -> np.ndarray:
    """(N, 3) int64: tokens, pictures and poses of each row that the data set knows; -1 in the others.

    A data set knows by an optional method ``sizes(processor, max_length)``, which gives such an array or None. Tokens count as
    ``processor`` encodes the row, at most ``max_length``; pictures and poses that this cuts off do not count.

    Raises UserError where the method gives something else.
    """
    unknown = np.full((len(dataset), 3), -1, np.int64)
    method = getattr(dataset, "sizes", None)
    if method is None:
        return unknown
    name = getattr(dataset, "where", f"the data set {type(dataset).__name__}")
    if not callable(method):
        raise UserError(f"{name}: its attribute 'sizes' must be a method, sizes(processor, max_length)")
    if (given := method(processor, max_length)) is None:
        return unknown
    sizes = np.asarray(given)
    if sizes.shape != unknown.shape or sizes.dtype.kind not in "iu":
        raise UserError(
            f"{name}: sizes() must give integers ({len(dataset)}, 3), tokens, pictures and poses of each row, or None; "
            f"found {sizes.dtype} {sizes.shape}"
        )
    sizes = sizes.astype(np.int64)
    known = sizes[:, 0] >= 0
    if wrong := np.flatnonzero(known & ((sizes < [1, 0, 0]).any(axis=1) | (sizes[:, 0] > max_length))).tolist():
        raise UserError(
            f"{name}: sizes() gives {sizes[wrong[0]].tolist()} tokens, pictures and poses for row {wrong[0]}; "
            f"expected 1 to {max_length} tokens"
        )
    return np.where(known[:, None], sizes, -1)

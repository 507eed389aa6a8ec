"""Sizes of rows, by which an epoch is planned: from the data set if it knows them, else by reading the text of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chatpose_jax.data.collate import measure_example
from chatpose_jax.data.example import Example, rows_in_turn
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import NO_TOWER, Processor


def measure(dataset: Sequence[Example], processor: Processor, max_length: int) -> np.ndarray:
    """(N, 3) integers: tokens, images and poses of all rows.

    Rows whose sizes the data set does not know (``known_sizes``) are read. No image is opened.

    Raises UserError for a malformed row.
    """
    sizes = known_sizes(dataset, processor, max_length)
    unknown = np.flatnonzero(sizes[:, 0] < 0)
    if unknown.size:
        sizes[unknown] = measure_rows(dataset, processor, max_length, unknown)
    return sizes


def measure_rows(
    dataset: Sequence[Example], processor: Processor, max_length: int, rows: Sequence[int] | np.ndarray
) -> np.ndarray:
    """(K, 3) int64: the same of the given rows, which are read."""
    found = [measure_example(processor, row, max_length) for row in rows_in_turn(dataset, map(int, rows))]
    return np.array(found, np.int64).reshape(-1, 3)


def demand_sight(dataset: Sequence[Example], processor: Processor, sizes: np.ndarray) -> None:
    """Raises UserError, which names a row and its source, if rows of these sizes have images and the model has no vision tower."""
    seen = np.flatnonzero(np.asarray(sizes)[:, 1])
    if processor.ids.num_patches or not seen.size:
        return
    raise UserError(
        f"{dataset[int(seen[0])].place} has an image, as {seen.size} of the {len(sizes)} rows have, and {NO_TOWER}: leave this source out of "
        "data.sources, choose rows without images by its options, or start from a base with a tower (chatpose convert BASE OUT --vision FOLDER)"
    )


def known_sizes(dataset: Sequence[Example], processor: Processor, max_length: int) -> np.ndarray:
    """(N, 3) integers: tokens, images and poses of each row, as the data set knows them; -1 where it does not.

    A data set may have a method ``sizes(processor, max_length)`` that gives such an array, or None. It counts what ``processor`` gives for a
    row that is cut at ``max_length`` tokens.

    Raises UserError where the method gives anything else.
    """
    shape = (len(dataset), 3)
    method = getattr(dataset, "sizes", None)
    name = getattr(dataset, "where", f"the data set {type(dataset).__name__}")
    if method is not None and not callable(method):
        raise UserError(f"{name}: its attribute 'sizes' must be a method, sizes(processor, max_length)")
    given = None if method is None else method(processor, max_length)
    if given is None:
        return np.full(shape, -1, np.int64)
    sizes = np.asarray(given)
    if sizes.shape != shape or sizes.dtype.kind not in "iu":
        raise UserError(
            f"{name}: sizes() must give integers ({len(dataset)}, 3), tokens, images and poses of each row, or None; "
            f"found {sizes.dtype} {sizes.shape}"
        )
    known = sizes[:, 0] >= 0
    if wrong := np.flatnonzero(known & ((sizes < [1, 0, 0]).any(axis=1) | (sizes[:, 0] > max_length))).tolist():
        raise UserError(
            f"{name}: sizes() gives {sizes[wrong[0]].tolist()} tokens, images and poses for row {wrong[0]}; "
            f"expected 1 to {max_length} tokens"
        )
    return sizes if known.all() else np.where(known[:, None], sizes, np.int64(-1))

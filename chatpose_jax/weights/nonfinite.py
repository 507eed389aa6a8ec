"""Checks every block of weights for NaN and infinities while it is read. They are an error unless they are allowed."""

from __future__ import annotations

import dataclasses
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from chatpose_jax.errors import UserError
from chatpose_jax.weights.leaves import Leaf, all_finite
from chatpose_jax.weights.readers import Index

Count = tuple[int, int]
"""The number of NaN, and of infinities."""


class Nonfinite:
    """Counts the non-finite values of leaves while they are read. ``counts``: by source tensor, or by leaf if it has no source tensor."""

    def __init__(self, *, allowed: bool):
        self.allowed = allowed
        self.counts: dict[str, Count] = {}
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def watched(self, leaf: Leaf) -> Leaf:
        """The same leaf, whose values are counted while they are read. Unless non-finite values are allowed, its ``read`` raises UserError at the
        first block that has any.
        """
        self._names.update(leaf.names or (leaf.path,))

        def read(index: Index) -> np.ndarray:
            values = leaf.read(index)
            if not all_finite(values):
                self._count(leaf, values, index)
            return values

        return dataclasses.replace(leaf, read=read)

    def _count(self, leaf: Leaf, values: np.ndarray, index: Index) -> None:
        layers = range(*index[0].indices(leaf.shape[0])) if leaf.stacked else (0,)
        for layer, part in zip(layers, values if leaf.stacked else (values,)):
            count = int(np.isnan(part).sum()), int(np.isinf(part).sum())
            if not any(count):
                continue
            name = leaf.names[layer] if leaf.names else leaf.path
            if not self.allowed:
                raise UserError(
                    f"{name}: {describe_nonfinite(count)} in the first {part.size} values that were read; expected finite weights, because "
                    "a model with others cannot answer. Fetch the weights again, or convert them as they are with --allow-nonfinite "
                    "(allow_nonfinite=True in Python), which counts such values in all tensors"
                )
            with self._lock:
                nan, inf = self.counts.get(name, (0, 0))
                self.counts[name] = nan + count[0], inf + count[1]

    def gather(self) -> None:
        """Adds up the counts of all processes. Every process calls it after everything is read."""
        if jax.process_count() == 1:
            return
        names = sorted(self._names)
        found = np.array([self.counts.get(name, (0, 0)) for name in names], np.int32)
        found = multihost_utils.process_allgather(found).sum(0)
        self.counts = {name: (int(nan), int(inf)) for name, (nan, inf) in zip(names, found) if nan or inf}


def describe_nonfinite(count: Count) -> str:
    """``3 NaN, 1 infinite``."""
    return ", ".join(f"{number} {kind}" for number, kind in zip(count, ("NaN", "infinite")) if number)

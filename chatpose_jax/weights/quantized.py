"""Conversion to int8 or int4: the decoder's projections are quantised as they are read, a few columns at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.quantize import QUANTIZATIONS, Quantization, nbytes
from chatpose_jax.weights.leaves import Leaf
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.readers import Index, bounded

_COLUMNS = 1024
"""Number of output channels in memory at once, in float32: 57 MB for the widest input of the 13B model."""


def quantized(config: ModelConfig, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Replaces the kernels of the decoder's layers as ``config.quantize`` says: by codes, with a leaf of scales beside. Both are computed from the
    values after the cast to the leaf's dtype. See ``models.quantize``.
    """
    quantization = QUANTIZATIONS[config.quantize]
    tree = by_path(abstract_params(config))
    result = {path: leaves[path] for path in tree if path in leaves}
    for path, target in tree.items():
        if target.dtype == quantization.codes:
            scale = quantization.scale_path(path)
            result[path] = _codes(leaves[path], quantization)
            result[scale] = _scale(scale, tree[scale], leaves[path], quantization)
    return {path: result[path] for path in tree}


def _codes(leaf: Leaf, quantization: Quantization) -> Leaf:
    def read(index: Index) -> np.ndarray:
        layers, rows, columns = index = bounded(index, leaf.shape)
        out = np.empty([part.stop - part.start for part in index], quantization.codes)
        for layer, part, values in _pieces(leaf, layers, columns, quantization.codes):
            out[layer, :, part] = quantization(values)[0][rows]
        return out

    return dataclasses.replace(leaf, dtype=quantization.codes, read=read)


def _scale(path: str, target: Any, leaf: Leaf, quantization: Quantization) -> Leaf:
    """The scales (L, out) or (L, groups, out) of a stacked kernel."""
    dtype = np.dtype(target.dtype)

    def read(index: Index) -> np.ndarray:
        layers, *groups, columns = index = bounded(index, target.shape)
        out = np.empty([part.stop - part.start for part in index], dtype)
        for layer, part, values in _pieces(leaf, layers, columns, quantization.codes):
            out[layer, ..., part] = quantization.measure(values)[tuple(groups)]
        return out

    def origin(index: Index) -> tuple[str, int]:
        return leaf.origin((index[0], slice(0, leaf.shape[1]), index[-1]))

    cost = leaf.nbytes // nbytes(target)
    return Leaf(path, tuple(target.shape), dtype, read, -1, True, leaf.names, cost, origin)


def _pieces(leaf: Leaf, layers: slice, columns: slice, what: np.dtype) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Layer, columns (relative to the box) and values (in, n) of a stacked kernel, with the whole input axis, which a scale needs."""
    for layer in range(layers.start, layers.stop):
        for start in range(columns.start, columns.stop, _COLUMNS):
            stop = min(start + _COLUMNS, columns.stop)
            values = leaf.read((slice(layer, layer + 1), slice(0, leaf.shape[1]), slice(start, stop)))[0]
            if not np.isfinite(values).all():
                raise UserError(
                    f"{leaf.path}, layer {layer}: NaN or infinite values, which {what} cannot hold; fetch the weights again"
                )
            yield layer - layers.start, slice(start - columns.start, stop - columns.start), values

"""Conversion to int8: the decoder's projections are quantised as they are read, a few columns at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.quantize import int8_scale, quantize_int8
from chatpose_jax.weights.leaves import Leaf
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.readers import Index, bounded

_COLUMNS = 1024
"""Number of output channels in memory at once, in float32: 57 MB for the widest input of the 13B model."""
_SCALE = "_scale"


def quantized(config: ModelConfig, leaves: Mapping[str, Leaf]) -> tuple[ModelConfig, dict[str, Leaf]]:
    """Replaces the kernels of the decoder's layers by int8 kernels with a ``kernel_scale``. Both are computed from the values after the cast to the
    leaf's dtype. See ``models.quantize.quantize_int8``.
    """
    config = config.replace(quantize="int8")
    result = {}
    for path, target in by_path(abstract_params(config)).items():
        if path.endswith("/kernel" + _SCALE):
            result[path] = _scale(path, leaves[path.removesuffix(_SCALE)])
        elif target.dtype == np.int8:
            result[path] = _kernel(leaves[path])
        else:
            result[path] = leaves[path]
    return config, result


def _kernel(leaf: Leaf) -> Leaf:
    def read(index: Index) -> np.ndarray:
        layers, rows, columns = index = bounded(index, leaf.shape)
        out = np.empty([part.stop - part.start for part in index], np.int8)
        for layer, part, values in _pieces(leaf, layers, columns):
            out[layer, :, part] = quantize_int8(values)[0][rows]
        return out

    return dataclasses.replace(leaf, dtype=np.dtype(np.int8), read=read)


def _scale(path: str, leaf: Leaf) -> Leaf:
    shape = (leaf.shape[0], leaf.shape[2])

    def read(index: Index) -> np.ndarray:
        layers, columns = index = bounded(index, shape)
        out = np.empty([part.stop - part.start for part in index], np.float32)
        for layer, part, values in _pieces(leaf, layers, columns):
            out[layer, part] = int8_scale(values)
        return out

    def origin(index: Index) -> tuple[str, int]:
        return leaf.origin((index[0], slice(0, leaf.shape[1]), index[1]))

    cost = leaf.nbytes // (4 * math.prod(shape))
    return Leaf(path, shape, np.dtype(np.float32), read, 1, True, leaf.names, cost, origin)


def _pieces(leaf: Leaf, layers: slice, columns: slice) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Layer, columns (relative to the box) and values (in, n) of a stacked kernel, with the whole input axis, which a scale needs."""
    for layer in range(layers.start, layers.stop):
        for start in range(columns.start, columns.stop, _COLUMNS):
            stop = min(start + _COLUMNS, columns.stop)
            values = leaf.read((slice(layer, layer + 1), slice(0, leaf.shape[1]), slice(start, stop)))[0]
            if not np.isfinite(values).all():
                raise UserError(
                    f"{leaf.path}, layer {layer}: NaN or infinite values, which int8 cannot hold; fetch the weights again"
                )
            yield layer - layers.start, slice(start - columns.start, stop - columns.start), values

"""Conversion to int8: the decoder's projections are quantised as they are read, a few columns at a time."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.quantize import int8_scale, quantize_int8
from chatpose_jax.weights.leaves import Leaf
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.plan import Plan
from chatpose_jax.weights.readers import Index

_COLUMNS = 1024
"""Output channels in memory at once, as float32: 57 MB of the 13B model's widest input."""
_SCALE = "_scale"


def quantized(plan: Plan) -> Plan:
    """The same conversion with ``quantize="int8"``: kernels of the decoder's layers as int8 beside ``kernel_scale``, from the values that
    ``plan`` would have written (so after its cast). See ``models.quantize.quantize_int8``."""
    config = plan.config.replace(quantize="int8")
    leaves = {}
    for path, target in by_path(abstract_params(config)).items():
        if path.endswith("/kernel" + _SCALE):
            leaves[path] = _scale(path, plan.leaves[path.removesuffix(_SCALE)])
        elif target.dtype == np.int8:
            leaves[path] = _kernel(plan.leaves[path])
        else:
            leaves[path] = plan.leaves[path]
    return dataclasses.replace(plan, config=config, leaves=leaves)


def _values(leaf: Leaf, layer: slice, columns: slice) -> np.ndarray:
    """(in, n) of one layer's columns, all finite: their scale takes the whole input axis."""
    values = leaf.read((layer, slice(0, leaf.shape[1]), columns))
    if not np.isfinite(values).all():
        raise UserError(
            f"{leaf.path}, layer {layer.start}: infinite or not a number, which int8 cannot hold; fetch the weights again"
        )
    return values[0]


def _pieces(layers: slice, columns: slice) -> list[tuple[slice, slice]]:
    return [
        (slice(layer, layer + 1), slice(start, min(start + _COLUMNS, columns.stop)))
        for layer in range(layers.start, layers.stop)
        for start in range(columns.start, columns.stop, _COLUMNS)
    ]


def _bounds(leaf: Leaf, index: Index) -> Index:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape, strict=True))


def _kernel(leaf: Leaf) -> Leaf:
    def read(index: Index) -> np.ndarray:
        layers, rows, columns = index = _bounds(leaf, index)
        out = np.empty([part.stop - part.start for part in index], np.int8)
        for layer, part in _pieces(layers, columns):
            place = slice(part.start - columns.start, part.stop - columns.start)
            out[layer.start - layers.start, :, place] = quantize_int8(_values(leaf, layer, part))[0][rows]
        return out

    return dataclasses.replace(leaf, dtype=np.dtype(np.int8), read=read)


def _scale(path: str, leaf: Leaf) -> Leaf:
    shape = (leaf.shape[0], leaf.shape[2])

    def read(index: Index) -> np.ndarray:
        layers, columns = (slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
        out = np.empty((layers.stop - layers.start, columns.stop - columns.start), np.float32)
        for layer, part in _pieces(layers, columns):
            place = slice(part.start - columns.start, part.stop - columns.start)
            out[layer.start - layers.start, place] = int8_scale(_values(leaf, layer, part))
        return out

    def origin(index: Index) -> tuple[str, int]:
        return leaf.origin((index[0], slice(0, leaf.shape[1]), index[1]))

    cost = leaf.nbytes // (4 * math.prod(shape))
    return Leaf(path, shape, np.dtype(np.float32), read, 1, True, leaf.names, cost, origin)

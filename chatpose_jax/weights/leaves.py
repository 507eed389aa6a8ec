"""Arrays of the parameter tree that are read on demand from source tensors."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import ml_dtypes
import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.models.quantize import nbytes
from chatpose_jax.weights.readers import Index, TensorEntry, bounded
from chatpose_jax.weights.table import NameRule, Transform

BLOCK = 16 << 20
"""Number of bytes read at once. Larger blocks cost twice the system time: the allocator returns them to the kernel each time."""
_READERS = 2


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree that is read on demand. ``read(index)`` returns any box of it (slices of step 1) in ``dtype``."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray] = dataclasses.field(repr=False)
    split_axis: int = 0
    """The axis along which boxes are contiguous in the source file."""
    stacked: bool = False
    names: tuple[str, ...] = ()
    """The source tensors that it is read from; for stacked layers one per layer."""
    cost: int = 1
    """Number of bytes to read for one byte of it."""
    origin: Callable[[Index], tuple[str, int]] = dataclasses.field(default=lambda index: ("", 0), repr=False)
    """The file and the byte offset at which a box begins."""

    @property
    def nbytes(self) -> int:
        return nbytes(self)

    def blocks(self, limit: int, chunk: tuple[int, ...], span: Index | None = None) -> Iterator[Index]:
        """Boxes that cover ``span`` (default: the whole leaf) in the source's order. Each has at most about ``limit`` bytes, and is a whole number of
        ``chunk``s from the span's start.
        """
        span = span if span is not None else tuple(slice(0, n) for n in self.shape)
        axis = self.split_axis % len(self.shape)
        layer_bytes = self.nbytes // (self.shape[0] if self.stacked else 1)
        step = max(limit * self.shape[axis] // layer_bytes // chunk[axis], 1) * chunk[axis]
        for layers in _pieces(span[0], chunk[0]) if self.stacked else (span[0],):
            for part in _pieces(span[axis], step):
                box = [layers, *span[1:]]
                box[axis] = part
                yield tuple(box)


def _pieces(whole: slice, step: int) -> list[slice]:
    return [slice(start, min(start + step, whole.stop)) for start in range(whole.start, whole.stop, step)]


def read_ahead(reads: Sequence[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """Results of calls, in order. Two threads compute ahead of the consumer; NumPy releases the GIL meanwhile."""
    reading: collections.deque[concurrent.futures.Future[np.ndarray]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        try:
            for read in reads:
                reading.append(pool.submit(read))
                if len(reading) > _READERS:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()
        finally:
            for future in reading:
                future.cancel()


def source_leaf(
    path: str, target: jax.ShapeDtypeStruct, rule: NameRule, entries: Sequence[TensorEntry | None], row_start: int
) -> Leaf:
    """The leaf that ``rule`` describes, read from ``entries``.

    entries: for stacked layers one per layer; a layer without an entry is zeros.
    row_start: first row of the source that belongs to the leaf.
    """
    shape = tuple(target.shape[1:] if rule.stacked else target.shape)
    dtype = np.dtype(target.dtype)

    first = next(entry for entry in entries if entry is not None)

    def read_layer(entry: TensorEntry | None, index: Index, out: np.ndarray) -> None:
        if entry is None:
            out[...] = 0
            return

        def read(box: Index) -> np.ndarray:
            rows = slice(box[0].start + row_start, box[0].stop + row_start) if row_start else box[0]
            return entry.read((rows, *box[1:]), borrowed=True)

        along = rule.transform.row_axis % len(shape)
        start = index[along].start
        for part in _pieces(index[along], entry.rows_at_once()):
            here = tuple(part if axis == along else each for axis, each in enumerate(index))
            values = rule.transform.read(read, shape, here)
            piece = out[(slice(None),) * along + (slice(part.start - start, part.stop - start),)]
            with np.errstate(over="ignore"):  # the next line raises an error for an overflow
                copy_array(piece, values)
            demand_finite_cast(entry.name, piece, values)

    def read(index: Index) -> np.ndarray:
        index = bounded(index, target.shape)
        out = np.empty([part.stop - part.start for part in index], dtype)
        if rule.stacked:
            for slot, layer in enumerate(range(index[0].start, index[0].stop)):
                read_layer(entries[layer], index[1:], out[slot])
        else:
            read_layer(entries[0], index, out)
        return out

    axis = -1 if rule.transform is not Transform.SAME else int(rule.stacked)

    def origin(index: Index) -> tuple[str, int]:
        entry = entries[index[0].start if rule.stacked else 0]
        if entry is None:
            return str(first.file), first.offset
        return str(entry.file), entry.position(index[axis].start + row_start)

    names = tuple(entry.name if entry is not None else "" for entry in entries)
    return Leaf(path, tuple(target.shape), dtype, read, axis, rule.stacked, names, origin=origin)


def same(leaf: Leaf, twin: Leaf) -> Leaf:
    """The leaf, whose ``read`` raises UserError where ``twin`` has other values."""

    def read(index: Index) -> np.ndarray:
        values, others = leaf.read(index), twin.read(index)
        if values.tobytes() != others.tobytes():
            raise UserError(
                f"{twin.names[0]} and {leaf.names[0]} have different values, but config.json ties them (tie_word_embeddings); the files belong to "
                "different models, or the setting is wrong"
            )
        return values

    return dataclasses.replace(leaf, read=read, cost=leaf.cost + twin.cost)


def array_leaf(path: str, array: np.ndarray) -> Leaf:
    """A leaf whose values are already in memory."""
    return Leaf(path, array.shape, array.dtype, lambda index: array[index])


_TILE = 128, 4096
"""Rows and columns of the source that ``copy_array`` transposes at once, so that they are in the cache when they are read the other way."""


def copy_array(out: np.ndarray, source: np.ndarray) -> None:
    """``out[...] = source``, cast to the dtype of ``out``. A transposed matrix is copied in tiles, which takes half the time or
    less. Equal dtypes are copied as integers, because NumPy's loops for custom float types are slow.
    """
    unit = np.dtype(f"u{out.dtype.itemsize}")
    words = out.view(unit)
    if source.ndim != 2 or source.flags.c_contiguous or not source.flags.f_contiguous:
        _cast(words, out.dtype, source)
        return
    rows, columns = _TILE
    tile = np.empty(
        (rows, columns + 64 // unit.itemsize), unit
    )  # the ends of rows keep them from the same places in the cache
    for column in range(0, source.shape[1], rows):
        for row in range(0, source.shape[0], columns):
            part = source[row : row + columns, column : column + rows]
            held = tile[: part.shape[1], : part.shape[0]]
            _cast(held, out.dtype, part.T)
            words[row : row + columns, column : column + rows] = held.T


def _cast(words: np.ndarray, dtype: np.dtype, source: np.ndarray) -> None:
    """Copies to an array of ``dtype`` that is seen as unsigned integers."""
    if source.dtype == dtype:
        words[...] = source.view(words.dtype)
    else:
        words.view(dtype)[...] = source


_PIECE = 1 << 19
"""Number of bytes compared at once, so that they are still in the cache for the second comparison."""
_WIDER = {"float16": "choose --dtype bfloat16 or float32", "bfloat16": "choose --dtype float32"}


def all_finite(values: np.ndarray) -> bool:
    """``np.isfinite(values).all()``, at the speed of memory for small float types too. NaN and infinities have an exponent of all ones, so read as
    integers they are the largest words of either sign.
    """
    unsigned, signed = (np.dtype(f"{kind}{values.dtype.itemsize}") for kind in "ui")
    infinite = np.array(np.inf, values.dtype).view(unsigned)
    negative = np.array(-np.inf, values.dtype).view(unsigned)
    words = np.ascontiguousarray(values).reshape(-1).view(unsigned)
    step = _PIECE // unsigned.itemsize
    pieces = (words[start : start + step] for start in range(0, len(words), step))
    return all(piece.max() < negative and piece.view(signed).max() < infinite.view(signed) for piece in pieces)


def demand_finite_cast(name: str, out: np.ndarray, values: np.ndarray) -> None:
    """Raises UserError if finite ``values`` became infinite when they were cast to the dtype of ``out``, whose range is smaller."""
    ends = float(ml_dtypes.finfo(out.dtype).max)
    if ends >= float(ml_dtypes.finfo(values.dtype).max) or all_finite(out):
        return
    if (~np.isfinite(out) & np.isfinite(values)).any():
        advice = _WIDER.get(out.dtype.name, "no supported dtype can hold them")
        raise UserError(f"{name}: values beyond the range of {out.dtype.name} (±{ends:g}); {advice}")

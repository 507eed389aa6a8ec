"""The location of a tensor in a file, from which any box of the tensor can be read. Only the bytes of the box are read or mapped, so resident
memory does not grow with the file.
"""

from __future__ import annotations

import dataclasses
import io
import math
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax.errors import UserError

Index = tuple[slice, ...]


def bounded(index: Index, shape: Sequence[int]) -> Index:
    """The same box with the start and stop of every slice filled in."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


_MAX_NAME = 1000
"""Largest number of characters in a tensor's name."""
_MAX_AXES = 64
"""Largest number of axes, as in NumPy and torch."""
_MAX_SIZE = 1 << 63


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """The location of one tensor. offset: in bytes from the start of ``file``. strides: in elements; ``None`` means C-contiguous."""

    name: str
    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes, without gaps between them."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored(self) -> str:
        """The name of the format in the file, for reports."""
        return self.dtype.name

    def position(self, row: int) -> int:
        """The byte offset in the file at which a row, or what is read with it, begins."""
        return self.offset + row * (self.nbytes // self.shape[0])

    def rows_at_once(self) -> int:
        """The number of rows that are best read with one call."""
        return max((1, *self.shape[:1]))

    def extent(self) -> int:
        """Number of bytes from ``offset`` to the end of the last element."""
        if math.prod(self.shape) == 0:
            return 0
        strides = self.strides or _contiguous(self.shape)
        return (sum((n - 1) * s for n, s in zip(self.shape, strides)) + 1) * self.dtype.itemsize

    def read(self, index: Index | None = None, *, borrowed: bool = False) -> np.ndarray:
        """The values under ``index`` as a new array in the stored dtype.

        index: slices with step 1, one for each axis; ``None`` for all values. borrowed: use memory of this thread, which stays valid until its next
        borrowed read.

        A box that is contiguous in the file is read with one call. For any other, the byte range from its first to its last element is mapped, and
        unmapped before the method returns.
        """
        box = bounded(index if index is not None else (slice(None),) * len(self.shape), self.shape)
        shape = tuple(max(0, part.stop - part.start) for part in box)
        if math.prod(shape) == 0:
            return np.empty(shape, self.dtype)
        strides = self.strides or _contiguous(self.shape)
        first = sum(part.start * stride for part, stride in zip(box, strides))
        span = sum((n - 1) * stride for n, stride in zip(shape, strides)) + 1
        # As unsigned integers, which NumPy copies several times faster than the custom float types.
        unit = word(self.dtype)
        if span == math.prod(shape) and _is_contiguous(shape, strides):
            values = borrow(shape, unit) if borrowed else np.empty(shape, unit)
            with self.file.open("rb", buffering=0) as file:
                _read_into(file, self.offset + first * unit.itemsize, values)
            return values.view(self.dtype)
        flat = np.memmap(self.file, dtype=unit, mode="r", offset=self.offset + first * unit.itemsize, shape=(span,))
        view = np.lib.stride_tricks.as_strided(flat, shape, [s * unit.itemsize for s in strides], writeable=False)
        return np.array(view, order="C").view(self.dtype)


def word(dtype: np.dtype) -> np.dtype:
    """The unsigned integer of the same size."""
    return np.dtype(f"u{dtype.itemsize}")


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


_own = threading.local()
_BORROWED = 32 << 20
"""Largest number of bytes that a thread keeps for borrowed reads."""


def borrow(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in memory of this thread, which is used again by the next call."""
    size = math.prod(shape) * dtype.itemsize
    if size > _BORROWED:
        return np.empty(shape, dtype)
    held = getattr(_own, "memory", None)
    if held is None or held.nbytes < size:
        held = _own.memory = np.empty(size, np.uint8)
    return held[:size].view(dtype).reshape(shape)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(n == 1 or stride == packed for n, stride, packed in zip(shape, strides, _contiguous(shape)))


def _read_into(file: io.RawIOBase, offset: int, values: np.ndarray) -> None:
    file.seek(offset)
    rest = values.reshape(-1).view(np.uint8).data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise UserError(f"{getattr(file, 'name', 'file')}: cut off: it ended while it was read; fetch it again")
        rest = rest[count:]


def demand_name(path: Path, name: Any) -> None:
    """Raises UserError if a tensor's name is not a text of at most ``_MAX_NAME`` characters. The name itself is not printed."""
    if not isinstance(name, str):
        raise UserError(f"{path}: a tensor has a {type(name).__name__} as its name; expected text")
    if len(name) > _MAX_NAME:
        raise UserError(f"{path}: a tensor's name has {len(name)} characters; expected {_MAX_NAME} at most")


def are_sizes(values: Any) -> bool:
    """Whether a shape, strides or offsets from a file are at most ``_MAX_AXES`` integers from 0 to 2^63 − 1."""
    return (
        isinstance(values, (tuple, list))
        and len(values) <= _MAX_AXES
        and all(type(n) is int and 0 <= n < _MAX_SIZE for n in values)
    )


def demand_inside(path: Path, entries: Iterable[TensorEntry], size: int) -> None:
    """Raises UserError if a tensor extends beyond the end of the file."""
    for entry in entries:
        if entry.offset + entry.extent() > size:
            raise UserError(
                f"{path}: cut off: tensor {entry.name!r} ends at byte {entry.offset + entry.extent()}, the file has {size}; fetch it again"
            )

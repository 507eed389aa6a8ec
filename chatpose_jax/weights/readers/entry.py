"""Where a tensor lies in a file, and any box of it read: just the bytes that it needs are mapped, copied out and unmapped, so
that resident memory never grows with the file."""

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
    """The same box, with whole numbers for what a slice leaves open."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


_MAX_NAME = 1000
"""Characters of a tensor's name."""
_MAX_AXES = 64
"""As many as numpy and torch have."""
_MAX_SIZE = 1 << 63


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. ``strides`` are in elements; ``None`` means C-contiguous. ``offset`` is in bytes from the
    start of ``file``."""

    name: str
    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values (not of the range they are spread over)."""
        return math.prod(self.shape) * self.dtype.itemsize

    def extent(self) -> int:
        """Bytes from ``offset`` to the end of the last element."""
        if math.prod(self.shape) == 0:
            return 0
        strides = self.strides or _contiguous(self.shape)
        return (sum((n - 1) * s for n, s in zip(self.shape, strides)) + 1) * self.dtype.itemsize

    def read(self, index: Index | None = None, *, borrowed: bool = False) -> np.ndarray:
        """The values under ``index`` (slices with step 1, one per axis; ``None`` = all) as a new array in the stored
        dtype. A ``borrowed`` one is spared fresh memory, and good until this thread borrows again.

        What is contiguous in the file is read with one call; else the byte range that spans the asked elements is mapped,
        and unmapped before returning.
        """
        box = bounded(index if index is not None else (slice(None),) * len(self.shape), self.shape)
        shape = tuple(max(0, part.stop - part.start) for part in box)
        if math.prod(shape) == 0:
            return np.empty(shape, self.dtype)
        strides = self.strides or _contiguous(self.shape)
        first = sum(part.start * stride for part, stride in zip(box, strides))
        span = sum((n - 1) * stride for n, stride in zip(shape, strides)) + 1
        # Raw unsigned words: numpy copies them several times faster than the custom float types.
        word = _word(self.dtype)
        if span == math.prod(shape) and _is_contiguous(shape, strides):
            values = _borrow(shape, word) if borrowed else np.empty(shape, word)
            with self.file.open("rb", buffering=0) as file:
                _read_into(file, self.offset + first * word.itemsize, values)
            return values.view(self.dtype)
        flat = np.memmap(self.file, dtype=word, mode="r", offset=self.offset + first * word.itemsize, shape=(span,))
        view = np.lib.stride_tricks.as_strided(flat, shape, [s * word.itemsize for s in strides], writeable=False)
        return np.array(view, order="C").view(self.dtype)


def _word(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


_own = threading.local()
_BORROWED = 32 << 20
"""Bytes that a thread keeps for reading; what is larger is given back."""


def _borrow(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
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
            raise UserError(f"{getattr(file, 'name', 'file')}: cut off while it was read; fetch it again")
        rest = rest[count:]


def demand_name(path: Path, name: Any) -> None:
    """Raises UserError for a tensor's name that is no short text; whatever else stands there is not printed."""
    if not isinstance(name, str):
        raise UserError(f"{path}: a tensor has a {type(name).__name__} as its name; expected text")
    if len(name) > _MAX_NAME:
        raise UserError(f"{path}: a tensor's name has {len(name)} characters; expected {_MAX_NAME} at most")


def are_sizes(values: Any) -> bool:
    """Whether shape, strides or offsets, as a file gives them, are few whole numbers of 0 … 2^63 − 1."""
    return (
        isinstance(values, (tuple, list))
        and len(values) <= _MAX_AXES
        and all(type(n) is int and 0 <= n < _MAX_SIZE for n in values)
    )


def demand_inside(path: Path, entries: Iterable[TensorEntry], size: int) -> None:
    """Raises UserError where a tensor ends behind the file."""
    for entry in entries:
        if entry.offset + entry.extent() > size:
            raise UserError(
                f"{path}: cut off: tensor {entry.name!r} ends at byte {entry.offset + entry.extent()}, the file has {size}; fetch it again"
            )

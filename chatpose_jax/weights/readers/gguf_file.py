"""Reads GGUF files of llama.cpp: a header with metadata and records of tensors, then the tensors, most of them quantised in blocks.

Nothing that a header says is believed: every count, length, size and offset is compared with the size of the file before memory is taken for it. The
package ``gguf`` knows the block formats and dequantises; it is imported when a file is opened.
"""

from __future__ import annotations

import dataclasses
import io
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line
from chatpose_jax.weights.readers.entry import (
    Index,
    TensorEntry,
    are_sizes,
    borrow,
    bounded,
    demand_inside,
    demand_name,
    word,
)
from chatpose_jax.weights.readers.gguf_blocks import dequantise

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_PLAIN: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
KINDS = (*_PLAIN, *_BLOCKS)
"""The types of tensors that are read, by their names in ggml."""
# Number of a metadata type → its values; 8 is a text, 9 an array.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY = 8, 9
_MAX_HEADER = 64 << 20
"""Largest size of a header in bytes. That of the largest vocabulary in use has about 20 MB."""
_MAX_TEXTS = 1 << 21
"""Largest number of texts in an array of them."""
_MAX_AXES = 4
_MAX_ALIGNMENT = 1 << 16
_GROUP = 1 << 20
"""Number of values that are dequantised at once, so that they are still in the cache when they are copied."""

Value = bool | int | float | str | list[str] | np.ndarray
"""A value of the metadata. Numbers of an array are a NumPy array."""


@dataclasses.dataclass(frozen=True)
class GGUFTensor(TensorEntry):
    """A tensor of a GGUF file. A quantised one is read as float32, dequantised a few rows at a time.

    kind: name of its type in ggml, one of ``KINDS``. heads: the number of heads whose rows llama.cpp has reordered, and ``read`` puts back; 0: none.
    """

    kind: str = "F32"
    heads: int = 0

    @property
    def stored(self) -> str:
        return self.kind if self.kind in _BLOCKS else self.dtype.name

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * _row_bytes(self.kind, self.shape[-1])

    def extent(self) -> int:
        return self.nbytes

    def position(self, row: int) -> int:
        return self.offset + row // self._unit * self._unit * (self.nbytes // self.shape[0])

    def rows_at_once(self) -> int:
        return max(_GROUP // math.prod(self.shape[1:]) // self._unit, 1) * self._unit

    def read(self, index: Index | None = None, *, borrowed: bool = False) -> np.ndarray:
        """As ``TensorEntry.read``. Dequantised values lie column after column in memory, as in a kernel, to which most are transposed."""
        box = bounded(index if index is not None else (slice(None),) * len(self.shape), self.shape)
        shape = tuple(max(0, part.stop - part.start) for part in box)
        if math.prod(shape) == 0:
            return np.empty(shape, self.dtype)
        rows, unit = box[0], self._unit
        whole = slice(rows.start // unit * unit, -(-rows.stop // unit) * unit)
        inside = slice(rows.start - whole.start, rows.stop - whole.start)
        if self.kind in _PLAIN:
            if not self.heads:
                return super().read(index, borrowed=borrowed)
            return self._in_order(super().read((whole, *box[1:])))[inside]
        gguf, (columns,) = _package(self.file), box[1:]
        size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        first, last = columns.start // size, -(-columns.stop // size)
        stored = TensorEntry(
            self.name, self.file, self.offset, np.dtype(np.uint8), (self.shape[0], self.shape[1] // size * nbytes)
        )
        width = (last - first) * size
        values_shape = (width, whole.stop - whole.start)
        out = borrow(values_shape, self.dtype) if borrowed else np.empty(values_shape, self.dtype)
        step = max(_GROUP // width // unit, 1) * unit
        for start in range(whole.start, whole.stop, step):
            part = slice(start, min(start + step, whole.stop))
            raw = self._in_order(stored.read((part, slice(first * nbytes, last * nbytes))))
            dequantise(gguf, self.kind, raw, out[:, part.start - whole.start : part.stop - whole.start])
        return out[columns.start - first * size : columns.stop - first * size, inside].T

    @property
    def _unit(self) -> int:
        """The number of rows among which llama.cpp has changed the order."""
        return self.shape[0] // self.heads if self.heads else 1

    def _in_order(self, rows: np.ndarray) -> np.ndarray:
        """Whole units of rows of the file in the order of transformers: pairs (j, j + D/2) of a head lie side by side in the file."""
        if not self.heads:
            return rows
        words = rows.view(word(rows.dtype))
        pairs = words.reshape(-1, self._unit // 2, 2, *words.shape[1:])
        return pairs.swapaxes(1, 2).reshape(words.shape).view(rows.dtype)


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """What the header of a GGUF file says."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]

    __repr__ = one_line


def read_gguf_header(path: Path) -> GGUFHeader:
    """Reads the header of a GGUF file of version 2 or 3.

    Raises UserError: the package ``gguf`` is not installed; another file, version or byte order; a truncated file; counts, sizes or offsets that the
    file does not hold; a name that occurs twice; tensors that overlap, are not aligned, or have a type that is not read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        if start[:4] != MAGIC:
            raise UserError(f"{path}: not a GGUF file: it does not begin with {MAGIC.decode()!r}; fetch it again")
        if start[4:] in [struct.pack(">I", version) for version in _VERSIONS]:
            raise UserError(
                f"{path}: a big-endian GGUF file, which is not supported; convert it again for this machine"
            )
        version = int.from_bytes(start[4:], "little")
        if len(start) < 8 or version not in _VERSIONS:
            raise UserError(
                f"{path}: GGUF of version {version}; expected 2 or 3; convert it again with a newer llama.cpp"
            )
        package = _package(path)
        header = _Reader(path, file, size)
        tensors, pairs = header.count(), header.count()
        header.demand(tensors, 32, "records of tensors")
        header.demand(pairs, 13, "values of metadata")
        metadata: dict[str, Value] = {}
        for _ in range(pairs):
            key = header.text("a key of the metadata")
            if key in metadata:
                raise UserError(f"{path}: the key {key!r} occurs twice in the metadata; the file is damaged")
            metadata[key] = header.value(key)
        records = [header.record() for _ in range(tensors)]
        end = header.position
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise UserError(
            f"{path}: general.alignment={shown(alignment)}; expected a power of two up to {_MAX_ALIGNMENT}; the file is damaged"
        )
    data = -(-end // alignment) * alignment
    entries: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in records:
        if name in entries:
            raise UserError(f"{path}: the tensor {name!r} occurs twice; the file is damaged")
        entries[name] = _entry(path, package, name, shape, kind, offset, data, alignment)
    demand_inside(path, entries.values(), size)
    before: GGUFTensor | None = None
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        if before is not None and entry.offset < before.offset + before.nbytes:
            raise UserError(
                f"{path}: tensors {before.name!r} and {entry.name!r} overlap at byte {entry.offset}; the file is damaged"
            )
        before = entry
    return GGUFHeader(metadata, entries)


def _entry(
    path: Path, package: Any, name: str, shape: tuple[int, ...], number: int, offset: int, data: int, alignment: int
) -> GGUFTensor:
    demand_name(path, name)
    names = {int(item): item.name for item in package.GGMLQuantizationType}
    if (kind := names.get(number, str(number))) not in KINDS:
        raise UserError(
            f"{path}: tensor {name!r} has type {kind}, which is not supported; expected one of {', '.join(KINDS)}"
        )
    if not are_sizes(shape) or not are_sizes((offset,)) or 0 in shape:
        raise UserError(
            f"{path}: tensor {name!r} of shape {shape} at {offset}; expected positive sizes below 2^63; the file is damaged"
        )
    if len(shape) > 2 or (kind in _BLOCKS and len(shape) < 2):
        raise UserError(
            f"{path}: tensor {name!r} of type {kind} has shape {shape}; expected a matrix{' or a vector' if kind in _PLAIN else ''}: "
            "mixtures of experts and other networks with larger tensors are not supported"
        )
    block = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]][0]
    if shape[-1] % block:
        raise UserError(
            f"{path}: rows of tensor {name!r} have {shape[-1]} values; expected a multiple of {block} for type {kind}; the file is damaged"
        )
    if offset % alignment:
        raise UserError(
            f"{path}: tensor {name!r} lies at {offset}; expected a multiple of {alignment}; the file is damaged"
        )
    return GGUFTensor(name, path, data + offset, np.dtype(_PLAIN.get(kind, np.float32)), shape, kind=kind)


class _Reader:
    """Reads the values of a header one after the other. No value is longer than what is left of the file."""

    def __init__(self, path: Path, file: io.BufferedReader, size: int):
        self.path, self.file, self.size, self.position = path, file, size, file.tell()

    def demand(self, count: int, each: int, what: str) -> None:
        """Raises UserError if what is left cannot hold ``count`` values of at least ``each`` bytes."""
        left = self.size - self.position
        if count * each > left:
            raise UserError(
                f"{self.path}: cut off or damaged: its header announces {count} {what} at byte {self.position}, the file has {left} bytes more; "
                "fetch it again"
            )
        if count * each > _MAX_HEADER - self.position:
            raise UserError(
                f"{self.path}: a header of more than {_MAX_HEADER} bytes; the file is damaged; fetch it again"
            )

    def take(self, count: int, what: str) -> bytes:
        self.demand(count, 1, f"bytes of {what}")
        taken = self.file.read(count)
        if len(taken) < count:
            raise UserError(f"{self.path}: cut off: it ended while it was read; fetch it again")
        self.position += count
        return taken

    def count(self, width: int = 8) -> int:
        return int.from_bytes(self.take(width, "its header"), "little")

    def text(self, what: str) -> str:
        raw = self.take(self.count(), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: {what} is not UTF-8 text; the file is damaged; fetch it again") from None

    def value(self, key: str) -> Value:
        kind = self.count(4)
        if kind in _SCALARS:
            return self._numbers(key, kind, 1)[0].item()
        if kind == _TEXT:
            return self.text(f"the value of {key!r}")
        if kind != _ARRAY:
            raise UserError(
                f"{self.path}: {key!r} has a value of type {kind}, which GGUF does not have; the file is damaged"
            )
        inner, count = self.count(4), self.count()
        if inner in _SCALARS:
            return self._numbers(key, inner, count)
        if inner != _TEXT:
            what = "an array of arrays" if inner == _ARRAY else f"an array of type {inner}"
            raise UserError(f"{self.path}: {key!r} is {what}; expected numbers or texts")
        self.demand(count, 8, f"texts of {key!r}")
        if count > _MAX_TEXTS:
            raise UserError(f"{self.path}: {key!r} has {count} texts; expected {_MAX_TEXTS} at most")
        return [self.text(f"a text of {key!r}") for _ in range(count)]

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        self.demand(count, dtype.itemsize, f"numbers of {key!r}")
        raw = self.take(count * dtype.itemsize, f"the value of {key!r}")
        if dtype.kind == "b" and raw.strip(b"\0\1"):
            raise UserError(f"{self.path}: {key!r} is a truth value other than 0 and 1; the file is damaged")
        return np.frombuffer(raw, dtype)

    def record(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset of a tensor."""
        name = self.text("a tensor's name")
        axes = self.count(4)
        if not 0 < axes <= _MAX_AXES:
            raise UserError(
                f"{self.path}: tensor {name[:100]!r} has {axes} axes; expected 1 to {_MAX_AXES}; the file is damaged"
            )
        sizes = np.frombuffer(self.take(8 * axes, "a tensor's shape"), "<u8").tolist()
        return name, tuple(sizes[::-1]), self.count(4), self.count()


def shown(value: Value | None) -> str:
    """A value of the metadata for an error, on one short line."""
    shown = repr(value.tolist() if isinstance(value, np.ndarray) and value.size < 20 else value).replace("\n", " ")
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def _row_bytes(kind: str, width: int) -> int:
    if kind in _PLAIN:
        return width * np.dtype(_PLAIN[kind]).itemsize
    import gguf

    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return width // size * nbytes


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"{path}: reading GGUF files needs the package gguf, which is not installed ({error}): pip install '.[gguf]' in the checkout"
        ) from None
    return gguf

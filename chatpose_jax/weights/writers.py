"""Writes safetensors files block by block, so that memory does not grow with the file."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.storage import Location, write_bytes, writing
from chatpose_jax.weights.readers import SAFETENSORS_DTYPES, Index, TensorEntry

BLOCK = 32 << 20
"""Size of a block of values in bytes."""
_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to write. ``blocks()`` yields its values in C order, in ``dtype``."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def copied(
    entry: TensorEntry, name: str | None = None, rows: Sequence[int] | None = None, dtype: np.dtype | None = None
) -> Tensor:
    """The tensor that copies one of another file, or some of its rows; cast to ``dtype`` if it is given."""
    result = entry.dtype if dtype is None else dtype

    def blocks() -> Iterator[np.ndarray]:
        if rows is not None:
            yield entry.read()[list(rows)].astype(result, copy=False)
            return
        for index in row_blocks(entry.shape, entry.dtype.itemsize):
            yield entry.read(index).astype(result, copy=False)

    shape = entry.shape if rows is None else (len(rows), *entry.shape[1:])
    return Tensor(name or entry.name, result, shape, blocks)


def row_blocks(shape: Sequence[int], itemsize: int, multiple: int = 1) -> Iterator[Index]:
    """Boxes of whole rows (first axis) that cover ``shape``, of at most about ``BLOCK`` bytes, a ``multiple`` of rows
    each."""
    if not shape:
        yield ()
        return
    rest = tuple(slice(0, n) for n in shape[1:])
    step = max(BLOCK // max(math.prod(shape[1:]) * itemsize, 1) // multiple, 1) * multiple
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])), *rest)


def write_safetensors(
    file: Location, tensors: Sequence[Tensor], on_bytes: Callable[[int], Any] = lambda count: None
) -> None:
    """Writes one file and syncs it to disk. Raises ValueError if the blocks of a tensor do not have its dtype or its size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        offsets = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with writing(file) as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors:
            written = 0
            for block in tensor.blocks():
                if block.dtype != tensor.dtype:
                    raise ValueError(f"{tensor.name}: a block of {block.dtype}, expected {tensor.dtype}")
                # As unsigned integers, because the custom float types have no buffer interface.
                out.write(np.ascontiguousarray(block).reshape(-1).view(f"u{block.dtype.itemsize}").data)
                written += block.nbytes
                on_bytes(block.nbytes)
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes were written, expected {tensor.nbytes}")


def write_sharded(
    folder: Location,
    tensors: Sequence[Tensor],
    max_shard: int,
    on_bytes: Callable[[int], Any] = lambda count: None,
    stem: str = "model",
) -> list[str]:
    """Writes ``model.safetensors``, or shards of at most ``max_shard`` bytes (or one tensor) with an index. Returns the names of the files."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors, on_bytes)
        return [f"{stem}.safetensors"]
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        write_safetensors(folder / file, shard, on_bytes)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {tensor.name: file for file, shard in zip(files, shards) for tensor in shard},
    }
    write_bytes(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return files


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str | int) -> int:
    """``"5GB"`` → 5 000 000 000, as in transformers. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"{text!r} is not a file size; expected a number of bytes, or a size such as 500MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])

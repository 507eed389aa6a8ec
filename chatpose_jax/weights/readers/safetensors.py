"""Reads safetensors files: 8 bytes with the length of a JSON header, the header, and the raw data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.weights.readers.entry import TensorEntry, are_sizes, demand_inside, demand_name

SAFETENSORS_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MAX_HEADER = 100_000_000
"""Largest size of a header in bytes; the format's own limit."""


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one ``.safetensors`` file. Raises UserError for a truncated file or an invalid header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise UserError(f"{path}: not a safetensors file: it has {size} bytes; fetch it again")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise UserError(
                f"{path}: not a complete safetensors file: its first 8 bytes give a header of {length} bytes, the file has {size}; fetch it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        records = {name: record for name, record in header.items() if name != "__metadata__"}
        entries = {name: _safetensors_entry(path, name, record, 8 + length) for name, record in records.items()}
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: the safetensors header is damaged ({type(error).__name__}: {error}); fetch it again"
        ) from None
    demand_inside(path, entries.values(), size)
    end, last = 0, ""
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset < end:
            raise UserError(
                f"{path}: tensors {last!r} and {entry.name!r} overlap at byte {entry.offset}; the header is damaged"
            )
        end, last = entry.offset + entry.nbytes, entry.name
    return entries


def _safetensors_entry(path: Path, name: str, record: Mapping[str, Any], data_start: int) -> TensorEntry:
    demand_name(path, name)
    if record["dtype"] not in SAFETENSORS_DTYPES:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise UserError(f"{path}: tensor {name!r} has dtype {record['dtype']!r}; expected one of {known}")
    dtype = np.dtype(SAFETENSORS_DTYPES[record["dtype"]])
    shape, offsets = record["shape"], record["data_offsets"]
    if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2:
        raise UserError(
            f"{path}: shape and data_offsets of tensor {name!r} are not integers from 0 to 2^63 - 1; the header is damaged"
        )
    shape, (start, stop) = tuple(shape), offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} does not have the size of bytes {start}..{stop}; the header is damaged"
        )
    return TensorEntry(name, path, data_start + start, dtype, shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table

"""Dequantises blocks of GGUF tensors, column by column, which is the order of a kernel.

The package ``gguf`` computes block by block, with 16 or 32 values to a scale. Here the values at one place of a block lie side by side for all rows,
so NumPy's loops are long, and nothing has to be transposed afterwards, in less than half the time. The types in common use are written in this way.
All others go through ``gguf``. The values are the same bit for bit: the same float32 operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_AT_ONCE = 1 << 16
"""Number of values that are dequantised at once, so that all steps find them in the cache."""


def dequantise(gguf: Any, kind: str, raw: np.ndarray, out: np.ndarray) -> None:
    """Dequantises rows.

    Args:
        gguf: the package.
        kind: the type's name in ggml.
        raw: (R, n) uint8, whole blocks of R rows.
        out: (W, R) float32, where the values are written: a column of it for each row.
    """
    number = gguf.GGMLQuantizationType[kind]
    size, nbytes = gguf.GGML_QUANT_SIZES[number]
    rows = len(raw)
    with np.errstate(all="ignore"):  # a scale may be infinite; whoever reads checks that values are finite
        if kind not in _COLUMNS:
            out[...] = gguf.dequantize(raw, number).T
            return
        blocks = np.ascontiguousarray(raw.T).reshape(-1, nbytes, rows)
        values = out.reshape(-1, size, rows)  # a view: only an axis is split
        step = max(_AT_ONCE // (size * rows), 1)
        for start in range(0, len(blocks), step):
            _COLUMNS[kind](blocks[start : start + step], values[start : start + step])


# Each takes blocks (B, bytes, R) uint8 and writes their values (B, size, R) float32.


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = _nibbles(blocks[:, 2:], 16).view(np.int8)
    codes -= np.int8(8)
    out[...] = codes
    out *= _half(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = _nibbles(blocks[:, 4:], 16)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _scaled_k(blocks, _nibbles(blocks[:, 16:], 32), out)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None, None]
    high &= np.uint8(1)
    high <<= np.uint8(4)
    codes = _nibbles(blocks[:, 48:], 32)
    codes |= high.reshape(codes.shape)
    _scaled_k(blocks, codes, out)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    high = blocks[:, 128:192].reshape(len(blocks), 2, 1, 32, -1) >> np.array([0, 2, 4, 6], np.uint8)[:, None, None]
    high &= np.uint8(3)
    high <<= np.uint8(4)
    codes = _nibbles(blocks[:, :128], 64)
    codes |= high.reshape(codes.shape)
    codes = codes.view(np.int8)
    codes -= np.int8(32)
    out[...] = codes
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values = _by_scale(out, 16)
    values *= scales[:, :, None]


_COLUMNS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _half(blocks: np.ndarray, place: int) -> np.ndarray:
    """The float16 at a byte of each block, (B, 1, R) float32."""
    halves = blocks[:, place].astype(np.uint16) | blocks[:, place + 1].astype(np.uint16) << np.uint16(8)
    return halves.view(np.float16).astype(np.float32)[:, None]


def _nibbles(packed: np.ndarray, group: int) -> np.ndarray:
    """The halves of bytes (B, n, R) as (B, 2n, R): of each group of bytes first all lower halves, then all upper ones."""
    count, _, rows = packed.shape
    packed = packed.reshape(count, -1, group, rows)
    codes = np.empty((count, packed.shape[1], 2, group, rows), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=codes[:, :, 0])
    np.right_shift(packed, np.uint8(4), out=codes[:, :, 1])
    return codes.reshape(count, -1, rows)


def _by_scale(values: np.ndarray, size: int) -> np.ndarray:
    return values.reshape(len(values), -1, size, values.shape[-1])


def _scaled_k(blocks: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """Q4_K and Q5_K: eight scales and eight offsets of six bits, 32 codes to each, in twelve bytes from the fourth on."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], 1)
    offsets = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], 1)
    out[...] = codes
    values = _by_scale(out, 32)
    values *= (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    values -= (_half(blocks, 2) * offsets.astype(np.float32))[:, :, None]

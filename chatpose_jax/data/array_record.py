"""Reads the bytes of ArrayRecord files, of which only parts are at hand: where the records are, and a record.

An ArrayRecord file is one of Riegeli (https://github.com/google/riegeli, doc/riegeli_records_file_format.md): blocks of 64 KiB that begin with a
header, and in them chunks, which pass over those headers. The last chunk has a block of its own, and says where the one before it begins. That one
says where all others begin. ``data.store.WRITER`` writes each record as one chunk that is not compressed. The hashes of chunks are not checked.
"""

from __future__ import annotations

import struct

import numpy as np

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_MAGIC = 0x71930E704FDAE05E


def tail_size(records: int) -> int:
    """Bytes at the end of a file that surely hold the places of so many records: at most 16 for each, and what fills blocks."""
    return 16 * records + 4 * _BLOCK


def offsets_of(tail: bytes, start: int) -> np.ndarray:
    """(records + 1,) int64: where the chunk of each record begins, and where the last one ends. tail: the end of an ArrayRecord file, of at least
    ``tail_size`` bytes or the whole, which begins at byte ``start`` of it. Raises ValueError where it is none, or has several records in a chunk."""
    if len(tail) < 2 * _BLOCK:
        raise ValueError("the file is cut off")
    last = _fields(records_of(tail[-_BLOCK:], start + len(tail) - _BLOCK)[0])
    if last.get(2) != _MAGIC:
        raise ValueError("no ArrayRecord file")
    footer = last.get(1, -1)
    if not start <= footer < start + len(tail):
        raise ValueError("the places of its records are not at its end")
    _, *chunks = map(_fields, records_of(tail[footer - start :], footer))
    if any(chunk.get(3) != 1 for chunk in chunks):
        raise ValueError("several records are in one chunk")
    offsets = np.array([*(chunk.get(1, 0) for chunk in chunks), footer], np.int64)
    if (np.diff(offsets) <= 0).any():
        raise ValueError("the places of its records are out of order")
    return offsets


def records_of(data: bytes, start: int) -> list[bytes]:
    """The records of the chunk that begins with ``data``, at byte ``start`` of its file. Raises ValueError where it is damaged or compressed."""
    data = _without_block_headers(data, start)
    if len(data) < _CHUNK_HEADER:
        raise ValueError("a chunk is cut off")
    _, size, _, kind, _ = struct.unpack_from("<5Q", data)
    body = data[_CHUNK_HEADER : _CHUNK_HEADER + size]
    if len(body) < max(size, 2) or kind & 0xFF != ord("r") or body[0]:
        raise ValueError("its bytes are no chunk of records, or a compressed one")
    length, place = _varint(body, 1)
    end = place + length
    found, value = [], end
    while place < end:
        size, place = _varint(body, place)
        found.append(body[value : value + size])
        value += size
    if value != len(body) or len(found) != kind >> 8:
        raise ValueError("the sizes in a chunk do not fit")
    return found


def _without_block_headers(data: bytes, start: int) -> bytes:
    parts, place = [], 0
    while place < len(data):
        within = (start + place) % _BLOCK
        end = place + _BLOCK - within
        parts.append(data[place if within else place + _BLOCK_HEADER : end])
        place = end
    return b"".join(parts)


def _fields(message: bytes) -> dict[int, int]:
    """The whole numbers of a protocol buffer, by the number of their field; other fields are passed over."""
    found, place = {}, 0
    while place < len(message):
        tag, place = _varint(message, place)
        if tag & 7 == 0:
            found[tag >> 3], place = _varint(message, place)
        elif tag & 7 == 1:
            found[tag >> 3], place = int.from_bytes(message[place : place + 8], "little"), place + 8
        elif tag & 7 == 2:
            size, place = _varint(message, place)
            place += size
        else:
            raise ValueError("the places of its records are damaged")
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The number at ``place``, and the place after it."""
    number = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise ValueError("a number in it is cut off")
        byte = data[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place

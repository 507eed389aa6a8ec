"""The files of a prepared data set: ArrayRecord shards, an index of the rows, and a description."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax.data.record import SCHEMA
from chatpose_jax.errors import UserError

DESCRIPTION, INDEX = "dataset.json", "index.npy"
KINDS = ("text", "image", "instruction")
"""The numbers of kinds in the index."""
ROW = np.dtype(
    [
        ("shard", "<u4"),
        ("record", "<u4"),
        ("conversation", "<u2"),
        ("kind", "u1"),
        ("images", "<u2"),
        ("poses", "<u2"),
        ("tokens", "<i4"),
        ("tail", "<i4"),
    ]
)
"""One row of the index. It is conversation ``conversation`` of record ``record`` of shard ``shard``.

tokens: of the whole conversation without those of images, as the tokenizer ``lengths`` of the description gives them.
tail: how many of them follow the last image or pose.
"""
WRITER = "group_size:1,uncompressed"
"""Each record can be read alone. JPEG does not get smaller, and without compression the bytes depend on no compressor's version."""
READER = "readahead_buffer_size:0,max_parallelism:0"


def shard_name(number: int, count: int) -> str:
    """The file name of a shard, ``00017-of-00312.array_record``."""
    return f"{number:05d}-of-{count:05d}.array_record"


def read_description(folder: Path) -> dict[str, Any]:
    """``dataset.json`` of a prepared folder.

    Raises UserError where it is missing or damaged, or was written by a version with another schema.
    """
    file = folder / DESCRIPTION
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no prepared data set: {DESCRIPTION} not found") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is damaged ({error}); prepare the data set again into a new folder") from None
    if not isinstance(found, dict) or "schema" not in found:
        raise UserError(f"{file} describes no prepared data set: it has no schema version")
    if found["schema"] != SCHEMA:
        raise UserError(
            f"{folder} has schema version {found['schema']!r}, this version of chatpose-jax reads {SCHEMA}; "
            "prepare the data set again into a new folder"
        )
    return found


def write_file(file: Path, data: bytes) -> None:
    """Writes a file as a whole: after a kill it has its old content or all of the new."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON with a line for each entry; equal values give equal bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()

"""The files of a prepared data set: ArrayRecord shards, an index of the rows, and a description."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax import storage
from chatpose_jax.data.record import SCHEMA
from chatpose_jax.errors import UserError
from chatpose_jax.storage import Location

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
WORK = ".unfinished"
"""Folder of what is finished so far, until the data set is complete."""
WRITER = "group_size:1,uncompressed"
"""Each record can be read alone. JPEG does not get smaller, and without compression the bytes depend on no compressor's version."""
READER = "readahead_buffer_size:0,max_parallelism:0"


def shard_name(number: int, count: int) -> str:
    """The file name of a shard, ``00017-of-00312.array_record``."""
    return f"{number:05d}-of-{count:05d}.array_record"


def read_description(folder: Location) -> dict[str, Any]:
    """``dataset.json`` of a prepared folder.

    Raises UserError where it is missing or damaged, or was written by a version with another schema.
    """
    file = folder / DESCRIPTION
    try:
        with storage.reachable(file):
            found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not folder.is_dir():
            raise UserError(f"{folder} is no prepared data set: there is no such folder") from None
        if (folder / WORK).is_dir():
            raise UserError(
                f"{folder} is not complete: the same 'chatpose data prepare' that began it continues, and writes {DESCRIPTION} at its end"
            ) from None
        raise UserError(
            f"{folder} is no prepared data set: {DESCRIPTION} not found; expected a folder that 'chatpose data prepare' wrote"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is damaged ({error}); prepare the data set again into a new folder") from None
    if not isinstance(found, dict) or "schema" not in found:
        raise UserError(f"{file} describes no prepared data set: it has no schema version")
    if found["schema"] != SCHEMA:
        raise UserError(
            f"{folder} has schema version {found['schema']!r}, this version of chatpose-jax reads {SCHEMA}; "
            "prepare the data set again into a new folder"
        )
    if fault := _fault(found):
        raise UserError(f"{file} is damaged ({fault}); copy it again, or prepare the data set again into a new folder")
    return found


_FIELDS: dict[str, type] = {"name": str, "about": dict, "options": dict, "lengths": str, "splits": dict}
_SPLIT: dict[str, type] = {
    "rows": int,
    "records": int,
    "kinds": dict,
    "skipped": dict,
    "broken": list,
    "index": dict,
    "shards": list,
}
_FILE: dict[str, type] = {"bytes": int, "sha256": str}
_SHARD: dict[str, type] = {"file": str, "records": int, **_FILE}


def _fault(found: Any) -> str:
    """What is wrong with a description, or nothing."""

    def lacking(where: str, value: Any, fields: Mapping[str, type]) -> str:
        for name, kind in fields.items():
            if not isinstance(value, dict) or not isinstance(value.get(name), kind):
                return f"{where} has no {name}"
        return ""

    if fault := lacking("it", found, _FIELDS) or lacking("about", found["about"], {"title": str, "licence": str}):
        return fault
    for split, about in found["splits"].items():
        if fault := lacking(split, about, _SPLIT) or lacking(f"index of {split}", about["index"], _FILE):
            return fault
        for shard in about["shards"]:
            if fault := lacking(f"a shard of {split}", shard, _SHARD):
                return fault
            if Path(shard["file"]).name != shard["file"]:
                return f"a shard of {split} is outside of the folder: {shard['file']!r:.80}"
    return ""


def open_index(file: Location, about: Mapping[str, Any]) -> np.ndarray:
    """(rows,) ``ROW``, mapped from a disk, or read from an object store. about: the entry of the split in the description.

    Raises OSError, and ValueError where the file is not the one that was written.
    """
    data = file.read_bytes() if storage.is_bucket(file) else None
    size = file.stat().st_size if data is None else len(data)
    if size != about["index"]["bytes"]:
        raise ValueError(f"{size} bytes instead of {about['index']['bytes']}")
    index = np.load(file, mmap_mode="r") if data is None else np.load(io.BytesIO(data))
    if index.dtype != ROW or index.shape != (about["rows"],):
        raise ValueError(f"{index.dtype} {index.shape}")
    return index


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON with a line for each entry; equal values give equal bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()

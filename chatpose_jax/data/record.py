"""``Record``: one item of a prepared data set, and its bytes in a shard."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from chatpose_jax.data.example import NO_POSES, Example, Kind
from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line
from smpl_jax.pose import Pose

Conversation = Sequence[Mapping[str, Any]]
"""Messages as in ``Example``. The n-th part ``{"type": "image"}`` of a conversation stands for the n-th image of its record."""
SCHEMA = 1
_POSE_ARRAYS = ("rotations", "betas", "translation", "measured", "has_betas", "has_translation")


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One item of a data set. It gives one row (``Example``) for each of its conversations.

    key: names the item in the original files, for example ``"000017.tar/coco/000000000036#1"``; unique in the data set.
    kind: as in ``Example``.
    conversations: one or more. Each shows all images of the record, and its answers hold one ``<POSE>`` for each pose.
    images: encoded images (JPEG, PNG), as bytes.
    poses: a ``Pose`` of batch shape (P,), NumPy arrays, in any frame and family.
    group: the sequence, motion file or clip that the item comes from. Items of one group are alike, so a group belongs to one split.
    extras: numbers, strings, tuples of strings and NumPy arrays that evaluation needs and training does not, for example joints in metres or a
        box in pixels.
    """

    key: str
    kind: Kind
    conversations: tuple[Conversation, ...]
    images: tuple[bytes, ...] = ()
    poses: Pose = NO_POSES
    group: str = ""
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    __repr__ = one_line

    def example(self, conversation: int = 0) -> Example:
        """One of its rows. Its id is the key, and from the second conversation on also ``:1``, ``:2`` …"""
        images = iter(self.images)
        messages = []
        for message in self.conversations[conversation]:
            content = message["content"]
            if not isinstance(content, str):
                content = [{**part, "image": next(images)} if part["type"] == "image" else part for part in content]
            messages.append({**message, "content": content})
        name = f"{self.key}:{conversation}" if conversation else self.key
        return Example(name, self.kind, messages, self.poses, extras=self.extras, group=self.group)


def to_bytes(record: Record) -> bytes:
    """The record as MessagePack. Equal records give equal bytes."""
    poses = record.poses
    fields = {
        "key": record.key,
        "kind": record.kind,
        "conversations": record.conversations,
        "images": record.images,
        "frame": poses.frame,
        "shape_space": poses.shape_space,
        "poses": {name: np.asarray(value) for name in _POSE_ARRAYS if (value := getattr(poses, name)) is not None},
        "group": record.group,
        "extras": dict(sorted(record.extras.items())),
    }
    return msgpack.packb(fields, default=_pack)


def from_bytes(data: bytes) -> Record:
    """Reads ``to_bytes``. Raises UserError for bytes that are no record."""
    try:
        fields = msgpack.unpackb(data, ext_hook=_unpack, use_list=False)
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in fields.pop("poses").items()}
        poses = Pose(**arrays, frame=fields.pop("frame"), shape_space=fields.pop("shape_space", None))
        return Record(**fields, poses=poses)
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise UserError(f"expected a record of a prepared data set, found other or damaged bytes ({error})") from None


def seeded(seed: int, *names: object) -> np.random.Generator:
    """Random numbers that depend only on the seed and the names, for example a record's key; not on the order of reading."""
    digest = hashlib.blake2b("\0".join(map(str, names)).encode(), digest_size=16).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, np.uint32).tolist()])


def _pack(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        array = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("<"), copy=False))
        return msgpack.ExtType(1, msgpack.packb((value.dtype.str.replace(">", "<"), value.shape, array.tobytes())))
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


def _unpack(code: int, data: bytes) -> np.ndarray:
    dtype, shape, raw = msgpack.unpackb(data, use_list=False)
    if code != 1 or np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"an array of type {dtype!r}")
    return np.frombuffer(raw, dtype).reshape(shape).copy()

"""Reads one shard of a prepared data set and collects what ``data.check`` compares: hashes, counts and sums instead of the records."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax.data import store
from chatpose_jax.data.config import Split
from chatpose_jax.data.pool import Tick
from chatpose_jax.data.readers.untrusted import image_size
from chatpose_jax.data.record import Record, from_bytes
from chatpose_jax.data.shards import local_copy
from chatpose_jax.data.synthetic.skeleton import INDEX, PARENTS, rest_joints
from chatpose_jax.errors import UserError
from chatpose_jax.processing.conversation import parse_messages
from chatpose_jax.processing.images import load_image
from chatpose_jax.settings import one_line
from chatpose_jax.storage import Location
from smpl_jax.frames import Frame
from smpl_jax.pose import SHARED, Pose, known, no_rotations

RECORD = np.dtype(
    [
        ("key", "<u8"),
        ("group", "<u8"),
        ("first_group", "<u8"),
        ("kind", "u1"),
        ("conversations", "<u2"),
        ("images", "<u2"),
        ("poses", "<u2"),
    ]
)
"""What is kept of a record: hashes of its names (0: it has none), and counts."""
ITEM = np.dtype([("hash", "<u8"), ("record", "<u4")])
"""What is kept of an image, a pose or a row: its hash, and the record of the shard that it belongs to."""
AXES = ("+x", "-x", "+y", "-y", "+z", "-z")
UP: dict[Frame, str] = {"model": "+y", "camera": "-y", "z-up": "+z"}
"""The axis that points up, of each frame."""
SHOWN = 5
"""Damaged items that are listed; all are counted."""
_CHUNK = 64  # records that are in memory at a time
_KEPT = 16  # rotations of a joint that are counted: the most frequent ones
_FACTORS = np.random.default_rng(15).integers(1, 1 << 63, (SHARED - 1, 9), np.uint64) | np.uint64(1)
_SPINE = [INDEX[name] for name in ("spine1", "spine2", "spine3", "neck", "head")]


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """A shard to read. about: its entry in ``dataset.json``."""

    folder: Location
    split: Split
    number: int
    about: Mapping[str, Any]

    __repr__ = one_line

    @property
    def file(self) -> Location:
        return self.folder / self.split / self.about["file"]


@dataclasses.dataclass
class Faults:
    """Damaged items of one sort: how many, and the first ones."""

    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)

    def add(self, item: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(item)

    def merge(self, other: Faults) -> None:
        self.count += other.count
        self.first = (self.first + other.first)[:SHOWN]


@dataclasses.dataclass
class Upright:
    """Where heads point to, seen from the pelvis, in the frame of the poses. Those whose root was not measured do not count.

    above: poses whose head is above the pelvis. axes: poses by the axis that the head is nearest to. facing: sum of the directions to which the
    root turns the body's front.
    """

    poses: int = 0
    above: int = 0
    axes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(6, np.int64))
    facing: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))

    __repr__ = one_line

    def add(self, rotations: np.ndarray, frame: Frame) -> None:
        """Rotations (N, J, 3, 3) of poses in this frame."""
        heads, up = head_directions(rotations), AXES.index(UP[frame])
        signs = 1 - 2 * (up % 2)
        self.poses += len(heads)
        self.above += int((signs * heads[:, up // 2] > 0).sum())
        nearest = np.abs(heads).argmax(1)
        down = np.take_along_axis(heads, nearest[:, None], 1)[:, 0] < 0
        self.axes += np.bincount(2 * nearest + down, minlength=6)
        self.facing += rotations[:, 0, :, 2].sum(0)

    def merge(self, other: Upright) -> None:
        self.poses += other.poses
        self.above += other.above
        self.axes += other.axes
        self.facing += other.facing


@dataclasses.dataclass
class Joints:
    """What poses of one number of joints have. measured: poses in which each joint was measured. common: the most frequent hashes of each
    joint's measured rotation; a rotation of most poses is among them."""

    measured: np.ndarray
    poses: int = 0
    betas: int = 0
    translation: int = 0
    common: list[collections.Counter[int]] = dataclasses.field(default_factory=list)

    __repr__ = one_line

    def add(self, poses: Sequence[Pose], measured: np.ndarray, hashes: np.ndarray) -> None:
        """poses: of batch shapes (P,). measured, hashes: (N, J) of all of them."""
        self.poses += len(measured)
        self.measured += measured.sum(0)
        self.betas += sum(_has(pose, "betas") for pose in poses)
        self.translation += sum(_has(pose, "translation") for pose in poses)
        self._count([collections.Counter(hashes[there, joint].tolist()) for joint, there in enumerate(measured.T)])

    def merge(self, other: Joints) -> None:
        self.poses += other.poses
        self.betas += other.betas
        self.translation += other.translation
        self.measured += other.measured
        self._count(other.common)

    def _count(self, counts: list[collections.Counter[int]]) -> None:
        total = self.common or [collections.Counter() for _ in counts]
        self.common = [collections.Counter(dict((a + b).most_common(_KEPT))) for a, b in zip(total, counts)]


@dataclasses.dataclass
class Facts:
    """What is known of one shard, or of all shards of a split.

    damage: why a shard was not read. faults: records that training refuses, images that cannot be decoded, and matrices that are no rotations.
    sizes: images by width and height.
    """

    damage: list[str] = dataclasses.field(default_factory=list)
    records: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, RECORD))
    rows: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, ITEM))
    images: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, ITEM))
    poses: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, ITEM))
    decoded: int = 0
    sizes: collections.Counter[tuple[int, int]] = dataclasses.field(default_factory=collections.Counter)
    faults: dict[str, Faults] = dataclasses.field(default_factory=lambda: collections.defaultdict(Faults))
    upright: dict[Frame, Upright] = dataclasses.field(default_factory=dict)
    joints: dict[int, Joints] = dataclasses.field(default_factory=dict)

    __repr__ = one_line

    def merge(self, other: Facts) -> None:
        """Adds all but the arrays."""
        self.damage += other.damage
        self.decoded += other.decoded
        self.sizes.update(other.sizes)
        for name, faults in other.faults.items():
            self.faults.setdefault(name, Faults()).merge(faults)
        for frame, upright in other.upright.items():
            self.upright.setdefault(frame, Upright()).merge(upright)
        for count, joints in other.joints.items():
            self.joints.setdefault(count, Joints(np.zeros(count, np.int64))).merge(joints)


@dataclasses.dataclass(frozen=True)
class Scanner:
    """Reads shards, one at a time. It is pickled to other processes.

    decode: share of the images that are decoded, chosen by their bytes. Of the others only the header is read.
    """

    decode: float = 1.0

    def __call__(self, job: ShardJob, tick: Tick) -> tuple[ShardJob, Facts]:
        try:
            with local_copy(job.file) as file:
                if not (damage := differs(file, job.about)):
                    return job, self._facts(job, file, tick)
        except FileNotFoundError:
            damage = "not found"
        tick(job.about["records"])
        return job, Facts(damage=[f"{job.file}: {damage}"])

    def _facts(self, job: ShardJob, file: Path, tick: Tick) -> Facts:
        facts, builder = Facts(), _Builder(self.decode)
        for records in _chunks(job, file, facts):
            builder.add(facts, records)
            tick(len(records))
        builder.end(facts)
        return facts


def differs(file: Path, about: Mapping[str, Any]) -> str:
    """How a file differs from the size and SHA-256 that were noted, or nothing. Raises OSError."""
    if (size := file.stat().st_size) != about["bytes"]:
        return f"{size} bytes instead of {about['bytes']}"
    with file.open("rb") as stream:
        same = hashlib.file_digest(stream, "sha256").hexdigest() == about["sha256"]
    return "" if same else "its SHA-256 differs: bytes were changed"


def _chunks(job: ShardJob, file: Path, facts: Facts) -> Iterator[list[Record | None]]:
    """The records of a shard, which is in ``file``; None for one that training would refuse."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file), store.READER)
    for start in range(0, reader.num_records(), _CHUNK):
        numbers = list(range(start, min(start + _CHUNK, reader.num_records())))
        found: list[Record | None] = []
        for number, data in zip(numbers, reader.read(numbers)):
            try:
                found.append(_valid(from_bytes(data)))
            except _INVALID as error:
                facts.faults["records"].add(f"{job.file}, record {number}: {error or type(error).__name__}")
                found.append(None)
        yield found


_INVALID = (UserError, ValueError, TypeError, KeyError, AttributeError, IndexError, StopIteration)
"""What a record of a folder from a stranger can raise, which may hold anything."""


def _valid(record: Record) -> Record:
    """The record, if training would take its rows; raises one of ``_INVALID`` otherwise."""
    names = (record.key, record.group, record.extras.get("first_group", ""))
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"names must be text, found {names!r:.200}")
    for number in range(len(record.conversations)):
        example = record.example(number)
        if not number:
            example.check()
        parse_messages(example.messages)
    return record


class _Builder:
    def __init__(self, decode: float) -> None:
        self.decode, self.count = decode, 0
        self.records: list[tuple[int, ...]] = []
        self.rows: list[tuple[int, int]] = []
        self.images: list[tuple[int, int]] = []
        self.poses: list[tuple[int, int]] = []

    def add(self, facts: Facts, records: list[Record | None]) -> None:
        bodies = _add_poses(facts, [record for record in records if record is not None])
        for record in records:
            if record is not None:
                self._add(facts, record, bodies)
            else:
                self.records.append((0, 0, 0, 0, 0, 0, 0))
            self.count += 1

    def _add(self, facts: Facts, record: Record, bodies: Mapping[int, list[int]]) -> None:
        images = [self._image(facts, record, number, data) for number, data in enumerate(record.images)]
        poses = bodies.get(id(record), [])
        self.images += [(image, self.count) for image in images]
        self.poses += [(pose, self.count) for pose in poses if pose]
        for conversation in record.conversations:
            words = [part for message in conversation for part in (message["role"], *_texts(message["content"]))]
            self.rows.append((name_hash("\0".join([*words, *map(str, images), *map(str, poses)])), self.count))
        first = record.extras.get("first_group", "")
        self.records.append(
            (
                name_hash(record.key),
                name_hash(record.group) if record.group else 0,
                name_hash(first) if first else 0,
                store.KINDS.index(record.kind),
                len(record.conversations),
                len(record.images),
                len(record.poses),
            )
        )

    def _image(self, facts: Facts, record: Record, number: int, data: bytes) -> int:
        found, where = name_hash(data), f"{record.key}, image {number}" if number else record.key
        try:
            facts.sizes[image_size(data, where)] += 1
            if found < self.decode * 2.0**64:
                facts.decoded += 1
                load_image(data, where)
        except UserError as error:
            facts.faults["images"].add(str(error))
        return found

    def end(self, facts: Facts) -> None:
        facts.records = np.array(self.records, RECORD)
        for name in ("rows", "images", "poses"):
            setattr(facts, name, np.array(getattr(self, name), ITEM))


def name_hash(name: str | bytes) -> int:
    """64 bits of a name or of the bytes of an image, never 0."""
    data = name.encode(errors="surrogatepass") if isinstance(name, str) else name
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def _texts(content: Any) -> Iterable[str]:
    return [content] if isinstance(content, str) else [part.get("text", part["type"]) for part in content]


def _add_poses(facts: Facts, records: Sequence[Record]) -> dict[int, list[int]]:
    """Counts the poses of some records in ``facts``. By ``id`` of a record, a hash of each of its poses."""
    found: dict[int, list[int]] = {}
    groups: dict[tuple[Frame, int], list[Record]] = collections.defaultdict(list)
    for record in records:
        if len(record.poses):
            groups[record.poses.frame, record.poses.num_joints].append(record)
    for (frame, count), some in groups.items():
        poses = [record.poses for record in some]
        rotations = np.concatenate([np.asarray(pose.rotations, np.float32) for pose in poses])
        owners = np.repeat(np.arange(len(some)), [len(pose) for pose in poses])
        for number, joint in no_rotations(rotations):
            facts.faults["rotations"].add(f"{some[owners[number]].key}: joint {joint}")
        measured = np.concatenate([known(pose) for pose in poses])
        if measured[:, 0].any():
            facts.upright.setdefault(frame, Upright()).add(rotations[measured[:, 0]], frame)
        joints = facts.joints.setdefault(count, Joints(np.zeros(count, np.int64)))
        joints.add(poses, measured, joint_hashes(rotations))
        bodies = body_hashes(rotations, measured)
        for number, record in enumerate(some):
            found[id(record)] = bodies[owners == number].tolist()
    return found


def _has(pose: Pose, name: str) -> int:
    """How many poses of a batch have betas, or a translation."""
    if getattr(pose, name) is None:
        return 0
    has = getattr(pose, f"has_{name}")
    return len(pose) if has is None else int(has.sum())


def joint_hashes(rotations: np.ndarray) -> np.ndarray:
    """(N, J) uint64 of rotations (N, J, 3, 3). Those that are equal to three decimals have the same."""
    return (_rounded(rotations) * _FACTORS[0]).sum(-1)


def body_hashes(rotations: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """(N,) uint64 of the 21 joints that all families have but the root: frame, yaw, fingers and joints that were not measured change nothing. 0
    where none was measured.

    rotations: (N, J, 3, 3). measured: (N, J) bool.
    """
    body, there = rotations[:, 1:SHARED], measured[:, 1:SHARED]
    hashes = (_rounded(np.where(there[..., None, None], body, np.eye(3))) * _FACTORS).sum((-1, -2))
    return np.where(there.any(1), hashes, 0).astype(np.uint64)


def _rounded(rotations: np.ndarray) -> np.ndarray:
    """(N, J, 9) whole numbers, as uint64 modulo 2⁶⁴."""
    return np.rint(rotations.reshape(*rotations.shape[:2], 9) * 1000).astype(np.int64).astype(np.uint64)


def head_directions(rotations: np.ndarray) -> np.ndarray:
    """(N, 3) unit vectors from the pelvis to the head, in the frame of the poses (N, J, 3, 3)."""
    rest, turned, place = rest_joints(), rotations[:, 0].astype(np.float64), np.zeros((len(rotations), 3))
    for joint in _SPINE:
        place = place + turned @ (rest[joint] - rest[PARENTS[joint]])
        turned = turned @ rotations[:, joint]
    return place / np.maximum(np.linalg.norm(place, axis=1, keepdims=True), 1e-9)

"""Looks for faults in prepared folders: damage, wrong frames, filler values, duplicates, and items that two splits share."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any, Literal, get_args

import numpy as np

from chatpose_jax import __version__, storage
from chatpose_jax.data import store
from chatpose_jax.data.config import Split
from chatpose_jax.data.pool import share
from chatpose_jax.data.record import Record, from_bytes
from chatpose_jax.data.scan import AXES, UP, Facts, Joints, Scanner, ShardJob, Upright, differs
from chatpose_jax.data.shards import local_copy, shards
from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line, real, whole
from chatpose_jax.storage import Location
from smpl_jax.pose import family_of

KINDS = {
    "damaged": "a file is missing, its bytes are not those that were written, or it holds records that training refuses",
    "index": "the index or dataset.json does not fit the records",
    "images": "images that cannot be decoded",
    "rotations": "matrices that are no rotations",
    "frame": "bodies of a data set are not upright in the frame that it names",
    "filler": "a joint that is marked as measured has the same rotation nearly everywhere",
    "duplicates": "equal rows, or one key twice",
    "leakage": "two splits share groups, images, poses or rows",
}
"""The kinds of findings."""
ENOUGH = 20
"""The fewest poses by which their frame, and whether a joint is constant, is judged."""
UPRIGHT, CONSTANT = 0.5, 0.9
"""A data set is upright if the heads of more than this share of its poses point up, more than to any other axis. A joint is filled in if more
than this share of its rotations are equal."""
_EDGES = [0, *(1 << power for power in range(4, 14))]
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a person should look at. kind: one of ``KINDS``. where: the folder, or two, and the split."""

    kind: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.text}"


@dataclasses.dataclass
class Part:
    """One split of a prepared folder, with all that was read of it.

    starts: (shards + 1,) the number of the first record of each shard. Items of ``facts`` have numbers of records of the split.
    """

    folder: Location
    split: Split
    name: str
    about: dict[str, Any]
    facts: Facts
    starts: np.ndarray

    __repr__ = one_line

    @property
    def where(self) -> str:
        return f"{self.folder} {self.split}"

    def record(self, number: int) -> Record:
        """Record ``number`` of the split."""
        shard = int(np.searchsorted(self.starts, number, "right")) - 1
        wanted = [(shard, number - int(self.starts[shard]))]
        return from_bytes(shards(self.folder / self.split, self.about["shards"]).read(wanted)[0])


def check_folders(
    folders: Sequence[str | PathLike[str]], *, workers: int = 1, decode: float = 1.0, progress: bool = False
) -> dict[str, Any]:
    """Checks prepared folders, each alone and all against each other.

    Memory grows by about 70 bytes for each record and pose, because their hashes are compared at the end; records themselves are read in turn.

    Args:
        folders: prepared folders.
        workers: processes that read. The result does not depend on their number.
        decode: share of the images that are decoded completely; of the others the header is read.
        progress: show a progress bar.

    Returns:
        A report that JSON can hold: "folders", with what each split holds, and "findings", a list of ``Finding`` as dictionaries.

    Raises:
        UserError where a folder is no prepared data set.
    """
    whole("workers", workers, 1)
    real("decode", decode, lambda value: 0 <= value <= 1, "from 0 to 1")
    paths = [storage.location(os.path.expanduser(folder)) for folder in folders]
    if len({storage.absolute(path) for path in paths}) < len(paths):
        raise UserError("a folder is given twice; name each once")
    descriptions = {path: store.read_description(path) for path in paths}
    parts = _read(descriptions, Scanner(decode), workers, progress)
    findings = [finding for part in parts for finding in _of_part(part)]
    findings += [finding for path in paths for finding in _keys([part for part in parts if part.folder == path])]
    findings += [finding for a, b in itertools.combinations(parts, 2) for finding in _between(a, b)]
    return {
        "version": __version__,
        "decoded": decode,
        "folders": {
            str(path): {
                "name": found["name"],
                "about": found["about"],
                "splits": {part.split: _summary(part) for part in parts if part.folder == path},
            }
            for path, found in descriptions.items()
        },
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def _read(descriptions: dict[Location, dict[str, Any]], scanner: Scanner, workers: int, progress: bool) -> list[Part]:
    from tqdm import tqdm

    jobs, splits = [], []
    for folder, found in descriptions.items():
        for split in get_args(Split):
            if about := found["splits"].get(split):
                splits.append((folder, split, found["name"], about))
                jobs += [ShardJob(folder, split, number, shard) for number, shard in enumerate(about["shards"])]
    done: dict[tuple[Location, str, int], Facts] = {}
    with (
        tqdm(
            total=sum(job.about["records"] for job in jobs),
            unit="record",
            unit_scale=True,
            disable=not progress,
            dynamic_ncols=True,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
        ) as bar,
        contextlib.closing(share(scanner, jobs, workers, lambda count: bar.update(count - bar.n))) as found_facts,
    ):
        for job, facts in found_facts:
            done[job.folder, job.split, job.number] = facts
    parts = []
    for folder, split, name, about in splits:
        shards = [done.pop((folder, split, number)) for number in range(len(about["shards"]))]
        parts.append(_joined(folder, split, name, about, shards))
    return parts


def _joined(folder: Location, split: Split, name: str, about: dict[str, Any], shards: list[Facts]) -> Part:
    total = Facts()
    starts = np.cumsum([0, *(len(facts.records) for facts in shards)])
    for facts in shards:
        total.merge(facts)
    total.records = np.concatenate([facts.records for facts in shards])
    for items in ("rows", "images", "poses"):
        for start, facts in zip(starts, shards):
            getattr(facts, items)["record"] += np.uint32(start)
        setattr(total, items, np.concatenate([getattr(facts, items) for facts in shards]))
    return Part(folder, split, name, about, total, starts)


def _of_part(part: Part) -> Iterator[Finding]:
    facts = part.facts
    for damage in facts.damage:
        yield Finding(
            "damaged", part.where, f"{damage}. Copy it again, or prepare the data set again into a new folder"
        )
    yield from _index(part)
    words = {
        "records": ("damaged", "records cannot be trained on"),
        "images": ("images", "images cannot be decoded"),
        "rotations": ("rotations", "matrices are no rotations"),
    }
    for name, faults in facts.faults.items():
        kind, what = words[name]
        more = f" and {faults.count - len(faults.first)} more" if faults.count > len(faults.first) else ""
        yield Finding(kind, part.where, f"{faults.count:,} {what}: {'; '.join(faults.first)}{more}")
    for frame, upright in facts.upright.items():
        if verdict := judge(frame, upright):
            yield Finding("frame", part.where, verdict)
    for joints in facts.joints.values():
        for joint, share_of in constant(joints):
            yield Finding(
                "filler",
                part.where,
                f"{joint_name(len(joints.measured), joint)} (joint {joint}) has the same rotation in {share_of:.0%} of the poses in "
                "which it is marked as measured. If nobody measured it, its reader should say so; training pulls it to this value",
            )
    rows = np.unique(facts.rows)  # variants of one record may be equal: there are few ways to ask
    if again := _repeated(rows["hash"]):
        yield Finding(
            "duplicates",
            part.where,
            f"{again:,} rows ({again / len(facts.rows):.2%}) are equal to one of another record in text, images and poses; e.g. {_twins(part, rows)}",
        )


def _index(part: Part) -> Iterator[Finding]:
    file = part.folder / part.split / store.INDEX
    try:
        with local_copy(file) as copy:
            damage = differs(copy, part.about["index"])
            index = np.empty(0, store.ROW) if damage else np.load(copy, mmap_mode="r")
    except OSError as error:
        damage = error.strerror or "cannot be read"
    if damage:
        yield Finding("damaged", part.where, f"{file}: {damage}")
        return
    records = part.facts.records
    if part.facts.damage or "records" in part.facts.faults:
        return  # there are rows that cannot be compared
    counts = records["conversations"].astype(np.int64)
    owners = np.repeat(np.arange(len(records)), counts)
    shards = np.searchsorted(part.starts, owners, "right") - 1
    wanted = {
        "shard": shards,
        "record": owners - part.starts[shards],
        "conversation": np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts),
        **{name: records[name][owners] for name in ("kind", "images", "poses")},
    }
    if len(index) != len(owners) or part.about["rows"] != len(index) or part.about["records"] != len(records):
        yield Finding(
            "index", part.where, f"{len(owners):,} rows of {len(records):,} records were read; the index has {len(index):,}"
            f" rows, dataset.json {part.about['rows']:,} of {part.about['records']:,}",
        )  # fmt: skip
        return
    for name, values in wanted.items():
        if wrong := int((index[name] != values).sum()):
            yield Finding("index", part.where, f"{name} of {wrong:,} rows is not that of their records")


def judge(frame: str, upright: Upright) -> str:
    """What is wrong with the frame of poses, or nothing. Few poses are not judged."""
    if upright.poses < ENOUGH:
        return ""
    shares = dict(zip(AXES, upright.axes / upright.poses))
    most, up = max(AXES, key=lambda axis: shares[axis]), UP[frame]  # type: ignore[index]
    if shares[up] > UPRIGHT or most == up:
        return ""
    opposite = AXES[AXES.index(up) ^ 1]
    named = [name for name, axis in UP.items() if axis == most]
    said = f"heads are above the pelvis in {upright.above / upright.poses:.0%} of {upright.poses:,} poses in the frame {frame!r}"
    if shares[most] <= UPRIGHT:
        return f"{said}, and point to no axis in particular: the people lie, or the root is relative to something that moves"
    pointing = f"{said}; {shares[most]:.0%} point to {most}"
    if named:
        return f"{pointing}, which is up in {named[0]!r}: the reader should say frame={named[0]!r}, or turn the root to {frame!r}"
    if most == opposite:
        return f"{pointing}: they are upside down, as after a turn by 180° too much"
    if most in ("+x", "-x"):
        return f"{pointing}: they lie on the side; images that are stored turned by 90° look like this, or a camera's roll that was not removed"
    return f"{pointing}: they lie on the back or the front, as after a turn by 90° about x in the wrong sense"


def constant(joints: Joints) -> list[tuple[int, float]]:
    """The joints whose measured rotations are nearly all equal, with the share of the equal ones."""
    found = []
    for joint, (counts, measured) in enumerate(zip(joints.common, joints.measured)):
        if measured >= ENOUGH and (most := max(counts.values(), default=0) / measured) > CONSTANT:
            found.append((joint, most))
    return found


def joint_name(count: int, joint: int) -> str:
    """The name of a joint of the family with this number of joints."""
    from chatpose_jax.data.synthetic.skeleton import NAMES

    if joint < 22 or count == 24:
        return NAMES[joint]
    if count == 55 and joint < 25:
        return ("jaw", "left_eye", "right_eye")[joint - 22]
    number = joint - (count - 30)
    fingers = ("index", "middle", "pinky", "ring", "thumb")
    return f"{('left', 'right')[number // 15]}_{fingers[number % 15 // 3]}{number % 3 + 1}"


def _repeated(hashes: np.ndarray) -> int:
    return len(hashes) - len(np.unique(hashes))


def _twins(part: Part, rows: np.ndarray) -> str:
    """The keys of two records with an equal row."""
    at = int(np.flatnonzero(rows["hash"][1:] == rows["hash"][:-1])[0])  # they are in order
    keys = [part.record(int(rows["record"][place])).key for place in (at, at + 1)]
    return " and ".join(map(repr, dict.fromkeys(keys)))


def _keys(parts: Sequence[Part]) -> Iterator[Finding]:
    """Keys that a folder has twice."""
    keys = np.concatenate([part.facts.records["key"] for part in parts] or [np.empty(0, np.uint64)])
    if again := _repeated(keys[keys != 0]):
        yield Finding("duplicates", str(parts[0].folder), f"{again:,} records have the key of another one")


Shared = Literal["groups", "images", "poses", "rows"]


def _between(a: Part, b: Part) -> Iterator[Finding]:
    """What two splits share, unless they are the same split of two data sets."""
    if a.split == b.split:
        return
    common = {what: np.intersect1d(_hashes(a, what), _hashes(b, what)) for what in get_args(Shared)}
    common = {what: hashes[hashes != 0] for what, hashes in common.items()}
    if not any(map(len, common.values())):
        return
    most = next(what for what, hashes in common.items() if len(hashes))
    counts = [len(_records(part, most, common[most])) for part in (a, b)]
    shared = ", ".join(
        f"{len(hashes):,} {what[:-1] if len(hashes) == 1 else what}" for what, hashes in common.items() if len(hashes)
    )
    where = f"{a.folder} {a.split} and {b.split}" if a.folder == b.folder else f"{a.where} and {b.where}"
    examples = [_example(a, most, value) for value in common[most][:_EXAMPLES]]
    yield Finding(
        "leakage",
        where,
        f"both have {shared} (in {counts[0]:,} and {counts[1]:,} records), e.g. {', '.join(examples)}. {_reason(a, b, common)}",
    )


def _hashes(part: Part, what: Shared) -> np.ndarray:
    if what == "groups":
        return np.concatenate([part.facts.records["group"], part.facts.records["first_group"]])
    return getattr(part.facts, what)["hash"]


def _records(part: Part, what: Shared, hashes: np.ndarray) -> np.ndarray:
    """The records that have one of these groups, images, poses or rows."""
    if what == "groups":
        records = part.facts.records
        return np.flatnonzero(np.isin(records["group"], hashes) | np.isin(records["first_group"], hashes))
    items = getattr(part.facts, what)
    return np.unique(items["record"][np.isin(items["hash"], hashes)])


def _example(part: Part, what: Shared, value: np.uint64) -> str:
    """The name of a group, or the key of the first record that has an image, a pose or a row."""
    number = int(_records(part, what, np.array([value]))[0])
    try:
        record = part.record(number)
    except UserError:
        return f"record {number}"
    if what == "groups" and part.facts.records["group"][number] != value:
        return repr(record.extras["first_group"])
    return repr(record.group if what == "groups" else record.key)


def _reason(a: Part, b: Part, common: dict[str, np.ndarray]) -> str:
    if not len(common["groups"]):
        if len(common["images"]) or len(common["rows"]):
            return "The same items have other groups in the two: the reader's group does not name what they share"
        return "Poses of other groups are equal: copies under other names, or rest poses such as a T-pose"
    if a.folder == b.folder:
        return (
            "The data set is split by items and not by group: give each group to one split, by an option of the data set "
            "or in your own files, or know that this split is not clean"
        )
    if a.name == b.name:
        return "The two were prepared with different splits, for example different seeds or folds, or from two releases"
    same = (
        "the very same moments"
        if len(common["poses"]) or len(common["images"])
        else "other moments of them, or other things of these names"
    )
    return f"Both data sets are made from the same recordings ({same}), and each has its own splits: leave these groups out of the training rows"


def _summary(part: Part) -> dict[str, Any]:
    """What the report says of a split."""
    facts, about = part.facts, part.about
    tokens = _tokens(part)
    sizes = sorted(facts.sizes.items(), key=lambda item: (-item[1], item[0]))
    longest = sorted(facts.sizes, key=max)
    return {
        **{name: about[name] for name in ("rows", "records", "kinds", "skipped")},
        "broken": len(about["broken"]),
        "shards": len(about["shards"]),
        "bytes": sum(shard["bytes"] for shard in about["shards"]),
        "damaged": len(facts.damage),
        "groups": len(np.setdiff1d(facts.records["group"], [0])),
        "images": {
            "count": len(facts.images),
            "decoded": facts.decoded,
            "unreadable": facts.faults["images"].count if "images" in facts.faults else 0,
            "repeated": _repeated(facts.images["hash"]),
            "sizes": [[*size, count] for size, count in sizes[:5]],
            "smallest": list(longest[0]) if longest else None,
            "largest": list(longest[-1]) if longest else None,
        },
        "poses": {
            "count": int(facts.records["poses"].sum()),
            "repeated": _repeated(facts.poses["hash"]),
            "frames": {
                frame: {
                    "poses": upright.poses,
                    "above": upright.above / upright.poses,
                    "heads": dict(zip(AXES, (upright.axes / upright.poses).round(4).tolist())),
                    "facing": (upright.facing / upright.poses).round(4).tolist(),
                }
                for frame, upright in facts.upright.items()
            },
            "families": {
                family_of(count): {
                    "poses": joints.poses,
                    "betas": joints.betas / joints.poses,
                    "translation": joints.translation / joints.poses,
                    "unmeasured": {
                        joint_name(count, joint): 1 - float(share_of)
                        for joint, share_of in enumerate(joints.measured / joints.poses)
                        if share_of < 1
                    },
                }
                for count, joints in facts.joints.items()
            },
        },
        "repeated_rows": _repeated(facts.rows["hash"]),
        "tokens": tokens,
    }


def _tokens(part: Part) -> dict[str, Any]:
    """The histogram of lengths: bins from, below, rows."""
    try:
        tokens = store.open_index(part.folder / part.split / store.INDEX, part.about)["tokens"]
    except (OSError, ValueError, EOFError):  # it is damaged, which is another finding
        return {"bins": []}
    counts, _ = np.histogram(tokens, [*_EDGES, np.inf])
    bins = [[low, high, int(count)] for low, high, count in zip(_EDGES, [*_EDGES[1:], None], counts)]
    while bins and not bins[-1][2]:
        bins.pop()
    middle, most = (int(np.median(tokens)), int(tokens.max())) if len(tokens) else (0, 0)
    return {"bins": bins, "median": middle, "most": most}

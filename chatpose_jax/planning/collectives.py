"""Bytes that a compiled program sends over the network, read from its HLO text. (The compiler's own count includes the body of a loop only once.)"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}  # fmt: skip
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TRANSFERS = {name.upper().replace("-", "_"): name for name in KINDS} | {"ONE_TO_ONE": "collective-permute"}
"""What a TPU program says of a transfer to other slices -> kind of collective."""
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


def count(text: str, slice_chips: int = 0) -> dict[str, float]:
    """Optimised HLO text -> bytes that each chip sends inside its slice, by kind of collective. The body of a loop counts as often as the loop runs.

    In a ring of n chips each sends (n-1)/n of the array for an all-gather or a reduce-scatter, and twice that for an all-reduce. Operations with the
    same channel are parts of one collective; the largest of them counts.

    slice_chips: chips of a slice, where there are several slices and the compiler has not split the collectives between them (TPU compilers do).
    """
    return _by_kind(_walk(text, slice_chips), lambda use: use.inside)


def across(text: str, slice_chips: int) -> dict[str, float]:
    """The same, of what each chip sends to other slices.

    A collective over m chips of each of S slices is counted as the best programs do it: reduce inside each slice, exchange 1/m of the array
    between the S chips that hold the same part, gather inside each slice.
    """
    return _by_kind(_walk(text, slice_chips), lambda use: use.across)


def number(text: str, slice_chips: int = 0) -> tuple[float, float]:
    """Optimised HLO text -> numbers of collectives that a step starts inside a slice, and across slices; loops and channels as in ``count``."""
    uses = _walk(text, slice_chips).values()
    return sum(use.times for use in uses if not use.across), sum(use.times for use in uses if use.across)


class _Use(NamedTuple):
    """What a collective does in one execution of a computation: bytes that each chip sends, and how often."""

    inside: float
    across: float
    times: float


_Key = tuple[str, str, str]
"""Kind, operation and channel. A compiler may split a collective into several operations on one channel."""


def _by_kind(uses: Mapping[_Key, _Use], size: Callable[[_Use], float]) -> dict[str, float]:
    sent: collections.defaultdict[str, float] = collections.defaultdict(float)
    for (kind, *_), use in uses.items():
        sent[kind] += size(use)
    return {kind: size for kind, size in sent.items() if size}


def _walk(text: str, slice_chips: int) -> dict[_Key, _Use]:
    blocks, entry = _blocks(text)
    known: dict[str, dict[_Key, _Use]] = {}

    def most(found: dict[_Key, _Use], key: _Key, use: _Use) -> None:
        found[key] = _Use(*map(max, found.get(key, use), use))

    def total(name: str) -> dict[_Key, _Use]:
        """The same for one execution of a computation."""
        if name in known:
            return known[name]
        found = known[name] = {}
        for place, line in enumerate(blocks.get(name, [])):
            match = _INSTRUCTION.match(line)
            if match is None or match[2].endswith(("-done", "-update")):  # counted at the -start
                continue
            shape, operation = match.groups()
            kind = operation.removesuffix("-start")
            channel = _CHANNEL.search(line)
            where = channel[1] if channel else f"{name} {place}"
            if kind in KINDS:
                # Its result is cut at once: the compiler's name for a reduce-scatter.
                scatters = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                named = "reduce-scatter" if scatters else kind
                most(found, (named, kind, where), _sent(named, shape, line, slice_chips, cut=not scatters))
                continue
            if transfer := _TRANSFER.search(line) if operation == "send" else None:
                kind = _TRANSFERS.get(transfer[1], transfer[1].lower())
                most(found, (kind, operation, where), _between(kind, shape, line))
                continue
            called = _CALLED.findall(line)
            called += [("branch", name.strip(" %")) for group in _BRANCHES.findall(line) for name in group.split(",")]
            trips = _trips(line, blocks.get(dict(called).get("condition", ""), [])) if operation == "while" else 1
            for role, callee in called:
                times = trips if role == "body" else 1
                for key, use in total(callee).items():
                    most(found, key, _Use(*(times * part for part in use)))
        return found

    return total(entry)


def _trips(line: str, condition: list[str]) -> int:
    """Iterations of a loop: the compiler's annotation, else the constant of its condition ``counter < constant``; 1 where that depends on data."""
    if match := _TRIPS.search(line):
        return int(match[1])
    root = next((text for text in condition if "ROOT" in text and "direction=LT" in text), "")
    constants = dict(re.findall(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", "\n".join(condition)))
    limit = re.search(r"compare\([^,]*, %?([\w.\-]+)\)", root)
    return int(constants.get(limit[1], 1)) if limit else 1


def _blocks(text: str) -> tuple[dict[str, list[str]], str]:
    blocks: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            blocks[name] = []
            entry = name if header[1] else entry
        elif name:
            blocks[name].append(line)
    return blocks, entry


def _sent(kind: str, shape: str, line: str, slice_chips: int, cut: bool) -> _Use:
    """cut: the result of a reduce-scatter is one chip's part."""
    size, started = _size(kind, shape, line), f"{kind}-start(" in line
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
        crosses = slice_chips and any(int(a) // slice_chips != int(b) // slice_chips for a, b in pairs)
        return _Use(0, size, 1) if crosses else _Use(size, 0, 1)
    group = _group(line)
    slices = len({chip // slice_chips for chip in group}) if slice_chips else 1
    if kind == "reduce-scatter" and cut and not started:
        size *= len(group)
    everything = _share(kind, size, len(group))
    part = size if kind.endswith("all-to-all") else size * slices / max(len(group), 1)
    outside = _share(kind, part, slices)
    return _Use(everything - outside, outside, 1)


def _between(kind: str, shape: str, line: str) -> _Use:
    """What a TPU chip sends to other slices, through its host: slices exchange what is already reduced inside each."""
    size = max(_sizes(shape), default=0)
    slices = _listed(line.partition("_xla_megascale_target=")[2]) or 10**6  # not told: the most that it can be
    if kind == "collective-permute":
        return _Use(0, size, 1)
    return _Use(0, _share(kind, size * slices if kind == "all-gather" else size, slices), 1)


def _share(kind: str, size: float, members: int) -> float:
    """Bytes that each of ``members`` sends of an array of ``size`` bytes."""
    return size * (members - 1) / max(members, 1) * (2 if kind == "all-reduce" else 1)


def _listed(text: str) -> int:
    """Number of slices in a target such as ``"{1,2}x{0:3}"``: slices, and chips of each."""
    ends = [part.split(":") for part in text.partition("{")[2].partition("}")[0].split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends if end[0].isdigit() and end[-1].isdigit())


def _sizes(shape: str) -> list[float]:
    return [_BYTES.get(dtype, 0) * _elements(dims) for dtype, dims in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape))]


def _size(kind: str, shape: str, line: str) -> float:
    # An asynchronous start returns its operands too.
    only_largest = f" {kind}-start(" in line and kind != "all-reduce"
    return max(_sizes(shape), default=0) if only_largest else sum(_sizes(shape))


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _iota(sizes: str, axes: str | None) -> np.ndarray:
    """0, 1, … in this shape, with its axes in this order: how HLO writes regular groups."""
    order = [int(n) for n in axes.split(",")] if axes else None
    shape = [int(n) for n in sizes.split(",")]
    return np.arange(math.prod(shape)).reshape(shape).transpose(order)


def _group(line: str) -> list[int]:
    """The chips of one replica group, numbered as in the mesh."""
    if match := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", line):
        return _iota(*match.groups()[2:]).reshape(int(match[1]), int(match[2]))[0].tolist()  # type: ignore[no-any-return]
    if match := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", line):
        sizes = {axis: int(n) for axis, n in re.findall(r"('\w+')=(\d+)", match[1])}
        joined = {axis.strip() for axis in match[4].split(",")}
        chips = _iota(match[2] or str(math.prod(sizes.values())), match[3]).reshape(list(sizes.values()))
        return chips[tuple(slice(None) if axis in joined else 0 for axis in sizes)].reshape(-1).tolist()  # type: ignore[no-any-return]
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return [int(chip) for chip in match[1].split(",")]
    return [0]


def _elements(dims: str) -> int:
    size = 1
    for n in filter(None, dims.split(",")):
        size *= int(n)
    return size

"""Bytes that a compiled program sends over the network, read from its HLO text. (The compiler's own count includes the body of a loop only once.)"""

from __future__ import annotations

import collections
import math
import re

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
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


def count(text: str) -> dict[str, float]:
    """Optimised HLO text -> bytes that each chip sends, by kind of collective. The body of a loop counts as often as the loop runs.

    In a ring of n chips each sends (n-1)/n of the array for an all-gather or a reduce-scatter, and twice that for an all-reduce. Operations with the
    same channel are parts of one collective; the largest of them counts.
    """
    sent: collections.defaultdict[str, float] = collections.defaultdict(float)
    for (kind, _), (size, _) in _walk(text).items():
        sent[kind] += size
    return dict(sent)


def number(text: str) -> float:
    """Optimised HLO text -> number of collectives that a step starts; loops and channels as in ``count``."""
    return sum(times for _, times in _walk(text).values())


def _walk(text: str) -> dict[tuple[str, str], tuple[float, float]]:
    """(kind, channel) -> bytes that each chip sends, and number of times."""
    blocks, entry = _blocks(text)
    known: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}

    def most(
        found: dict[tuple[str, str], tuple[float, float]], key: tuple[str, str], size: float, times: float
    ) -> None:
        found[key] = tuple(map(max, found.get(key, (0.0, 0.0)), (size, times)))  # type: ignore[assignment]

    def total(name: str) -> dict[tuple[str, str], tuple[float, float]]:
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
            if kind in KINDS:
                channel = _CHANNEL.search(line)
                most(found, (kind, channel[1] if channel else f"{name} {place}"), _sent(kind, shape, line), 1)
                continue
            called = _CALLED.findall(line)
            called += [("branch", name.strip(" %")) for group in _BRANCHES.findall(line) for name in group.split(",")]
            trips = _trips(line, blocks.get(dict(called).get("condition", ""), [])) if operation == "while" else 1
            for role, callee in called:
                times = trips if role == "body" else 1
                for key, (size, often) in total(callee).items():
                    most(found, key, size * times, often * times)
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


def _sent(kind: str, shape: str, line: str) -> float:
    sizes = [_BYTES.get(dtype, 0) * _elements(dims) for dtype, dims in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape))]
    started = f" {kind}-start(" in line
    # An asynchronous start returns its operands too.
    size = max(sizes, default=0) if started and kind != "all-reduce" else sum(sizes)
    members = _members(line)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter" and not started:
        size *= members
    return size * (members - 1) / max(members, 1) * (2 if kind == "all-reduce" else 1)


def _members(line: str) -> int:
    """Number of chips in a replica group."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", match[1]))
        return math.prod(int(sizes[axis.strip()]) for axis in match[2].split(",") if axis.strip() in sizes)
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    return 1


def _elements(dims: str) -> int:
    size = 1
    for n in filter(None, dims.split(",")):
        size *= int(n)
    return size

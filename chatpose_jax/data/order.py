"""The order of rows and the plan of an epoch, worked out from numbers: no list of the rows of an epoch is made or kept.

Rows of one kind form a pool. A pack is what one row of a batch holds: a row of data, or several. A plan says which packs an epoch has by a
few ``Pattern``s; ``shuffled`` says which one comes at a place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from chatpose_jax.settings import one_line

_PASSES = 4


def key(*numbers: int | np.ndarray) -> np.ndarray:
    """uint64 that depends on all the numbers, from which a permutation follows. Arrays of numbers give arrays."""
    mixed = np.zeros((), np.uint64)
    for number in numbers:
        mixed = _mix(mixed ^ np.asarray(number).astype(np.uint64))
    return mixed


def shuffled(places: np.ndarray, sizes: int | np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where each place goes in a permutation of range(size). No permutation is stored; one place takes as long in a million rows as in ten.

    places: whole numbers below ``sizes``. keys: from ``key``; another key is another permutation. All are arrays of one shape, or numbers.

    A Feistel network over a grid of at least ``size`` cells, as near to square as can be (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains"): a place that falls outside the size is sent through again, which happens to few.
    """
    places, sizes, keys = np.broadcast_arrays(np.asarray(places, np.uint64), np.asarray(sizes, np.uint64), keys)
    side = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    other = (sizes + side - np.uint64(1)) // side
    found = np.array(places)
    outside = np.ones(found.shape, bool)
    while outside.any():
        left, right = np.divmod(found[outside], other[outside])
        for number in range(_PASSES):
            left = (left + _half(right, keys[outside], 2 * number)) % side[outside]
            right = (right + _half(left, keys[outside], 2 * number + 1)) % other[outside]
        found[outside] = left * other[outside] + right
        outside = found >= sizes
    return found.astype(np.int64)


def _half(value: np.ndarray, keys: np.ndarray, number: int) -> np.ndarray:
    """32 bits, so that no sum with a place overflows."""
    return _mix(value + keys + np.uint64(number << 32)) >> np.uint64(32)


def _mix(value: np.ndarray) -> np.ndarray:
    """The mixing function of SplitMix64 (Steele, Lea, Flood 2014); every bit of the result depends on every bit."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def taken(counts: Sequence[int], first: int) -> list[int]:
    """How many rows of each kind are among the ``first`` of all, where the kinds follow each other as evenly as their ``counts`` allow.

    None ever falls as ``first`` grows, they add up to ``first``, and where it is the number of all rows they are ``counts``.
    """
    found, rows = [], sum(counts)
    for count in counts:
        rest = (first * (rows - count) + rows // 2) // rows if count else first
        found.append(first - rest)
        first, rows = rest, rows - count
    return found


def slices(rows: int, step: int = 1 << 16) -> list[slice]:
    """Slices that hold so many rows together, to work through them with little memory."""
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class Pools:
    """The rows of each pool, and those that an epoch takes of them.

    pools: (T,) the pool of each kind of row. kinds: (N,) the kind of each row; rows of one source follow each other. draws: (rows, rows that
    an epoch takes) of each source.

    All rows of a source are taken before one is taken again. What an epoch takes of a source is spread evenly over the pools. It keeps one
    number for each row, and needs little more memory while it is made.
    """

    def __init__(
        self, pools: np.ndarray, kinds: np.ndarray, draws: Sequence[tuple[int, int]], seed: int, shuffle: bool
    ) -> None:
        self._draws, self._seed, self._shuffle = tuple(draws), seed, shuffle
        sources, ends = len(self._draws), np.cumsum([rows for rows, _ in draws])
        size = (int(pools.max()) + 1) * sources
        parts = slices(len(kinds))

        def cells(some: slice) -> np.ndarray:
            return pools[kinds[some]] * sources + np.searchsorted(ends, np.arange(some.start, some.stop), "right")

        counts = sum((np.bincount(cells(some), minlength=size) for some in parts), np.zeros(size, np.int64))
        starts = np.cumsum(counts) - counts
        self._rows = np.empty(len(kinds), np.min_scalar_type(len(kinds)))
        free = starts.copy()
        for some in parts:  # sorts by cell, and rows of a cell by number
            cell = cells(some)
            order, found = np.argsort(cell, kind="stable"), np.bincount(cell, minlength=size)
            places = np.repeat(free - np.cumsum(found) + found, found) + np.arange(len(order))
            self._rows[places] = order + some.start
            free += found
        self._counts, self._starts = counts.reshape(-1, sources), starts.reshape(-1, sources)

    @property
    def constant(self) -> bool:
        """Whether every epoch takes the same number of rows of each pool."""
        return all(share % rows == 0 for rows, share in self._draws)

    def before(self, epoch: int) -> np.ndarray:
        """(pools, sources): rows that the epochs before this one take."""
        columns = []
        for (rows, share), counts in zip(self._draws, self._counts.T):
            turns, first = divmod(epoch * share, rows)
            columns.append(turns * counts + (taken(counts.tolist(), first) if first else 0))
        return np.stack(columns, axis=1)

    def rows(
        self, epoch: int, before: np.ndarray, drawn: np.ndarray, pools: np.ndarray, places: np.ndarray
    ) -> np.ndarray:
        """(K,) the rows at places (K,) of pools (K,) in an epoch.

        before: of this epoch, as the method gives it. drawn: (pools, sources) rows that this epoch takes.
        """
        ends = np.cumsum(drawn, axis=1)[pools]
        if self._shuffle and drawn.shape[1] > 1:  # mixes the sources of a pool
            places = shuffled(places, ends[:, -1], key(self._seed, 0, epoch, pools))
        sources = (ends <= places[:, None]).sum(axis=1)
        places = places - ends[np.arange(len(pools)), sources] + drawn[pools, sources]
        counts = self._counts[pools, sources]
        turns, places = np.divmod(before[pools, sources] + places, counts)
        if self._shuffle:
            places = shuffled(places, counts, key(self._seed, 1, turns, pools, sources))
        return self._rows[self._starts[pools, sources] + places].astype(np.int64)


@dataclasses.dataclass
class Pattern:
    """Packs that are filled alike. Each of ``count`` packs takes ``times`` rows from each pool of ``parts``.

    parts: (pool, times, start): pack n takes the rows of the pool at the places from start + n * times on.
    """

    count: int
    parts: list[tuple[int, int, int]]

    __repr__ = one_line

    def split(self, count: int) -> Pattern:
        """Keeps the first ``count`` packs, and gives the others."""
        rest = Pattern(self.count - count, [(pool, times, start + count * times) for pool, times, start in self.parts])
        self.count = count
        return rest

    def places(self, number: int) -> list[tuple[int, int]]:
        """(pool, place in it) of each row of a pack."""
        return [(pool, start + number * times + i) for pool, times, start in self.parts for i in range(times)]


def fit_packs(sizes: np.ndarray, rows: np.ndarray, limits: np.ndarray) -> list[Pattern]:
    """Packs rows by best fit, the longest first: each goes into the pack where it leaves the fewest tokens free.

    Rows of one size are alike, so it takes the time of the different sizes, not of the rows.

    sizes: (T, K) tokens, images, poses of each kind of row; none is larger than ``limits`` (K,). rows: (T,) how many there are.
    """
    found: list[Pattern] = []
    room = np.empty((256, sizes.shape[1]), np.int64)
    for pool in np.lexsort(sizes.T[::-1])[::-1].tolist():
        size, left = sizes[pool], int(rows[pool])
        start = 0
        while left:
            fits = np.flatnonzero((room[: len(found)] >= size).all(axis=1))
            best = int(fits[np.argmin(room[fits, 0])]) if fits.size else len(found)
            if best == len(found):
                if best == len(room):
                    room = np.concatenate([room, np.empty_like(room)])
                found.append(Pattern(left, []))
                room[best] = limits
            pattern = found[best]
            times = min(left, int((room[best] // np.maximum(size, 1))[size > 0].min()))
            packs = min(pattern.count, left // times)
            if packs < pattern.count:
                rest = pattern.split(packs)
                if rest.parts:  # packs that exist
                    if len(found) == len(room):
                        room = np.concatenate([room, np.empty_like(room)])
                    room[len(found)] = room[best]
                    found.append(rest)
            pattern.parts.append((pool, times, start))
            room[best] -= times * size
            start, left = start + packs * times, left - packs * times
    return found


def fit_buckets(
    lengths: np.ndarray, count: int, limit: int, rows: np.ndarray | None = None, multiple: int = 16
) -> list[int]:
    """At most ``count`` padded lengths for rows of ``lengths`` (T,) that pad least in all: multiples of ``multiple``, at most ``limit``.

    rows: (T,) how many rows have each length; by default one.
    """
    rounded = np.minimum(-(-np.asarray(lengths) // multiple) * multiple, limit)
    unique, where = np.unique(rounded, return_inverse=True)
    if len(unique) > 128:  # the search takes quadratic time
        return fit_buckets(lengths, count, limit, rows, 2 * multiple)
    frequency = np.bincount(where, rows).astype(np.int64).tolist()
    values, below = unique.tolist(), np.cumsum(frequency).tolist()
    # best[j]: the least padded total of the rows up to values[j], and its buckets, of which values[j] is the last
    best = [(value * rows, [value]) for value, rows in zip(values, below)]
    for _ in range(count - 1):
        best = [
            min(
                [
                    best[j],
                    *((best[i][0] + values[j] * (below[j] - below[i]), [*best[i][1], values[j]]) for i in range(j)),
                ]
            )
            for j in range(len(values))
        ]
    return best[-1][1]

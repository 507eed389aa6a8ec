"""The order of rows is a permutation that is stored nowhere; packs and shares are exact."""

import collections
import itertools

import numpy as np
import pytest

from chatpose_jax.data.order import Pools, fit_buckets, fit_packs, key, shuffled, taken


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 12_345])
def test_every_place_has_one_row(size):
    for number in range(3):
        assert sorted(shuffled(np.arange(size), size, key(number))) == list(range(size))


def test_places_of_several_permutations_at_once():
    sizes, keys = np.array([7, 100, 100, 3]), key(4, np.arange(4))
    together = shuffled(np.array([6, 99, 0, 2]), sizes, keys)
    assert together.tolist() == [int(shuffled(p, s, k)) for p, s, k in zip([6, 99, 0, 2], sizes, keys)]
    assert int(shuffled(2**32 - 6, 2**32 - 5, key(1))) < 2**32 - 5


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_permutations_are_about_equally_likely(size):
    """4000 keys. With p = 1 / n!, a count deviates from 4000 p by sqrt(4000 p (1 - p)) = 32, 24, 13; five of them are allowed."""
    orders = shuffled(np.arange(size), size, key(9, np.arange(4000)[:, None]))
    found = collections.Counter(map(tuple, orders.tolist()))
    expected = 4000 / len(list(itertools.permutations(range(size))))
    assert len(found) == 4000 / expected
    assert max(abs(count - expected) for count in found.values()) < 5 * np.sqrt(expected * (1 - expected / 4000))


def test_neighbours_and_keys_are_independent():
    """Correlations of 200 000 pairs of independent ranks have the standard deviation 0.0022."""
    orders = shuffled(np.arange(1000), 1000, key(5, np.arange(200)[:, None]))
    for one, other in (
        (orders[:, 1:], orders[:, :-1]),
        (orders[1:], orders[:-1]),
        (orders, np.arange(1000) + 0 * orders),
    ):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.012


def test_kinds_are_spread_evenly():
    counts = [0, 5, 1, 1, 70, 0, 3]
    before = [0] * len(counts)
    for first in range(sum(counts) + 1):
        now = taken(counts, first)
        assert sum(now) == first and all(a <= b for a, b in zip(before, now))
        assert max(abs(n - first * count / 80) for n, count in zip(now, counts)) < 2
        before = now
    assert now == counts
    assert taken([1] * 20, 10) == [0, 1] * 10, "rare kinds do not all come first"


@pytest.mark.parametrize("shuffle", [False, True])
def test_no_row_of_a_source_is_taken_twice_before_all_are_taken_once(shuffle):
    """Three pools over two sources, of 30 and 11 rows; an epoch takes 7 and 25."""
    numbers = np.random.default_rng(0).integers(0, 3, 41)
    pools = Pools(np.arange(3), numbers, [(30, 7), (11, 25)], seed=1, shuffle=shuffle)
    count = np.zeros(41, int)
    orders = set()
    for epoch in range(9):
        before = pools.before(epoch)
        drawn = pools.before(epoch + 1) - before
        assert drawn.sum(0).tolist() == [7, 25]
        for pool, size in enumerate(drawn.sum(1)):
            rows = pools.rows(epoch, before, drawn, np.full(size, pool), np.arange(size))
            assert (numbers[rows] == pool).all()
            np.add.at(count, rows, 1)
            orders.add(tuple(rows))
        assert np.ptp(count[:30]) <= 1 and np.ptp(count[30:]) <= 1
    assert len(orders) > 20


def test_best_fit():
    sizes = np.array([[1, 0, 0], [3, 1, 0], [4, 0, 0], [5, 0, 0], [6, 1, 0]])

    def packs(rows, *limits):
        patterns = fit_packs(sizes, np.array(rows), np.array(limits))
        return [[pool for pool, _ in pattern.places(n)] for pattern in patterns for n in range(pattern.count)]

    assert packs([1, 1, 1, 1, 1], 10, 2, 2) == [[4, 2], [3, 1, 0]]
    assert packs([0, 2, 0, 0, 1], 10, 1, 2) == [[4], [1], [1]]
    assert packs([5, 0, 0, 3, 0], 10, 1, 2) == [[3, 3], [3, 0, 0, 0, 0, 0]]
    assert packs([0, 0, 0, 0, 0], 10, 1, 2) == []


def test_packs_hold_every_place_once_and_are_nearly_full():
    rng = np.random.default_rng(0)
    images = rng.random(20_000) < 0.3
    tokens = np.minimum(rng.lognormal(5, 0.6, 20_000).astype(int) + 20 + 400 * images, 1024)
    sizes, rows = np.unique(np.stack([tokens, images, rng.integers(0, 3, 20_000)], 1), axis=0, return_counts=True)
    limits = np.array([1024, 1, 16])
    seen: collections.Counter = collections.Counter()
    packs = 0
    for pattern in fit_packs(sizes, rows, limits):
        for number in range(pattern.count):
            places = pattern.places(number)
            assert (sizes[[pool for pool, _ in places]].sum(0) <= limits).all()
            seen.update(places)
            packs += 1
    assert seen == collections.Counter((pool, place) for pool, count in enumerate(rows) for place in range(count))
    assert packs * 1024 < 1.02 * tokens.sum()


def test_buckets_pad_least():
    lengths = np.array([20] * 50 + [40] * 5 + [100] * 20 + [200])
    assert fit_buckets(lengths, 1, 1024) == [208]
    for count in (2, 3):
        tried = itertools.combinations(range(16, 208, 16), count - 1)
        least = min(sum(min(b for b in (*cuts, 208) if b >= n) for n in lengths) for cuts in tried)
        found = fit_buckets(lengths, count, 1024)
        assert len(found) == count
        assert sum(min(b for b in found if b >= n) for n in lengths) == least
        values, rows = np.unique(lengths, return_counts=True)
        assert fit_buckets(values, count, 1024, rows) == found
    assert fit_buckets(lengths, 9, 1024) == [32, 48, 112, 208]
    assert fit_buckets(np.array([1000, 1024]), 2, 1020)[-1] == 1020
    assert len(fit_buckets(np.arange(1, 30_000), 3, 1 << 20)) == 3

"""Sources by weight: exact shares, fair turns, and an order that is a function of the seed."""

import itertools

import jax
import numpy as np
import pytest

from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.mixture import Mixture
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

SIZES = (10, 40, 30)


@pytest.fixture(scope="module")
def mixture():
    return Mixture([[(name, i) for i in range(size)] for name, size in zip("abc", SIZES)], [1, 1, 2])


def test_rows_by_index(mixture):
    assert len(mixture) == 80
    assert [mixture[i] for i in (0, 9, 10, 49, 50, 79)] == [
        ("a", 0),
        ("a", 9),
        ("b", 0),
        ("b", 39),
        ("c", 0),
        ("c", 29),
    ]
    assert mixture[8:12] == [("a", 8), ("a", 9), ("b", 0), ("b", 1)]
    for index in (80, -1):
        with pytest.raises(IndexError):
            mixture[index]


@pytest.mark.parametrize("options", [{"buckets": 1}, {"buckets": 3}, {"packing": True, "max_length": 300}])
def test_shares_are_exact_and_every_row_has_its_turn(options):
    sizes, shares = (10, 40, 30), (20, 20, 40)
    rows = Mixture([SyntheticDataset("train", size, tasks={"text": 1, "words": 1}) for size in sizes], [1, 1, 2])
    assert rows.draws == list(zip(sizes, shares))
    loader = BatchLoader(rows, tiny_processor(preset("tiny")), 4, **options)
    count = np.zeros(80, int)
    step, orders = 0, []
    for epoch in range(1, 7):
        drawn = []
        while loader._locate(step)[0] < epoch:
            drawn += [number for pack in loader.rows_of(step)[1] for number in pack if number >= 0]
            step += 1
        assert np.histogram(drawn, [0, 10, 50, 80])[0].tolist() == list(shares)
        np.add.at(count, drawn, 1)
        assert all(np.ptp(some) <= 1 for some in np.split(count, [10, 50]))
        orders.append(drawn)
    assert orders[0] != orders[2]


@pytest.mark.parametrize(("sources", "weights"), [([], []), ([[1]], [0]), ([[1], [2]], [1]), ([[1], []], [1, 1])])
def test_a_mixture_of_nothing_is_refused(sources, weights):
    with pytest.raises(UserError, match="mixture"):
        Mixture(sources, weights)


def test_batches_of_a_mixture_resume():
    processor = tiny_processor(preset("tiny"))
    rows = Mixture([SyntheticDataset("train", 12, tasks={kind: 1}) for kind in ("text", "image")], [1, 2])

    def loader():
        return BatchLoader(rows, processor, 4, buckets=1)

    whole = list(itertools.islice(loader(), 30))
    first = loader()
    list(itertools.islice(first, 17))
    second = loader()
    second.restore(first.state())
    for a, b in zip(whole[17:], second):
        jax.tree.map(np.testing.assert_array_equal, a, b)

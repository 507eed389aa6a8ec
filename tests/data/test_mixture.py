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


def test_shares_are_exact_and_every_row_has_its_turn(mixture):
    drawn = [mixture[i] for epoch in range(12) for i in mixture.epoch(epoch, seed=3)]
    for name, size, share in zip("abc", SIZES, (20, 20, 40)):
        mine = [row for source, row in drawn if source == name]
        assert len(mine) == 12 * share
        for turn in range(12 * share // size):
            assert sorted(mine[turn * size : (turn + 1) * size]) == list(range(size))


def test_an_epoch_is_a_function_of_its_number_and_the_seed(mixture):
    np.testing.assert_array_equal(mixture.epoch(5, 0), mixture.epoch(5, 0))
    assert not np.array_equal(mixture.epoch(5, 0), mixture.epoch(6, 0))
    assert not np.array_equal(mixture.epoch(5, 0), mixture.epoch(5, 1))


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

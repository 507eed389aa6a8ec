"""Which held-out rows are read, and how many."""

import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.train.held_out import READ, held_out_rows, spread
from tests.train.rows import Rows

COUNT = 128
KINDS = ("instruction", "text", "image")


def counts(groups):
    return {kind: len(group) for kind, group in groups.items()}


def test_reading_stops_where_each_kind_has_its_rows():
    rows = Rows(10_000_000, lambda index: KINDS[1 + index % 2])
    groups, read = held_out_rows(rows, COUNT)
    assert counts(groups) == {"text": COUNT, "image": COUNT}
    assert read == rows.taken < 3 * COUNT


def test_one_kind_alone_is_enough_once_no_other_was_seen():
    rows = Rows(10_000_000, lambda index: "text")
    groups, read = held_out_rows(rows, COUNT)
    assert counts(groups) == {"text": COUNT}
    assert read == rows.taken == 2 * COUNT


def test_a_kind_that_comes_last_is_found():
    """As in a mixture, whose sources stand one after the other."""
    rows = Rows(3_000_000, lambda index: KINDS[index // 1_000_000])
    groups, read = held_out_rows(rows, COUNT)
    assert counts(groups) == {"text": COUNT, "image": COUNT}
    assert read == rows.taken < 4 * COUNT
    few, _ = held_out_rows(Rows(60, lambda index: KINDS[index % 3]), COUNT)
    assert [row.id for row in few["image"]] == [f"row-{index}" for index in range(2, 60, 3)]


def test_a_rare_kind_is_looked_for_to_the_bound():
    """One row in fifty: seen among the first ones, and never enough."""
    rows = Rows(10_000_000, lambda index: KINDS[1 + (index // 100 % 50 == 0)])
    groups, read = held_out_rows(rows, COUNT)
    assert read == rows.taken == READ
    assert len(groups["text"]) == COUNT and 0 < len(groups["image"]) < COUNT


def test_many_are_found_where_many_are_wanted():
    groups, _ = held_out_rows(Rows(10_000_000, lambda index: KINDS[index % 3]), 2 * READ)
    assert counts(groups) == {"text": 2 * READ, "image": 2 * READ}


def test_indices_are_even_whenever_one_stops():
    assert spread(0, 8) == [] and spread(1, 8) == [0] and sorted(spread(5, 8)) == [0, 1, 2, 3, 4]
    places = spread(1_000_000, 1024)
    assert len(set(places)) == 1024 and min(places) == 0 and max(places) == 999_999
    for count in (16, 64, 256):
        assert np.diff(sorted(places[:count])).max() < 1.1 * 1_000_000 / count


@pytest.mark.parametrize("rows", [Rows(0, str), Rows(5000, lambda index: "instruction")])
def test_rows_without_a_pose_validate_nothing(rows):
    with pytest.raises(UserError, match="has a pose" if len(rows) else "there are no held-out rows"):
        held_out_rows(rows, COUNT)

"""Means and intervals: whole groups are drawn, columns together give what each gives alone, and intervals hold the truth as often as they say."""

import numpy as np
import pytest

from chatpose_jax.evaluation import scores
from chatpose_jax.evaluation.scores import Scores, Value, bootstrap, interval, mean_of, means_of, with_intervals


def test_columns_together_are_columns_alone():
    rng = np.random.default_rng(0)
    columns = {"a": rng.normal(3, 1, 500), "b": rng.normal(-1, 4, 500)}
    columns["b"][::7] = np.nan
    groups = [f"g{i // 9}" for i in range(500)]
    about = {"a": {"unit": "mm"}, "b": {"better": "higher", "digits": 3}}
    found = means_of(columns, groups, about)
    for name, column in columns.items():
        assert found[name] == mean_of(column, groups, **about[name])
        assert found[name].value == pytest.approx(np.nanmean(column))
        assert found[name].low < found[name].value < found[name].high
    assert (found["a"].unit, found["b"].better, found["b"].digits) == ("mm", "higher", 3)


def test_interval_of_a_mean_is_about_two_standard_errors():
    values = np.random.default_rng(1).normal(10, 2, 4000)
    found = mean_of(values, [""] * 4000)
    error = values.std() / np.sqrt(4000)
    assert found.value - found.low == pytest.approx(1.96 * error, rel=0.1)
    assert found.high - found.value == pytest.approx(1.96 * error, rel=0.1)


def test_intervals_hold_the_truth():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        level = rng.normal(0, 1, 40)  # samples of a group are alike
        values = np.repeat(level, 25) + rng.normal(0, 0.1, 1000)
        found = mean_of(values, [str(i // 25) for i in range(1000)])
        inside += found.low <= 0 <= found.high
    assert 180 <= inside <= 199
    alone = mean_of(values, [""] * 1000)
    assert found.high - found.low > 3 * (alone.high - alone.low)


def test_any_statistic_of_sums():
    rng = np.random.default_rng(3)
    rows = rng.uniform(1, 2, (300, 2))
    groups = [str(i // 10) for i in range(300)]
    low, high = bootstrap(rows, groups, lambda sums: sums[..., 0] / sums[..., 1])
    middle, lows, highs = with_intervals(
        rows, groups, lambda sums: np.stack([sums[..., 0] / sums[..., 1], sums[..., 1]], -1)
    )
    assert (low, high) == (lows[0], highs[0])
    assert middle == pytest.approx([rows[:, 0].sum() / rows[:, 1].sum(), rows[:, 1].sum()])


def test_columns_and_groups_that_say_nothing():
    found = means_of(
        {"none": np.full(4, np.nan), "one": np.array([1.0, np.nan, 2, 3])}, list("aabb"), {"none": {}, "one": {}}
    )
    assert np.isnan([found["none"].value, found["none"].low, found["none"].high]).all()
    assert found["one"].value == 2
    lone = mean_of(np.arange(5.0), ["a"] * 5)
    assert lone.value == 2
    assert np.isnan([lone.low, lone.high]).all(), "there is one group"


def test_words():
    assert interval([*"aabcdefghij"]) == "95 % bootstrap over 10 sequences"
    assert interval([""] * 10) == "95 % bootstrap over 10 samples"
    assert interval(["a", "a", ""]) == "95 % bootstrap over 2 groups; fewer than 10 give intervals that are too narrow"


def test_memory_is_bounded(monkeypatch):
    """Many groups are resampled in parts."""
    sizes = []
    random = np.random.default_rng

    class Counting:
        def __init__(self, seed):
            self.random = random(seed)

        def integers(self, count, size, dtype):
            sizes.append(size)
            return self.random.integers(count, size=size, dtype=dtype)

    monkeypatch.setattr(scores.np.random, "default_rng", Counting)
    mean_of(np.arange(50_000.0), [""] * 50_000)
    assert sum(rows for rows, _ in sizes) == scores.DRAWN
    assert all(rows * count <= 2**21 for rows, count in sizes)


def test_json():
    found = Scores("t", "T", {"protocol": "C"}, {"a": Value(1.5, 1, 2, "mm")}, {"a": np.ones(3)}, "a", counts={"x": 1})
    again = Scores.from_json(found.to_json())
    assert (again.values, again.counts, again.rank, again.samples) == (found.values, found.counts, "a", {})


def test_a_division_by_nothing_is_no_number():
    """JSON has no infinity."""
    middle, low, high = with_intervals(
        np.array([[1.0, 0], [2, 0]]), ["", ""], lambda sums: sums[..., :1] / sums[..., 1:]
    )
    assert np.isnan([middle, low, high]).all()
    middle, low, high = with_intervals(
        np.array([[1.0, 0], [2, 2]]), ["", ""], lambda sums: sums[..., :1] / sums[..., 1:]
    )
    assert middle == 1.5 and np.isfinite([low, high]).all()

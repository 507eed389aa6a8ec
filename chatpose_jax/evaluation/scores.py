"""Results of one system in one table, with 95 % intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from chatpose_jax.settings import one_line

DRAWN = 1000
"""Resamplings for an interval."""
Better = Literal["lower", "higher", ""]


@dataclasses.dataclass(frozen=True)
class Value:
    """A number of a table. low, high: its 95 % interval, NaN where there is none. unit: "mm", "degrees", "%", or "". digits: after the point."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    unit: str = ""
    better: Better = "lower"
    digits: int = 1

    __repr__ = one_line


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What a table says of one system.

    table: names the table, such as ``"estimation/3dpw_test/C"``: systems with an equal name stand in one table. title: its heading.
    facts: what makes rows comparable, in words, by name: protocol, pelvis, betas, gallery, samples, interval. The report prints them with the
    table, and marks a row whose facts differ.
    values: the columns, in order.
    samples: (N,) for each named measure, one value for each row of the task in its order; NaN where the sample does not count.
    rank: the measure in ``samples`` by which best, median and worst answers are chosen; "" if none are drawn. better: whether lower is better.
    counts: what was left out or failed, by reason: "no pose in the answer" -> 3.
    """

    table: str
    title: str
    facts: Mapping[str, str]
    values: Mapping[str, Value]
    samples: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rank: str = ""
    better: Better = "lower"
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    __repr__ = one_line

    def to_json(self) -> dict[str, Any]:
        """Plain values, without ``samples``."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "samples"}
        return found | {"values": {name: dataclasses.asdict(value) for name, value in self.values.items()}}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Scores:
        """Reads ``to_json``."""
        return cls(**{**found, "values": {name: Value(**value) for name, value in found["values"].items()}})


def mean_of(samples: np.ndarray, groups: Sequence[str], **about: Any) -> Value:
    """The mean of (N,) values without NaN, with the interval of ``bootstrap``. about: unit, better, digits."""
    counted = np.isfinite(samples)
    if not counted.any():
        return Value(float("nan"), **about)
    weights, values = counted.astype(np.float64), np.where(counted, samples, 0).astype(np.float64)
    low, high = bootstrap(np.stack([values, weights], 1), groups, lambda sums: sums[..., 0] / sums[..., 1])
    return Value(float(values.sum() / weights.sum()), low, high, **about)


def bootstrap(
    rows: np.ndarray, groups: Sequence[str], statistic: Callable[[np.ndarray], np.ndarray], drawn: int = DRAWN
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of sums. Whole groups are drawn with replacement, because samples of a group are alike.

    Args:
        rows: (N, k) numbers of each sample.
        groups: (N,) names. Samples without a group ("") are groups of their own.
        statistic: from sums (..., k) to (...).
        drawn: resamplings. The generator always starts from the same seed.
    """
    names = [group or f"\0{i}" for i, group in enumerate(groups)]
    _, place = np.unique(names, return_inverse=True)
    totals = np.zeros((place.max() + 1, rows.shape[1]))
    np.add.at(totals, place, rows)
    count = len(totals)
    if count < 2:
        return float("nan"), float("nan")
    random = np.random.default_rng(0)
    sums = np.stack([random.multinomial(count, np.full(count, 1 / count)) @ totals for _ in range(drawn)])
    with np.errstate(invalid="ignore", divide="ignore"):
        found = statistic(sums)
    low, high = np.nanquantile(found, (0.025, 0.975))
    return float(low), float(high)

"""Results of one system in one table, with 95 % intervals."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from chatpose_jax.evaluation.system import Answer
from chatpose_jax.settings import check_types, one_line, whole

DRAWN = 1000
"""Resamplings for an interval."""
FEW = 10
"""With fewer groups, percentile intervals cover far less than they should (Cameron, Gelbach and Miller, Review of Economics and Statistics 2008)."""
Better = Literal["lower", "higher", ""]
_NUMBERS = ("value", "low", "high")


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
    references: rows of the table that are not systems, for comparison, the same beside every system: "real poses" -> its columns.
    samples: (N,) for each named measure, one value for each row of the task in its order; NaN where the sample does not count. A measure has the
    name of its column in ``values``.
    rank: the measure in ``samples`` by which best, median and worst answers are chosen; "" if none are drawn. better: whether lower is better.
    counts: what was left out or failed, by reason: "no pose in the answer" -> 3.
    texts: for each name N texts, one for each row, such as the reviews of a judge; they are kept beside ``samples``.
    """

    table: str
    title: str
    facts: Mapping[str, str]
    values: Mapping[str, Value]
    samples: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rank: str = ""
    better: Better = "lower"
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    references: Mapping[str, Mapping[str, Value]] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    __repr__ = one_line

    def to_json(self) -> dict[str, Any]:
        """Plain values, without ``samples`` and ``texts``. None stands for NaN, which JSON does not have."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("samples", "texts")]
        found = {name: getattr(self, name) for name in names}
        references = {title: _to_json(values) for title, values in self.references.items()}
        plain = {"facts": dict(self.facts), "counts": dict(self.counts)}
        return found | plain | {"values": _to_json(self.values), "references": references}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Scores:
        """Reads ``to_json``. Raises UserError, KeyError, TypeError or AttributeError for anything else."""
        references = {title: _columns(values) for title, values in found.get("references", {}).items()}
        scores = cls(**{**found, "values": _columns(found["values"]), "references": references})
        check_types(scores, "scores")
        return scores


def _to_json(values: Mapping[str, Value]) -> dict[str, Any]:
    found = {name: dataclasses.asdict(value) for name, value in values.items()}
    return {name: {key: None if item != item else item for key, item in value.items()} for name, value in found.items()}


def _columns(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Value]:
    return {name: _value(name, value) for name, value in found.items()}


def _value(name: str, found: Mapping[str, Any]) -> Value:
    known = {key: item for key, item in found.items() if item is not None}
    check_types(Value(**{**dict.fromkeys(_NUMBERS, 0.0), **known}), name)
    whole(f"{name}.digits", known.get("digits", 0), 0, 15)
    return Value(**{**dict.fromkeys(_NUMBERS, float("nan")), **known})  # type: ignore[arg-type]


def counts_of(answers: Sequence[Answer]) -> dict[str, int]:
    """What happened to answers, for ``Scores.counts``: for each bool in their notes, how many are True; in the order of first appearance."""
    found: dict[str, int] = {}
    for answer in answers:
        for name, value in answer.notes.items():
            if isinstance(value, bool):
                found[name] = found.get(name, 0) + value
    return {name: count for name, count in found.items() if count}


def is_noted(answer: Answer) -> bool:
    """Whether ``counts_of`` counts an answer."""
    return any(value is True for value in answer.notes.values())


def mean_of(samples: np.ndarray, groups: Sequence[str], **about: Any) -> Value:
    """The mean of (N,) values without NaN, with the interval of ``bootstrap``. about: unit, better, digits."""
    return means_of({"": samples}, groups, {"": about})[""]


def means_of(
    columns: Mapping[str, np.ndarray], groups: Sequence[str], about: Mapping[str, Mapping[str, Any]]
) -> dict[str, Value]:
    """``mean_of`` of several columns of N values. All are resampled together, which takes little longer than for one.

    about: for each column unit, better and digits.
    """
    samples = np.stack([np.asarray(column, np.float64) for column in columns.values()], 1)
    counted = np.isfinite(samples)
    rows = np.concatenate([np.where(counted, samples, 0), counted], 1)
    middle, low, high = with_intervals(rows, groups, lambda sums: np.divide(*np.split(sums, 2, -1)))
    return {
        name: Value(float(middle[i]), float(low[i]), float(high[i]), **about[name]) for i, name in enumerate(columns)
    }


def bootstrap(
    rows: np.ndarray, groups: Sequence[str], statistic: Callable[[np.ndarray], np.ndarray], drawn: int = DRAWN
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of sums. Whole groups are resampled, because samples of one group resemble each other.

    Args:
        rows: (N, k) numbers of each sample.
        groups: (N,) names. Samples without a group ("") are groups of their own.
        statistic: from sums (..., k) to (...).
        drawn: resamplings. The generator always starts from the same seed.
    """
    _, low, high = with_intervals(rows, groups, statistic, drawn)
    return float(low), float(high)


def with_intervals(
    rows: np.ndarray, groups: Sequence[str], statistic: Callable[[np.ndarray], np.ndarray], drawn: int = DRAWN
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Statistics of sums, and the lower and upper ends of their intervals, each (c,) or (). Arguments as for ``bootstrap``.

    statistic: from sums (..., k) to (..., c), or to (...) for a single number. What it divides by 0 counts as no number. The ends are NaN where
    there are fewer than two groups, or no sample counts. Numbers are rounded to nine digits after the point, so that they do not depend on the
    order of additions.
    """
    totals = _totals(np.asarray(rows, np.float64), groups)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without a number
        middle, found = (_finite(statistic(sums)) for sums in (totals.sum(0), _resampled(totals, drawn)))
        ends = np.nanquantile(found, (0.025, 0.975), axis=0) if len(totals) > 1 else np.full((2, *middle.shape), np.nan)
    low, high = np.where(np.isfinite(middle), ends, np.nan)
    return np.round(middle, 9), np.round(low, 9), np.round(high, 9)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def interval(groups: Sequence[str], unit: str = "sequences") -> str:
    """How the intervals were made, for the facts of a table. unit: what a group is."""
    count, lone = len(set(_places(groups))), sum(not group for group in groups)
    words = f"95 % bootstrap over {count:,} " + (unit if not lone else "samples" if lone == len(groups) else "groups")
    return words if count >= FEW else f"{words}; fewer than {FEW} give intervals that are too narrow"


def _places(groups: Sequence[str]) -> list[int]:
    """A number of each sample's group, counted in order of appearance."""
    numbers: dict[str | int, int] = {}
    return [numbers.setdefault(group or i, len(numbers)) for i, group in enumerate(groups)]


def _totals(rows: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """(G, k) sums of rows (N, k) over each group."""
    places = np.array(_places(groups), np.int64)
    return np.stack([np.bincount(places, column) for column in rows.T], 1)


def _resampled(totals: np.ndarray, drawn: int) -> np.ndarray:
    """(drawn, k) sums over G rows that are drawn with replacement."""
    count, random, found = len(totals), np.random.default_rng(0), []
    step = max(1, 2**21 // count)  # bounds the memory
    for start in range(0, drawn, step):
        picks = random.integers(count, size=(min(step, drawn - start), count), dtype=np.int32)
        offsets = count * np.arange(len(picks), dtype=np.int32)[:, None]
        times = np.bincount((picks + offsets).ravel(), minlength=picks.size).reshape(picks.shape)
        found.append(times.astype(np.float64) @ totals)
    return np.concatenate(found)

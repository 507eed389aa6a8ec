"""Evaluators compute metrics every ``train.eval_every`` steps. They are found by the names in ``train.evaluators``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from chatpose_jax import named
from chatpose_jax.data.config import Split
from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import Processor
from chatpose_jax.settings import one_line
from chatpose_jax.train.config import EvaluatorRow, TrainConfig
from chatpose_jax.train.run_config import RunConfig

EVALUATORS = {"validation": "chatpose_jax.train.validate:validation"}
"""Evaluators in this package: name -> ``package.module:function``. The function is called once, as ``make(context, **options)``; its keyword-only
parameters are its options. It returns a function of the model's parameters, which returns values by name: scalars, and images as (H, W, 3) uint8
arrays. That function must have no side effects, and must return the same scalars in every process. It may declare the names of its values in an
attribute ``names``.
"""
PREFIX = "val_"
"""The prefix of the names of all values in ``metrics.jsonl``."""


@dataclasses.dataclass(frozen=True)
class Context:
    """The argument of an evaluator's function.

    config: the settings of the run; ``config.model`` also says how the layers of the parameters lie, so that it binds them.
    processor: encodes conversations. mesh: the mesh of the parameters; None is one device.
    rows: returns the rows of a split of the configured data. say: reports a line to the user.
    """

    config: RunConfig
    processor: Processor
    mesh: Mesh | None
    rows: Callable[[Split], Sequence[Example]]
    say: Callable[[str], None]

    __repr__ = one_line


@dataclasses.dataclass(frozen=True)
class Evaluators:
    """All evaluators of a run as one function of the parameters.

    parts: for each evaluator, its name in error messages and its function of the parameters.
    """

    parts: Sequence[tuple[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]]]

    __repr__ = one_line

    @property
    def names(self) -> Collection[str] | None:
        """Names of all values, with the prefix ``val_``; None if an evaluator does not declare its names."""
        said = [getattr(evaluate, "names", None) for _, evaluate in self.parts]
        return None if None in said else [f"{PREFIX}{name}" for names in said for name in names or ()]

    def __call__(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Values by name. Raises UserError if a value is neither a scalar nor an image, or if two evaluators give the same name."""
        values: dict[str, Any] = {}
        for where, evaluate in self.parts:
            found = evaluate(params)
            if not isinstance(found, Mapping):
                raise UserError(f"{where} gave {type(found).__name__}; expected a mapping of names to values")
            for name, value in found.items():
                if (key := f"{PREFIX}{name}") in values:
                    raise UserError(
                        f"{where} gives {name!r}, but an earlier evaluator already gives a value with this name"
                    )
                values[key] = _checked(f"{where}: {name!r}", value)
        return values


def check_evaluators(config: TrainConfig) -> None:
    """Raises UserError for an evaluator that cannot be found, and for an option that it does not have. No evaluator is called."""
    for number, row in enumerate(config.evaluators):
        _bind(row, number)


def make_evaluators(context: Context) -> Evaluators:
    """Creates the evaluators of ``train.evaluators``.

    Raises UserError as ``check_evaluators`` does, and if the user's own code fails; an OSError in it stays an OSError. All errors name the
    evaluator.
    """
    return Evaluators([_make(row, number, context) for number, row in enumerate(context.config.train.evaluators)])


def _make(row: EvaluatorRow, number: int, context: Context) -> Any:
    where, make = _bind(row, number)
    if row.name in EVALUATORS:
        return where, make(context)
    evaluate = _own(where, make)(context)
    if not callable(evaluate):
        raise UserError(f"{where} returned {type(evaluate).__name__}; expected a function of the parameters")
    return where, _own(where, evaluate)


def _bind(row: EvaluatorRow, number: int) -> tuple[str, Callable[[Context], Any]]:
    where = f"train.evaluators[{number}] {row.name!r}"
    make = named.find(where, row.name, EVALUATORS)
    signature = named.signature(where, make)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in signature.parameters.values() if p.kind in positional and p.default is p.empty]
    if len(needed) != 1:
        raise UserError(
            f"{where}: expected a function with one positional parameter (a Context) and keyword-only options, found {signature}"
        )
    named.check_options(where, signature, row.options)
    return where, functools.partial(make, **row.options)


def _own(where: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wraps a function of the user's: its errors become one line that names the evaluator."""

    @functools.wraps(function, updated=("__dict__",) if hasattr(function, "__dict__") else ())
    def call(argument: Any) -> Any:
        try:
            return function(argument)
        except Exception as error:
            raise named.raised(where, error) from error

    return call


def _checked(where: str, value: Any) -> Any:
    """A scalar as a float, or an image as a NumPy array."""
    try:
        array = np.asarray(value)
        if array.shape == ():
            return float(array)
    except (TypeError, ValueError):
        array = np.empty(1)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"{where} is {value!r:.100}; expected a number, or an image as an (H, W, 3) uint8 array")
    return array

"""Finds the sources that ``data.sources`` names, checks their options, and gives the rows of a split."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from chatpose_jax import named, storage
from chatpose_jax.data.config import DataConfig, SourceRow, Split
from chatpose_jax.data.datasets import DATA_SETS
from chatpose_jax.data.example import Example, ExampleRows
from chatpose_jax.data.mixture import Mixture
from chatpose_jax.data.moved import KINDS, PREPARED
from chatpose_jax.data.prepared import NotPrepared, data_set
from chatpose_jax.data.store import DESCRIPTION
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import Processor

SOURCES = {
    "synthetic": "chatpose_jax.data.synthetic.dataset:synthetic",
    "prepared": "chatpose_jax.data.prepared:prepared",
    "keypoints": "chatpose_jax.data.keypoint_rows:keypoints",
    "joined": "chatpose_jax.data.joined:joined",
}
"""Sources in the package: name -> ``package.module:function``. The names of ``DATA_SETS`` are sources too (``prepared.data_set``).

A source is called as ``make(split, *, image_size, seed, **options)`` and gives a sequence of ``Example``. Its keyword-only parameters are its
options. ``image_size`` (pixels) and ``seed`` are passed only if it has such parameters, and options may replace them. So is ``open_source``, for a
source that changes the rows of another: ``open_source(name, split, options, wished)`` gives the rows of that source (``NamedRows``). wished:
options that it gets only if it has such parameters.
"""


def examples(config: DataConfig, split: Split, image_size: int) -> Sequence[Example]:
    """The rows of a split: those of the only source, or a mixture by weight. Of "val" and "test", sources without such rows take no part.

    Raises UserError, which names the source, where a source is not found, an option does not fit, the source gives no sequence of ``Example``,
    or its code fails. Its code may also fail at a row, later; the error then names the row. An OSError of its code stays an OSError.
    """
    parts: list[tuple[NamedRows, float]] = []
    absent: list[NotPrepared] = []
    for rows, row in zip(_bound(config, image_size), config.sources):
        try:
            parts.append((rows(split), row.weight))
        except NotPrepared as error:
            absent.append(error)
    if absent:  # one error for all, so that a mixture is not fetched in as many rounds as it has sources
        others = ", ".join(error.folder for error in absent[1:])
        raise UserError(
            f"{absent[0]}"
            + (f". Neither there nor complete: {others}; 'chatpose data list NAME' tells each" if others else "")
        )
    if split != "train" and any(len(part) for part, _ in parts):
        parts = [(part, weight) for part, weight in parts if len(part)]
    if len(parts) == 1:
        return parts[0][0]
    for part, _ in parts:
        if not len(part):
            raise UserError(f"{part.where}, has no rows; a mixture needs some of each source")
    return Mixture(*zip(*parts))


def check_sources(config: DataConfig) -> None:
    """Raises UserError as ``examples`` does for a name or an option. No source is called."""
    _bound(config, image_size=1)


def _bound(config: DataConfig, image_size: int) -> list[Callable[[Split], NamedRows]]:
    """A function of the split for each source. All are checked first."""
    return [
        _bind(f"data.sources[{number}] {row.name!r}", row, image_size, config)
        for number, row in enumerate(config.sources)
    ]


def _bind(
    where: str, row: SourceRow, image_size: int, config: DataConfig, wished: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[Split], NamedRows]:
    if row.name in KINDS:
        raise UserError(f'{where} is now ("synthetic", {row.weight!r}, {{"kind": "{KINDS[row.name]}"}})')
    if row.name in PREPARED:
        raise UserError(f"{where}: {PREPARED[row.name]}")
    if folder := "" if row.name in SOURCES | DATA_SETS else _prepared_folder(config.root, row.name):
        raise UserError(
            f"{where}: {folder} is a prepared folder. Name the source 'prepared' and give it as the option folder: "
            f"--set data.sources=prepared --set data.sources.prepared.folder={folder}"
        )
    make = (
        data_set(row.name, config.root) if row.name in DATA_SETS else named.find(where, row.name, SOURCES | DATA_SETS)
    )
    signature = named.signature(where, make)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in signature.parameters.values() if p.kind in positional and p.default is p.empty]
    if len(needed) != 1 and not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        name = row.name.partition(":")[2]
        raise UserError(
            f"{where}: a source takes the split, and its options by keyword: write def {name}(split, *, image_size, seed), "
            f"found def {name}{signature}"
        )
    offered = {
        **wished,
        "image_size": image_size,
        "seed": config.seed,
        "open_source": functools.partial(_open_other, image_size, config),
    }
    options = {name: value for name, value in offered.items() if name in signature.parameters} | dict(row.options)
    named.check_options(where, signature, options)
    return functools.partial(_open, where, functools.partial(make, **options))


def _prepared_folder(root: str, name: str) -> str:
    """The prepared folder that someone may have named in place of a source, or nothing."""
    for path in (storage.location(root) / name, storage.location(name)):
        with storage.reachable(path):
            if (path / DESCRIPTION).is_file():
                return str(path)
    return ""


def _open_other(
    image_size: int, config: DataConfig, name: str, split: Split, options: Mapping[str, Any], wished: Mapping[str, Any]
) -> NamedRows:
    return _bind(f"its source {name!r}", SourceRow(name, 1.0, options), image_size, config, wished)(split)


def _open(where: str, make: Callable[[Split], Any], split: Split) -> NamedRows:
    try:
        rows = make(split)
    except NotPrepared as error:
        raise NotPrepared(f"{where}: {error}", error.folder) from None
    except Exception as error:
        raise named.raised(f"{where} raised for split {split!r}", error) from error
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise UserError(f"{where}: expected a sequence of Example, found {type(rows).__name__}")
    found = NamedRows(rows, f"{where}, split {split!r}")
    if len(found) and not hasattr(rows, "sizes"):
        found[0]  # finds a first error before all rows are read
    return found


class NamedRows(ExampleRows):
    """The rows of a source, each checked when it is taken (``Example.check``). An error of its code becomes one line that names the source and
    the row; so does a later error of a row, because each row knows its place.

    rows: what the source gave. Other attributes than those here are its attributes. where: names the source in errors.
    """

    def __init__(self, rows: Any, where: str) -> None:
        self.rows, self.where = rows, where

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: Sequence[int]) -> list[Example]:
        """Some rows, read together if the source can."""
        together = getattr(self.rows, "__getitems__", None)
        try:
            rows = together(numbers) if together else None
        except Exception:
            rows = None  # row by row, because the error must name the row
        if rows is None:
            return [self._row(number) for number in numbers]
        if len(rows) != len(numbers):
            raise UserError(
                f"{self.where}: __getitems__ gave {len(rows)} rows of the {len(numbers)} that were asked for"
            )
        return [self._checked(number, row) for number, row in zip(numbers, rows)]

    def _row(self, index: int) -> Example:
        try:
            row = self.rows[index]
        except Exception as error:
            raise named.raised(f"row {index} of {self.where}", error) from error
        return self._checked(index, row)

    def _checked(self, index: int, row: Any) -> Example:
        where = f"row {index} of {self.where}"
        if not isinstance(row, Example):
            raise UserError(f"{where}: expected an Example, found {type(row).__name__}")
        try:
            row.check()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return row.at(where)

    def sizes(self, processor: Processor, max_length: int) -> np.ndarray | None:
        """The sizes that the rows know (``data.sizes.known_sizes``), or None."""
        if not hasattr(self.rows, "sizes"):
            return None
        try:
            return self.rows.sizes(processor, max_length)
        except Exception as error:
            raise named.raised(f"sizes of {self.where}", error) from error

    def __getattr__(self, name: str) -> Any:
        if name == "rows" or name.startswith("_"):  # pickle asks for some before there are rows
            raise AttributeError(name)
        return getattr(self.rows, name)

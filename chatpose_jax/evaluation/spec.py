"""Systems and data sets as the command line names them: ``NAME,option=value,option=value``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from chatpose_jax import named
from chatpose_jax.data.config import DataConfig, SourceRow, Split
from chatpose_jax.data.example import Example
from chatpose_jax.data.sources import examples
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.subset import Chained
from chatpose_jax.evaluation.system import SYSTEMS, System
from chatpose_jax.settings import one_line, parse_value

IMAGE_SIZE = 336
"""Pixels of images that a source makes itself, unless its option ``image_size`` says another number. All systems are shown the same images."""


class Spec(NamedTuple):
    """A name (a key of a table or ``package.module:name``) with options. text: what was typed."""

    name: str
    options: Mapping[str, Any]
    text: str

    def __repr__(self) -> str:
        return one_line(self)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Reads ``NAME,option=value,…``. Commas in brackets and quotes do not separate. Values are those of ``settings.parse_value``.

        Raises UserError.
        """
        name, *words = _split(text)
        options: dict[str, Any] = {}
        for word in words:
            option, equals, value = (part.strip() for part in word.partition("="))
            if not equals or not option:
                raise UserError(f"{text}: expected NAME,option=value,…, found {word!r}")
            if option in options:
                raise UserError(f"{text}: the option {option} is given twice")
            try:
                options[option] = parse_value(value)
            except UserError as error:
                raise UserError(f"{text}: {option}: {error}") from None
        if not name.strip():
            raise UserError(f"{text!r}: expected NAME,option=value,…, found no name")
        return cls(name.strip(), options, text)


def _split(text: str) -> list[str]:
    """The parts between commas that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def make_system(spec: Spec) -> System:
    """The system that a spec names, made with its options. Raises UserError."""
    where = f"system {spec.name!r}"
    make = named.find(where, spec.name, SYSTEMS)
    named.check_options(where, named.signature(where, make), spec.options)
    try:
        system = make(**spec.options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:
        if spec.name in SYSTEMS:
            raise
        raise named.raised(where + named.own_line(error), error) from error
    for attribute in ("name", "settings", "batch_size", "answer"):
        if not hasattr(system, attribute):
            raise UserError(f"{where} has no attribute {attribute!r}, see chatpose_jax.evaluation.system.System")
    return system


def open_rows(spec: Spec, split: Split | Literal["all"], root: str) -> Sequence[Example]:
    """The rows of a split of a source of ``data.sources``. root: folder of the prepared data sets. "all": those of all splits, one after the other.

    Raises UserError as ``data.sources.examples`` does; for a data set that is not prepared it has the command that prepares it.
    """
    options = {name: value for name, value in spec.options.items() if name != "name"}
    config = DataConfig(sources=(SourceRow(spec.name, 1.0, options),), root=root)
    if split != "all":
        return examples(config, split, IMAGE_SIZE)
    return Chained([examples(config, each, IMAGE_SIZE) for each in get_args(Split)])


def data_name(spec: Spec, split: str, subset: str) -> str:
    """What tables and folders call rows: the option ``name``, or that of the source or of its folder, with the split unless it is "test", and
    the subset: ``"3dpw_test-200"``.
    """
    name = spec.options.get("name") or spec.name.rpartition(":")[2]
    if spec.name == "prepared" and "name" not in spec.options:
        name = Path(str(spec.options.get("folder", "prepared"))).name
    parts = [str(name), "" if split == "test" else split, subset]
    return "-".join(part for part in parts if part)


def folder_name(name: str) -> str:
    """A name as that of a folder: letters, digits and ``._+-``; others become ``_``. Raises UserError where nothing is left."""
    found = re.sub(r"[^\w.+-]+", "_", name).strip("._")
    if not found:
        raise UserError(f"the name {name!r} has no letter or digit, so no folder can have it: set name=…")
    return found


def demand_unique(what: str, names: Iterable[str]) -> None:
    """Raises UserError where two names give one folder, also on file systems that ignore case."""
    seen: dict[str, str] = {}
    for name in names:
        folder = folder_name(name).casefold()
        if folder in seen:
            raise UserError(
                f"two {what} are called {name!r}"
                + (f" and {seen[folder]!r}, which is one folder" if seen[folder] != name else "")
                + ": set name=… in one of them"
            )
        seen[folder] = name

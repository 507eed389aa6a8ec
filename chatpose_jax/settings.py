"""Checks that every dataclass of settings runs when it is made, wherever its values come from: code, command line, a stranger's JSON."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from chatpose_jax.errors import UserError


def check_types(config: Any, where: str) -> None:
    """Raises UserError for the first field of a dataclass whose value is not of the annotated type.

    A bool is no number, an int is a float, a float is finite; ``Literal``, unions, tuples and NamedTuples are looked into.
    """
    for name, kind in get_type_hints(type(config)).items():
        if not _fits(value := getattr(config, name), kind):
            raise UserError(f"{where}.{name}: expected {_words(kind)}, found {value!r:.100}")


def require(config: Any, where: str, words: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises UserError ("must be <words>") for the first of the named fields for which ``holds`` is false."""
    for name in names:
        if not holds(value := getattr(config, name)):
            raise UserError(f"{where}.{name} must be {words}, found {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1:] == (...,):
            return all(_fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, kind):
        return False
    return not hasattr(kind, "_fields") or all(map(_fits, value, get_type_hints(kind).values()))


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_words, get_args(kind)))
    if get_origin(kind) is tuple:
        *items, last = get_args(kind)
        return f"a list, each {_words(items[0])}" if last is ... else f"({', '.join(map(_words, [*items, last]))})"
    if hasattr(kind, "_fields"):
        return f"({', '.join(kind._fields)})"
    return {float: "a finite float", type(None): "none", Any: "anything"}.get(kind) or kind.__name__

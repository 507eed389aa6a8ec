"""Validation of values from code, the command line or JSON. Settings validate themselves when they are created; functions validate arguments."""

from __future__ import annotations

import ast
import difflib
import math
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from chatpose_jax.errors import UserError


def check_types(config: Any, where: str) -> None:
    """Raises UserError for the first field of a dataclass whose value is not of the annotated type.

    A bool is not a number, an int is a valid float, and a float must be finite. The items of ``Literal``, unions, tuples, sequences, mappings and
    NamedTuples are checked too. Other generic types (``Callable[…]``) are checked without their parameters.
    """
    for name, kind in get_type_hints(type(config)).items():
        check_value(f"{where}.{name}", getattr(config, name), kind)


def check_value(where: str, value: Any, kind: Any) -> None:
    """Raises UserError for a value that is not of an annotated type, by the rules of ``check_types``."""
    if not _fits(value, kind):
        raise UserError(f"{where}: expected {_words(kind)}, found {value!r:.100}")


def require(config: Any, where: str, words: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises UserError ("must be <words>") for the first of the named fields for which ``holds`` is false."""
    for name in names:
        if not holds(value := getattr(config, name)):
            raise UserError(f"{where}.{name} must be {words}, found {value!r}")


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns an argument that is an integer (of Python, NumPy or JAX) in [least, most]; else raises a UserError that names it. A bool is refused."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise UserError(f"{name} must be {_between('a whole number', least, most)}, found {_shown(value)}")
    return number


def real(name: str, value: Any, holds: Callable[[float], bool], words: str) -> float:
    """Returns a real number (of Python, NumPy or JAX) for which ``holds`` is true; else raises UserError ("must be <words>")."""
    try:
        plain = isinstance(value, bool | str | bytes) or getattr(value, "shape", ()) != () or _dtype_of(value) == "bool"
        number = None if plain else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not holds(number):
        raise UserError(f"{name} must be {words}, found {_shown(value)}")
    return number


def flag(name: str, value: Any) -> bool:
    """Returns an argument that is a bool of Python or NumPy; else raises a UserError that names it."""
    if not isinstance(value, bool) and not (_dtype_of(value) == "bool" and value.shape == ()):
        raise UserError(f"{name} must be True or False, found {_shown(value)}")
    return bool(value)


def instance(name: str, value: Any, kind: type | tuple[type, ...], words: str) -> None:
    """Raises UserError unless an argument is an instance of ``kind``, which ``words`` describe."""
    if not isinstance(value, kind):
        raise UserError(f"{name} must be {words}, found {type(value).__name__}: {_shown(value)}")


def parse_value(text: str) -> Any:
    """A value as it is typed behind ``--set NAME=``: a Python literal, ``true``, ``false``, ``none``, or else the text itself.

    Raises UserError, without the name, for brackets that are no literal.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if text.lstrip()[:1] in ("(", "[", "{"):
            raise UserError("the value in brackets is not valid Python; look for a missing comma or quote") from None
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The end of an error about an unknown word: suggests the nearest name, or is empty if none is near."""
    near = difflib.get_close_matches(word, list(names), 1)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(self: Any) -> str:
    """A ``__repr__`` of one short line for objects with arrays; see ``smpl_jax.printing``."""
    from smpl_jax.printing import one_line  # imports JAX, which not every program that validates settings needs

    return one_line(self)


def _between(words: str, least: int, most: int | None) -> str:
    return f"{words} of at least {least}" if most is None else f"{words} in [{least}, {most}]"


def _shown(value: Any) -> str:
    return f"{' '.join(repr(value).split()):.100}"


def _dtype_of(value: Any) -> str:
    return str(getattr(value, "dtype", ""))


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in inner)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1:] == (...,):
            return all(_fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items()
        )
    if isinstance(origin, type) and issubclass(origin, Sequence):  # settings hold lists as tuples
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin is not None:
        return isinstance(value, origin)
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
    if isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping):
        return f"a table of {' to '.join(map(_words, get_args(kind)))}"
    if isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Sequence):
        return f"a list, each {_words(get_args(kind)[0])}"
    if get_origin(kind) is not None:
        return str(kind)
    if hasattr(kind, "_fields"):
        return f"({', '.join(kind._fields)})"
    return {float: "a finite number", type(None): "none", Any: "anything"}.get(kind) or kind.__name__

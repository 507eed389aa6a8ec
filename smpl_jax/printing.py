"""A ``repr`` of one short line for classes that hold arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_LONGEST = 60


def one_line(self: Any) -> str:
    """The ``__repr__`` of a dataclass or NamedTuple: its name and its fields, arrays by dtype and shape.

    >>> one_line(BodyOutput(vertices, joints))  # doctest: +SKIP
    'BodyOutput(vertices=float32 (6890, 3), joints=float32 (24, 3))'
    """
    names = getattr(self, "_fields", None) or [field.name for field in dataclasses.fields(self) if field.repr]
    return f"{type(self).__name__}({', '.join(f'{name}={brief(getattr(self, name))}' for name in names)})"


def brief(value: Any) -> str:
    """A value in a few words: an array by dtype and shape, a long container by its length, anything else cut short."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, Mapping) and len(value) > 3:
        return f"{{{len(value)} entries}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {brief(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple) and type(value).__repr__ in (list.__repr__, tuple.__repr__):
        inner = f"{len(value)} × {brief(value[0])}" if len(value) > 3 else ", ".join(map(brief, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"

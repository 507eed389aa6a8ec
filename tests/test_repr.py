"""What a console shows of the classes of both packages: one short line, however much they hold."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

import chatpose_jax
import smpl_jax

MANY = 300
MODULES = [
    module.name
    for package in (smpl_jax, chatpose_jax)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    # The generator of the default body takes optional packages; a __main__ runs when imported.
    if not module.name.startswith("smpl_jax.default_body.") and not module.name.endswith("__main__")
]


def public_classes() -> list[type]:
    """Classes with fields. Others have Python's own repr, and flax's modules flax's tree."""
    found = {
        kind
        for name in MODULES
        for kind in vars(importlib.import_module(name)).values()
        if inspect.isclass(kind) and kind.__module__ == name and not kind.__name__.startswith("_")
    }
    fields = [kind for kind in found if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")]
    return sorted(fields, key=lambda kind: f"{kind.__module__}.{kind.__name__}")


@functools.cache
def large() -> np.ndarray:
    return np.zeros((MANY, 24, 3, 3), np.float32)


def sample(hint: typing.Any) -> typing.Any:
    """A value that a field may hold, as large as such values get."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return sample(next(part for part in inner if part is not type(None)))
    if origin is typing.Literal:
        return inner[0]
    if origin is tuple and inner[-1:] != (...,):
        return tuple(7 if part is typing.Any else sample(part) for part in inner)
    if origin in (list, tuple, collections.abc.Sequence):
        whole = inspect.isclass(inner[0]) and dataclasses.is_dataclass(inner[0])
        settings = inner[0] in (int, float, str) or (origin is tuple and not whole)
        return (tuple if origin is tuple else list)([sample(inner[0])] * (3 if settings else MANY))
    if origin in (dict, collections.abc.Mapping):
        return dict.fromkeys((f"key {i}" for i in range(3 if inner[1] in (int, float) else MANY)), sample(inner[1]))
    if origin is collections.abc.Callable:
        return print
    if inspect.isclass(hint) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields")):
        return made(hint)
    if hint in (int, float, str, bool):
        return {int: 7, float: 0.1 + 0.2, str: "some words", bool: True}[hint]
    arrays = hint in (typing.Any, np.ndarray, jax.Array) or origin is np.ndarray
    return large() if arrays else {Path: Path("folder/file"), np.dtype: np.dtype(np.float32)}.get(hint, 7)


def made(kind: type) -> typing.Any:
    """One of a class, its fields filled without asking its checks."""
    hints = typing.get_type_hints(kind)
    if hasattr(kind, "_fields"):
        return kind(**{name: sample(hints[name]) for name in kind._fields})
    value = object.__new__(kind)
    for field in dataclasses.fields(kind):
        object.__setattr__(value, field.name, sample(hints[field.name]))
    return value


def test_the_walk_sees_what_holds_arrays() -> None:
    names = {kind.__name__ for kind in public_classes()}
    assert {"Pose", "BodyModel", "BodyOutput", "Generated", "KVCache", "Encoded", "TrainState", "Checkpoint"} <= names
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(made(smpl_jax.BodyOutput)))


@pytest.mark.parametrize("kind", public_classes(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_a_repr_is_one_line(kind: type) -> None:
    text = repr(made(kind))
    assert text.startswith(kind.__name__)
    assert "\n" not in text
    assert len(text) < 3000, text  # all settings of a run are the longest


@pytest.mark.parametrize("name", [*smpl_jax.__all__, *chatpose_jax.__all__])
def test_public_names_are_there(name: str) -> None:
    assert hasattr(smpl_jax, name) or hasattr(chatpose_jax, name)

"""Pose heads, looked up by name. A new head is one file in this folder: see ``docs/extending.md``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.models.heads.base import PoseHead

_REGISTRY: dict[str, type[PoseHead]] = {}


def register(name: str) -> Callable[[type[PoseHead]], type[PoseHead]]:
    """Class decorator that makes a head available as ``model.head.name = name``. A name taken twice is an error."""

    def add(cls: type[PoseHead]) -> type[PoseHead]:
        if name in _REGISTRY:
            raise ValueError(
                f"pose head {name!r} is registered twice: by {_REGISTRY[name].__module__} and {cls.__module__}"
            )
        _REGISTRY[name] = cls
        return cls

    return add


def head_names() -> list[str]:
    """Every registered head, the files of this folder included."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_REGISTRY)


def create_head(config: HeadConfig, width: int, *, rngs: nnx.Rngs) -> PoseHead:
    """The head that ``config.name`` names; raises UserError with the known names or the refused options."""
    names = head_names()
    if config.name not in names:
        raise UserError(f"no pose head {config.name!r}; the heads are {', '.join(names)} (model.head.name)")
    try:
        return _REGISTRY[config.name](width, config.num_joints, rngs=rngs, **dict(config.options))
    except TypeError as error:
        raise UserError(f"pose head {config.name!r} refuses its options {dict(config.options)}: {error}") from error

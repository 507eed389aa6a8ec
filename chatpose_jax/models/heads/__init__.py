"""Pose heads, looked up by name. A new head is one file in this folder: see ``docs/extending.md``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.models.heads.base import PoseHead

_REGISTRY: dict[str, type[PoseHead]] = {}
TAKEN = {"loss", "text", "token_accuracy"}
"""Names of the rest of the loss, which no part of a head's may have."""


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
    """The head that ``config.name`` names; raises UserError with the known names or options."""
    names = head_names()
    if config.name not in names:
        raise UserError(f"no pose head {config.name!r}; the heads are {', '.join(names)} (model.head.name)")
    kind, options = _REGISTRY[config.name], dict(config.options)
    try:
        return kind(width, config.num_joints, rngs=rngs, **options)
    except TypeError as error:
        keywords = [p.name for p in inspect.signature(kind.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
        known = ", ".join(name for name in keywords if name != "rngs") or "none"
        raise UserError(
            f"pose head {config.name!r} refuses its options {options}: {error}; it knows {known} (model.head.options)"
        ) from error


def check_head(head: PoseHead, config: HeadConfig, width: int) -> None:
    """Raises UserError where a head, which may be abstract, makes anything but float32 (..., num_joints, 3, 3) of (..., width), or its loss
    anything but scalars by names that are free.
    """
    shape = (2, config.num_joints, 3, 3)
    hidden, poses = (jax.ShapeDtypeStruct(size, jnp.float32) for size in ((2, width), shape))
    made = nnx.eval_shape(lambda head, hidden: head(hidden), head, hidden)
    found, dtype = getattr(made, "shape", type(made).__name__), getattr(made, "dtype", None)
    if (found, dtype) != (shape, jnp.float32):
        raise UserError(
            f"pose head {config.name!r} makes {dtype} {found} of hidden states {(2, width)}; expected rotation matrices, float32 {shape} "
            f"(model.head.num_joints={config.num_joints})"
        )
    mask = jax.ShapeDtypeStruct((2,), jnp.bool)
    parts = nnx.eval_shape(lambda head, *arguments: head.loss(*arguments), head, hidden, poses, mask)
    if (
        not isinstance(parts, dict)
        or any(getattr(part, "shape", None) != () for part in parts.values())
        or TAKEN & parts.keys()
    ):
        raise UserError(
            f"the loss of pose head {config.name!r} is {parts}; expected a dict of scalars, none called {', '.join(sorted(TAKEN))}"
        )

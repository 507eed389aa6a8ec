"""A kind of checkpoint, with any language model and any vision tower in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from chatpose_jax.settings import one_line
from chatpose_jax.weights.backbones import Language, Tower
from chatpose_jax.weights.table import Layout, Shape


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Wrapper:
    """A kind of checkpoint: what the names of its parts begin with, and where its ``config.json`` describes them.

    name: of its layouts; passengers are stored under it. title: for reports. family: the name for the user (``--layout``), which several kinds share.
    towers: the families of vision towers that may be in it; ``(None,)`` if it has no tower.
    recognise: decides by the tensor names, with the tower in question.
    text: ``config.json`` → the part of it that describes the language model; ``None`` if it has no language model.
    layout: the layout with these families.
    configured: decides by ``config.json`` between kinds with the same names.
    """

    name: str
    title: str
    family: str
    towers: tuple[Tower | None, ...] = (None,)
    recognise: Callable[[Mapping[str, Shape], Tower | None], bool]
    text: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = lambda config: config
    layout: Callable[[Language | None, Tower | None], Layout]
    configured: Callable[[Mapping[str, Any]], bool] = lambda config: True

    __repr__ = one_line

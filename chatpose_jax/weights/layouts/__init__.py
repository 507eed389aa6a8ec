"""Name tables of checkpoint layouts. To add one, write a file for it and add it to ``LAYOUTS``. The first layout whose ``recognise`` accepts the
tensor names is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.weights.layouts import clip, flat, llava_transformers, parts, vicuna
from chatpose_jax.weights.layouts.table import Ignored, Layout, NameRule, Shape, Transform

LAYOUTS: tuple[Layout, ...] = (*flat.CHATPOSE, *llava_transformers.LAYOUTS, *flat.LLAVA, *clip.LAYOUTS, *vicuna.LAYOUTS)
FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(layout.family for layout in LAYOUTS))

__all__ = ["FAMILIES", "LAYOUTS", "Ignored", "Layout", "NameRule", "Shape", "Transform", "parts", "recognise"]


def recognise(shapes: Mapping[str, Shape], config: Mapping[str, Any], family: str | None = None) -> Layout:
    """The layout of a checkpoint with these tensors and this ``config.json``. With ``family``, only its layouts are tried, and ``config.json`` is
    ignored. Raises UserError if none fits.
    """
    if family is not None and family not in FAMILIES:
        raise UserError(f"no layout {family!r}; expected one of {', '.join(FAMILIES)}")
    candidates = [layout for layout in LAYOUTS if family in (None, layout.family)]
    for layout in candidates:
        if layout.recognise(shapes) and (family is not None or layout.configured(config)):
            return layout
    shown = ", ".join(sorted(shapes)[:6])
    raise UserError(
        f"these {len(shapes)} tensors ({shown}, …) have the names of no known layout; expected one of "
        f"{', '.join(dict.fromkeys(layout.family for layout in candidates))}"
    )

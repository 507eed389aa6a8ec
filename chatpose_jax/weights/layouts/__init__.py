"""Kinds of checkpoints. To add one, write a file for it and add it to ``WRAPPERS``. The first that recognises the tensor names is taken. The
language model and the vision tower inside are families of ``backbones``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.weights.backbones import LANGUAGES, Language, Tower, choose_language
from chatpose_jax.weights.layouts import decoder, flat, llava_transformers, towers
from chatpose_jax.weights.layouts.wrapper import Wrapper
from chatpose_jax.weights.table import Layout, Shape

WRAPPERS: tuple[Wrapper, ...] = (
    *flat.CHATPOSE,
    *llava_transformers.WRAPPERS,
    *flat.LLAVA,
    *towers.WRAPPERS,
    *decoder.WRAPPERS,
)
FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(wrapper.family for wrapper in WRAPPERS))

__all__ = ["FAMILIES", "WRAPPERS", "Wrapper", "layout_of", "layouts", "recognise"]


def recognise(
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    families: Collection[str] | None = None,
    control: Collection[str] = (),
    backbone: str | None = None,
) -> Layout:
    """The layout of a checkpoint with these tensors and this ``config.json``.

    families: only these kinds (``Wrapper.family``) are tried, and ``config.json`` does not decide between them. control, backbone: as in
    ``choose_language``. Raises UserError if none fits.
    """
    if odd := [family for family in families or () if family not in FAMILIES]:
        raise UserError(f"no layout {odd[0]!r}; expected one of {', '.join(FAMILIES)}")
    candidates = [wrapper for wrapper in WRAPPERS if families is None or wrapper.family in families]
    for wrapper in candidates:
        for tower in wrapper.towers:
            if wrapper.recognise(shapes, tower) and (families is not None or wrapper.configured(config)):
                language = None
                if wrapper.text is not None:
                    text = wrapper.text(config)
                    language = choose_language(text if isinstance(text, Mapping) else {}, control, backbone)
                return wrapper.layout(language, tower)
    shown = ", ".join(sorted(shapes)[:6])
    raise UserError(
        f"these {len(shapes)} tensors ({shown}, …) have the names of no known layout; expected one of "
        f"{', '.join(dict.fromkeys(wrapper.family for wrapper in candidates))}"
    )


def layout_of(name: str, language: Language | None = None, tower: Tower | None = None) -> Layout:
    """The layout of the kind ``name`` with these families; where it has the part and no family is given, the first."""
    wrapper = next(wrapper for wrapper in WRAPPERS if wrapper.name == name)
    return wrapper.layout(
        None if wrapper.text is None else language or LANGUAGES["llama2"],
        tower if tower in wrapper.towers else wrapper.towers[0],
    )


def layouts(language: Language | None = None) -> Iterator[Layout]:
    """Every layout whose language model is of this family, or of any family that has names of its own."""
    of_names = {family.rules: family for family in (LANGUAGES.values() if language is None else [language])}
    for wrapper in WRAPPERS:
        for tower in wrapper.towers:
            for family in [None] if wrapper.text is None else of_names.values():
                yield wrapper.layout(family, tower)

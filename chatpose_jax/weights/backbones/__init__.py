"""Families of pretrained networks, by name: a module of this package with a constant ``LANGUAGE`` or ``TOWER`` is one, and says everything of it.

``docs/extending.md`` walks through a new family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.settings import did_you_mean
from chatpose_jax.weights.backbones.family import Language, Tower

__all__ = ["LANGUAGES", "TOWERS", "Language", "Tower", "choose_language", "language", "published", "tower"]

_FOUND = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
LANGUAGES: Mapping[str, Language] = {
    family.name: family for module in _FOUND if (family := getattr(module, "LANGUAGE", None))
}
TOWERS: Mapping[str, Tower] = {family.name: family for module in _FOUND if (family := getattr(module, "TOWER", None))}
_UNSAID = "llama"
"""What a ``config.json`` without ``model_type`` means."""


def language(name: str) -> Language:
    """The family of this name. Raises a UserError that lists the names for any other name."""
    return _named("language model", name, LANGUAGES)


def tower(name: str) -> Tower:
    """The family of this name. Raises a UserError that lists the names for any other name."""
    return _named("vision tower", name, TOWERS)


def published(name: str) -> ModelConfig:
    """The settings of a published language model (``Language.sizes``), without a vision tower, and with the pose token as its first free id. Those of
    control tokens are left open: a run takes them from the model folder that it starts from.

    Raises a UserError that lists the names for any other name.
    """
    sizes = {size: text for family in LANGUAGES.values() for size, text in family.sizes.items()}
    if name not in sizes:
        near = did_you_mean(name, sizes) or f"; the published ones are {', '.join(sizes)}"
        raise UserError(f"no language model {name!r}{near}")
    text = sizes[name]
    return ModelConfig(vision=None, text=text, pose_token_id=text.base_vocab_size, bos_token_id=-1, eos_token_id=-1)


def _named(kind: str, name: str, families: Mapping[str, Any]) -> Any:
    if name not in families:
        near = did_you_mean(name, families) or f"; the families are {', '.join(families)}"
        raise UserError(f"no family of {kind}s {name!r}{near}")
    return families[name]


def choose_language(config: Mapping[str, Any], control: Collection[str] = (), name: str | None = None) -> Language:
    """The family of a language model.

    Args:
        config: its ``config.json``, or the table of a larger one that describes it. ``model_type`` must be one of the family's.
        control: the control tokens of the tokenizer. Of families with one ``model_type`` the one is taken that finds most of its own among them, and
            all of them.
        name: the family that the user names; it must have the ``model_type`` too.

    Raises UserError: no family of this ``model_type``.
    """
    kind = config.get("model_type") or _UNSAID
    kin = [family for family in LANGUAGES.values() if kind in family.model_types]
    if name is not None:
        if (chosen := language(name)) not in kin:
            raise UserError(
                f"config.json: model_type={kind!r}, but --backbone {name} has {', '.join(map(repr, chosen.model_types))}; leave the option out"
            )
        return chosen
    if not kin:
        known = ", ".join(f"{family.name} ({family.model_types[0]})" for family in LANGUAGES.values())
        raise UserError(
            f"config.json: model_type={kind!r} is not supported; the families of language models are {known}; "
            "docs/extending.md says how to add one"
        )
    held = [family for family in kin if set(family.control) <= set(control)]
    return max(held or kin, key=lambda family: len(family.control) if held else -len(family.control))

"""Leaves by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict


def by_path(tree: Any) -> dict[str, Any]:
    """Nested dicts -> ``{"a/0/b": leaf}``; the integer keys of module lists become their digits."""
    return {"/".join(map(str, keys)): leaf for keys, leaf in flatten_dict(tree).items()}


def nested(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse of ``by_path``: digits become the integer keys of module lists."""
    return unflatten_dict(
        {tuple(int(key) if key.isdigit() else key for key in path.split("/")): leaf for path, leaf in flat.items()}
    )

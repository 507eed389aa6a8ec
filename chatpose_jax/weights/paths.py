"""Leaves by path."""

from __future__ import annotations

from typing import Any

from flax.traverse_util import flatten_dict


def by_path(tree: Any) -> dict[str, Any]:
    """Nested dicts -> ``{"a/0/b": leaf}``; the integer keys of module lists become their digits."""
    return {"/".join(map(str, keys)): leaf for keys, leaf in flatten_dict(tree).items()}

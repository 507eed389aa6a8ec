"""What of a decoder layer is kept for the backward pass; the rest is computed again there (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from chatpose_jax.models.sharding import GATHERED, current_mesh

# Names given by checkpoint_name in the layers: queries, keys and values after the rotation; what attention returns; the
# output projection; the MLP's two inner products; an adapter's inner product.
POLICIES: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "dots": ("qkv", "attention", "out", "mlp", "lora"),
    "save_qkv": ("qkv",),
    "save_attention": ("qkv", "attention"),
    "full": (),
}
"""Policy -> names that are kept beside each layer's input; None keeps whatever the gradient reads."""


def checkpoint(function: Callable[..., Any], policy: str, *, scanned: bool) -> Callable[..., Any]:
    """``function``, of which the backward pass finds only what ``policy`` keeps. scanned: it is the body of a ``lax.scan``."""
    names, policies = POLICIES[policy], jax.checkpoint_policies
    if names is not None:
        keep = policies.save_only_these_names(*names) if names else None
    elif current_mesh() is not None:
        keep = policies.save_anything_except_these_names(GATHERED)
    else:
        return function
    return jax.checkpoint(function, prevent_cse=not scanned, policy=keep)

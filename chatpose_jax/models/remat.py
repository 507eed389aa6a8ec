"""Rematerialisation: which activations of a layer are saved for the backward pass, which computes the rest again (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from chatpose_jax.models.sharding import GATHERED, current_mesh

# Names that the layers give to activations (checkpoint_name): "qkv" queries, keys and values after RoPE; "attention" its output; "out" the
# output projection; "mlp" the MLP's gate and up projections; "lora" x @ lora_a.
POLICIES: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "dots": ("qkv", "attention", "out", "mlp", "lora"),
    "save_qkv": ("qkv",),
    "save_attention": ("qkv", "attention"),
    "full": (),
}
"""Policy -> names of the activations that are saved in addition to each layer's input; None saves everything that the gradient needs."""


def checkpoint(function: Callable[..., Any], policy: str, *, scanned: bool, copies: bool = False) -> Callable[..., Any]:
    """``jax.checkpoint(function)`` by a row of ``POLICIES``. scanned: whether ``function`` is the body of a ``lax.scan``.

    copies: whether it takes its weights out of a stack by ``dynamic_slice``. On a mesh it all-gathers them, too.
    """
    names, policies = POLICIES[policy], jax.checkpoint_policies
    if names is not None:
        keep = policies.save_only_these_names(*names) if names else None
    elif copies or current_mesh() is not None:
        keep = _but_weights
    else:
        return function
    return jax.checkpoint(function, prevent_cse=not scanned, policy=keep)


def _but_weights(operation: Any, *_: Any, **parameters: Any) -> bool:
    """Saves every activation, and no copies of weights."""
    sliced = operation in (jax.lax.dynamic_slice_p, jax.lax.squeeze_p)
    return not (sliced or parameters.get("name") == GATHERED)

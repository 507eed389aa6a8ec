"""Int8 weights with one scale for each output channel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 127


def int8_scale(kernel: Any) -> Any:
    """(..., in, out) -> float32 (..., out): max|kernel| / 127 over the input axis, 1 where a column is all zero."""
    xp: Any = jnp if isinstance(kernel, jax.Array) else np
    largest = xp.max(xp.abs(kernel.astype(xp.float32)), axis=-2)
    # Multiply by 1/127: some compilers replace a division by a constant with this multiplication, and then the results would differ by rounding.
    return xp.where(largest > 0, largest * np.float32(1 / LARGEST), 1).astype(xp.float32)


def quantize_int8(kernel: Any) -> tuple[Any, Any]:
    """(..., in, out) -> int8 (..., in, out) and float32 scales (..., out), such that kernel ≈ int8 · scale.

    Symmetric, by ``int8_scale``; values are rounded half to even. NumPy in, NumPy out; JAX in, JAX out.
    """
    xp: Any = jnp if isinstance(kernel, jax.Array) else np
    kernel = kernel.astype(xp.float32)
    scale = int8_scale(kernel)
    return xp.rint(kernel / scale[..., None, :]).astype(xp.int8), scale

"""Kernels in few bits: int8 with one scale for each output channel, int4 with one for each output channel and group of inputs.

Both are symmetric, and each value is a code times its scale. NumPy in, NumPy out; JAX in, JAX out, and both round alike: a folder that was converted
and one that is quantised while it loads are the same base.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

GROUP = 128
"""Number of inputs that share a scale in int4. Where it does not divide the inputs, the largest smaller number that does."""

INT8 = np.dtype(np.int8)
INT4 = np.dtype(ml_dtypes.int4)


def _xp(array: Any) -> Any:
    return jnp if isinstance(array, jax.Array) else np


def int8_scale(kernel: Any) -> Any:
    """(..., in, out) -> float32 (..., out): max|kernel| / 127 over the input axis, 1 where a column is all zero."""
    xp = _xp(kernel)
    largest = xp.max(xp.abs(kernel.astype(xp.float32)), axis=-2)
    # Multiply by 1/127: some compilers replace a division by a constant with this multiplication, and then the results would differ by rounding.
    return xp.where(largest > 0, largest * np.float32(1 / 127), 1).astype(xp.float32)


def group_size(inputs: int) -> int:
    """The largest divisor of ``inputs`` that is at most ``GROUP``."""
    return next(size for size in range(min(GROUP, inputs), 0, -1) if inputs % size == 0)


def int4_scale(kernel: Any) -> Any:
    """(..., in, out) -> bfloat16 (..., groups, out).

    The value of the largest magnitude in a group becomes -8: its scale has the other sign, so that all 16 codes are used. The scale is 15/16 of
    what this value needs. That clips it by a sixteenth, and the finer steps more than make up for it: the mean square error of normal weights is
    7 % smaller. A group whose values are all below 1e-30 becomes zero.
    """
    xp = _xp(kernel)
    inputs, outputs = kernel.shape[-2:]
    size = group_size(inputs)
    grouped = kernel.astype(xp.float32).reshape(*kernel.shape[:-2], inputs // size, size, outputs)
    high, low = xp.max(grouped, axis=-2), xp.min(grouped, axis=-2)
    largest = xp.where(high > -low, high, low)
    scale = largest * np.float32(-15 / 16 / 8)  # exact: only the rounding to bfloat16 rounds
    return xp.where(xp.abs(largest) > 1e-30, scale, 1).astype(ml_dtypes.bfloat16)


def _by_group(kernel: Any, scale: Any) -> tuple[Any, Any]:
    """A kernel (..., in, out) as (..., groups, in / groups, out), and its scales, (..., out) or (..., groups, out), as (..., groups, 1, out)."""
    scale = scale[..., None, :] if scale.ndim < kernel.ndim else scale
    return kernel.reshape(*kernel.shape[:-2], scale.shape[-2], -1, kernel.shape[-1]), scale[..., None, :]


def dequantize(codes: Any, scale: Any, dtype: Any = np.float32) -> Any:
    """The values (..., in, out) that codes stand for, computed in ``dtype``; scale: (..., out) or (..., groups, out)."""
    grouped, scale = _by_group(codes, scale)
    return (grouped.astype(dtype) * scale.astype(dtype)).reshape(codes.shape)


def unpacked(codes: jax.Array) -> jax.Array:
    """int4 (..., n) as int8, by shifts of the bytes that hold two codes each; n must be even.

    What ``astype`` gives, but hidden from XLA's GPU compiler: for a product of what is converted from int4 it lays out the inputs innermost, and so
    would transpose the stacks of all layers into a second copy of the base.
    """
    pairs = jax.lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], -1, 2), jnp.int8)
    return jnp.stack([jnp.left_shift(pairs, 4) >> 4, pairs >> 4], axis=-1).reshape(codes.shape)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a kernel is stored: codes in place of it, beside a parameter ``scale``. measure: kernel -> scales."""

    codes: np.dtype
    scale: str
    measure: Callable[[Any], Any]

    def __call__(self, kernel: Any) -> tuple[Any, Any]:
        """(..., in, out) -> codes of the same shape, the nearest, half to even; and their scales."""
        xp, limits, scale = _xp(kernel), jnp.iinfo(self.codes), self.measure(kernel)
        grouped, step = _by_group(kernel.astype(xp.float32), scale)
        # Not a division: XLA would replace it by this product, and half of a step would then round to one side in NumPy and to the other in XLA.
        codes = xp.clip(xp.rint(grouped * (1 / step.astype(xp.float32))), limits.min, limits.max)
        return codes.astype(self.codes).reshape(kernel.shape), scale

    def scale_path(self, kernel: str) -> str:
        """The path of the scales of the kernel at this path."""
        return kernel.removesuffix("kernel") + self.scale


QUANTIZATIONS: dict[str, Quantization] = {
    "int8": Quantization(INT8, "kernel_scale", int8_scale),
    "int4": Quantization(INT4, "group_scale", int4_scale),
}
"""The choices of ``model.quantize``, besides "none"."""


def nbytes(array: Any) -> int:
    """Bytes of an array, or of an abstract one, on a device. NumPy counts a whole byte for each int4."""
    return math.prod(array.shape) * jax.dtypes.itemsize_bits(np.dtype(array.dtype)) // 8

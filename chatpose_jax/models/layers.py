"""Layers that the vision tower and the decoder share: Linear with an optional LoRA adapter, norms, stacked layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from chatpose_jax.models.config import LoRAConfig
from chatpose_jax.models.quantize import QUANTIZATIONS, dequantize, unpacked
from chatpose_jax.models.sharding import STORED, Logical, gather_weight, platform, splits

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def scaled_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal with standard deviation 1/sqrt(fan_in), fan_in being the second last axis."""
    return (jax.random.normal(key, shape) * shape[-2] ** -0.5).astype(dtype)


def contract(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``einsum(spec, a, b)`` of two arrays of the same dtype, with a float32 result.

    Each index of ``spec`` appears in exactly two of ``a``, ``b`` and the output, so that both gradients are einsums too.

    XLA's CPU backend has native bfloat16 matmuls only with a float32 result. JAX's own gradient of such a matmul multiplies float32 by
    bfloat16, which is slow on every platform; here the gradient is computed in the dtype of the operands.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b)
    return _contract(spec, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _contract_forward(spec: str, a: Any, b: Any) -> tuple[jax.Array, Any]:
    # Where an operand is frozen, its gradient is not needed, so the other operand is not saved. A scalar takes its place because JAX expects the
    # same number of residuals each time that rematerialisation traces this function.
    nothing = jnp.zeros((), a.value.dtype)
    kept = (b.value if a.perturbed else nothing, a.value if b.perturbed else nothing)
    return _contract(spec, a.value, b.value), kept


def _contract_backward(spec: str, kept: Any, gradient: Any) -> tuple[Any, Any]:
    terms, out = spec.split("->")

    def product(term: str, other: jax.Array, other_term: str) -> jax.Array | None:
        if other.ndim == 0 or isinstance(gradient, jax.custom_derivatives.SymbolicZero):
            return None
        size = dict(zip(out + other_term, gradient.shape + other.shape))
        if platform() == "cpu" and len(term) == 2 and size[term[0]] > 4 * size[term[1]]:
            # XLA's CPU backend takes several times as long for a tall, narrow product, such as the gradient of an adapter's first factor, as for its
            # transpose. Without the barrier it would turn the one into the other again.
            turned = _contract(f"{out},{other_term}->{term[::-1]}", gradient.astype(other.dtype), other)
            return jax.lax.optimization_barrier(turned).T.astype(other.dtype)
        return _contract(f"{out},{other_term}->{term}", gradient.astype(other.dtype), other).astype(other.dtype)

    first, second = terms.split(",")
    return product(first, kept[0], second), product(second, kept[1], first)


_contract.defvjp(_contract_forward, _contract_backward, symbolic_zeros=True)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``einsum(spec, a, b)`` of two arrays of the same dtype, with a result in that dtype; ``spec`` as in ``contract``."""
    if a.dtype == jnp.float32 or platform() != "cpu":
        # On GPU and TPU a float32 result would only double the bytes of tensor parallelism's all-reduce.
        return jnp.einsum(spec, a, b)
    return contract(spec, a, b).astype(a.dtype)


def matmul(x: jax.Array, kernel: jax.Array, axes: str = "io") -> jax.Array:
    """(..., in) @ (in, out) -> (..., out) in x's dtype; ``kernel`` is cast to it. axes: "oi" for a kernel stored as (out, in)."""
    kernel = kernel.astype(x.dtype)
    if platform() != "cpu":
        rows = "abcdef"[: x.ndim - 1]
        return product(f"{rows}i,{axes}->{rows}o", x, kernel)
    # On CPU, XLA copies arrays of more than two axes to transpose them, which would take most of the time of the kernel's gradient: flatten first.
    # It also has no bfloat16 matrix-vector product: a single row is doubled to use the matrix product.
    flat = x.reshape(-1, x.shape[-1])
    lone = len(flat) == 1 and x.dtype != jnp.float32
    y = _contract(f"ni,{axes}->no", jnp.concatenate([flat, flat]) if lone else flat, kernel)
    return y[: len(flat)].astype(x.dtype).reshape(*x.shape[:-1], kernel.shape[axes.index("o")])


FEW = 32
"""Up to so many rows, ``int4_matmul`` multiplies group by group."""


@jax.custom_vjp
def int4_matmul(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """(..., in) @ dequantised (in, out) -> (..., out) in x's dtype; codes (in, out) int4 and scale (groups, out), which have no gradient.

    Few rows, as when a token is decoded, are multiplied with the codes, and then each group's sums with its scale: XLA reads int4 straight into the
    product, on TPU and (by Triton) on GPU, so a step reads a quarter of what it reads in bfloat16. For many rows these sums would be larger than the
    kernel, which therefore becomes an array in x's dtype first, one layer at a time. The backward pass makes it again. On CPU that is faster for few
    rows too.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW or platform() == "cpu":
        return matmul(x, _whole(codes, scale, x.dtype))
    return by_groups(rows, codes, scale).reshape(*x.shape[:-1], codes.shape[-1])


def by_groups(rows: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """(N, in) @ dequantised (in, out) -> (N, out) in the dtype of ``rows``: the products of each group of inputs, then their sum by the scales.

    XLA's CPU backend has no such product in bfloat16.
    """
    # XLA makes a product of a single row elementwise, and then does not fuse what it takes: the row is doubled.
    parts = jnp.concatenate([rows, rows]) if len(rows) == 1 else rows
    parts = parts.reshape(len(parts), len(scale), -1)
    grouped = codes.reshape(len(scale), -1, codes.shape[-1]).astype(rows.dtype)
    sums = jnp.einsum("ngi,gio->ngo", parts, grouped, preferred_element_type=jnp.float32)
    return jnp.sum(sums * scale.astype(jnp.float32), axis=1)[: len(rows)].astype(rows.dtype)


def _int4_forward(x: jax.Array, codes: jax.Array, scale: jax.Array) -> tuple[jax.Array, Any]:
    return int4_matmul(x, codes, scale), (codes, scale)


def _int4_backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    codes, scale = kept
    return matmul(gradient, _whole(codes, scale, gradient.dtype), "oi"), None, None


def _whole(codes: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The kernel in ``dtype``."""
    hide = platform() == "gpu" and codes.shape[-1] % 2 == 0
    return dequantize(unpacked(codes) if hide else codes, scale, dtype)


int4_matmul.defvjp(_int4_forward, _int4_backward)


def whole_groups(scale: jax.Array, inputs: int, rows: str | None) -> jax.Array:
    """The scales (groups, out) of a kernel with this many inputs, of finer groups if a mesh splits the inputs within a group: then each shard
    holds whole ones, and the product moves no codes.
    """
    ways, groups = splits(rows), len(scale)
    finer = ways // math.gcd(groups, ways)
    return scale if inputs % ways or inputs // groups % finer else jnp.repeat(scale, finer, axis=0)


def adapter_axes(rows: str | None, columns: str | None) -> tuple[Logical, Logical]:
    """Logical axes of the long sides of ``lora_a`` and ``lora_b``, given those of the kernel: all mesh axes that split the kernel split them."""
    long = {"embed": "embed", "heads": ("heads", "embed"), "mlp": ("mlp", "embed"), None: None}
    return long[rows], long[columns]


def group_axes(rows: str | None, columns: str | None) -> tuple[Logical, Logical]:
    """Logical axes of ``group_scale``, given those of the kernel. Its groups are few: what "embed" splits in the kernel's inputs, it splits in the
    outputs here.
    """
    return (None, adapter_axes(None, columns)[1]) if rows == STORED else (rows, columns)


class Linear(nnx.Module):
    """``x @ kernel + bias``, plus ``(alpha/rank) · dropout(x) @ lora_a @ lora_b`` where the layer is adapted (Hu et al. 2021).

    The kernel is (in, out). ``lora_b`` is initialised to zero, so that a new adapter changes nothing. Adapters are stored in float32 and cast to
    ``dtype`` for the matmul.

    quantize: "int8" stores codes in place of the kernel, beside ``kernel_scale`` (out,) float32; "int4" beside ``group_scale`` (groups, out)
        bfloat16, see ``models.quantize``. An all-gather then moves codes.
    axes: the kernel's logical axes, for ``gather_weight``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        lora: LoRAConfig | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        kernel_init: Init = scaled_normal,
        quantize: str = "none",
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        self.axes = axes
        kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        kernel, scale = QUANTIZATIONS[quantize](kernel) if quantize in QUANTIZATIONS else (kernel, None)
        self.kernel = nnx.Param(kernel)
        self.kernel_scale = nnx.Param(scale) if quantize == "int8" else None
        self.group_scale = nnx.Param(scale) if quantize == "int4" else None
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if bias else None
        self.lora_scale = lora.scale if lora else 0.0
        self.lora_dropout = lora.dropout if lora else 0.0
        self.lora_a = (
            nnx.LoRAParam(scaled_normal(rngs.params(), (in_features, lora.rank), jnp.float32)) if lora else None
        )
        self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, out_features), jnp.float32)) if lora else None

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """(..., in) -> (..., out) in ``dtype``. Dropout applies to the adapter's input only, and only when a key is given."""
        x = x.astype(self.dtype)
        kernel = gather_weight(self.kernel[...], *self.axes)
        if self.group_scale is None:
            y = matmul(x, kernel)
        else:
            scale = gather_weight(self.group_scale[...], *group_axes(*self.axes))
            y = int4_matmul(x, kernel, whole_groups(scale, len(kernel), self.axes[0]))
        if self.kernel_scale is not None:
            y = (y * self.kernel_scale[...]).astype(self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            if dropout_key is not None and self.lora_dropout > 0:
                keep = 1.0 - self.lora_dropout
                x = jnp.where(jax.random.bernoulli(dropout_key, keep, x.shape), x / keep, 0)
                if platform() == "tpu":
                    # Otherwise the compiler draws the random bits inside the products, in kernels that take very long to compile (docs/scaling.md).
                    x = jax.lax.optimization_barrier(x)
            rows, columns = adapter_axes(*self.axes)
            inner = checkpoint_name(matmul(x, gather_weight(self.lora_a[...], rows, None)), "lora")
            y = y + matmul(inner, gather_weight(self.lora_b[...], None, columns)) * self.lora_scale
        return y


class RMSNorm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019) as LLaMA computes it: normalise in float32, cast to the input's dtype, then scale."""

    def __init__(self, width: int, *, eps: float, param_dtype: Any):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (..., D), same dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias, statistics in float32."""

    def __init__(self, width: int, *, eps: float, param_dtype: Any):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (..., D), same dtype."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def make_layers(
    create: Callable[[nnx.Rngs], nnx.Module],
    count: int,
    *,
    scan: bool,
    rngs: nnx.Rngs,
    plain: Callable[[nnx.Rngs], nnx.Module] | None = None,
    leading: int = 0,
) -> Any:
    """``count`` layers: one module whose arrays have a leading layer axis (scan), or a list of modules.

    plain: creates the first ``leading`` layers, which have no adapters. Where layers are stacked, those of the others have fewer rows.
    """
    if not scan:
        return nnx.List([(plain if plain and i < leading else create)(rngs) for i in range(count)])

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def stacked(rngs: nnx.Rngs) -> nnx.Module:
        return create(rngs)

    layers = stacked(rngs)
    if leading:
        nnx.update(layers, jax.tree.map(lambda x: x[leading:], nnx.state(layers, nnx.LoRAParam)))
    return layers

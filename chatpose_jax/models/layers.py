"""The parts that both towers share: Linear with an optional low-rank adapter, norms, stacked layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from chatpose_jax.models.config import LoRAConfig
from chatpose_jax.models.quantize import quantize_int8
from chatpose_jax.models.sharding import Logical, gather, platform

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def scaled_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal with standard deviation 1/sqrt(fan_in), fan_in being the second last axis."""
    return (jax.random.normal(key, shape) * shape[-2] ** -0.5).astype(dtype)


def contract(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``einsum(spec, a, b)`` of two arrays of one dtype, as float32; every index must stand in two of the three terms.

    XLA's CPU backend multiplies bfloat16 natively only where the result is float32, and JAX's own gradient of such a
    product would mix float32 with bfloat16, which is slow everywhere: here the gradient stays in the operands' dtype.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b)
    return _contract(spec, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _contract_forward(spec: str, a: Any, b: Any) -> tuple[jax.Array, Any]:
    # A frozen operand needs no gradient, so the other one need not be kept for it. A number stands in its place: rematerialisation traces this
    # more than once, and JAX wants as many kept arrays each time.
    nothing = jnp.zeros((), a.value.dtype)
    kept = (b.value if a.perturbed else nothing, a.value if b.perturbed else nothing)
    return _contract(spec, a.value, b.value), kept


def _contract_backward(spec: str, kept: Any, gradient: Any) -> tuple[Any, Any]:
    terms, out = spec.split("->")

    def product(term: str, other: jax.Array, other_term: str) -> jax.Array | None:
        if other.ndim == 0 or isinstance(gradient, jax.custom_derivatives.SymbolicZero):
            return None
        return _contract(f"{out},{other_term}->{term}", gradient.astype(other.dtype), other).astype(other.dtype)

    first, second = terms.split(",")
    return product(first, kept[0], second), product(second, kept[1], first)


_contract.defvjp(_contract_forward, _contract_backward, symbolic_zeros=True)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``einsum(spec, a, b)`` of two arrays of one dtype, in that dtype; see ``contract``."""
    if a.dtype == jnp.float32 or platform() != "cpu":
        # Elsewhere a float32 result would only double what tensor parallelism has to sum over the network.
        return jnp.einsum(spec, a, b)
    return contract(spec, a, b).astype(a.dtype)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(..., in) @ (in, out) -> (..., out) in x's dtype; ``kernel`` is cast to it."""
    kernel = kernel.astype(x.dtype)
    if platform() != "cpu":
        rows = "abcdef"[: x.ndim - 1]
        return product(f"{rows}i,io->{rows}o", x, kernel)
    # XLA's CPU backend transposes arrays of more than two axes by copying them, which the kernel's gradient would take most of its time for; and it
    # has no bfloat16 matrix-vector product: a lone row goes through the matrix product as two.
    flat = x.reshape(-1, x.shape[-1])
    lone = len(flat) == 1 and x.dtype != jnp.float32
    y = product("ni,io->no", jnp.concatenate([flat, flat]) if lone else flat, kernel)
    return y[: len(flat)].reshape(*x.shape[:-1], kernel.shape[-1])


def adapter_axes(rows: str | None, columns: str | None) -> tuple[Logical, Logical]:
    """Logical axes of an adapter's long sides, by its kernel's: split over whatever its kernel is split over."""
    long = {"embed": "embed", "heads": ("heads", "embed"), "mlp": ("mlp", "embed"), None: None}
    return long[rows], long[columns]


class Linear(nnx.Module):
    """``x @ kernel + bias``, plus ``(alpha/rank) · dropout(x) @ lora_a @ lora_b`` where the layer is adapted (Hu et al. 2021).

    The kernel is (in, out). ``lora_b`` starts at zero, so an adapted layer begins as its base. Adapters are float32, cast at use.

    quantize: keep the kernel as int8 beside ``kernel_scale`` (out,) float32, see ``quantize_int8``. axes: the kernel's logical axes, by which it is
    gathered over a mesh; in int8 at half the traffic.
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
        quantize: bool = False,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        self.axes = axes
        kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        kernel, scale = quantize_int8(kernel) if quantize else (kernel, None)
        self.kernel = nnx.Param(kernel)
        self.kernel_scale = None if scale is None else nnx.Param(scale)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if bias else None
        self.lora_scale = lora.scale if lora else 0.0
        self.lora_dropout = lora.dropout if lora else 0.0
        self.lora_a = (
            nnx.LoRAParam(scaled_normal(rngs.params(), (in_features, lora.rank), jnp.float32)) if lora else None
        )
        self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, out_features), jnp.float32)) if lora else None

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """(..., in) -> (..., out) in ``dtype``. Dropout acts only on the adapter's input, and only when a key is given."""
        x = x.astype(self.dtype)
        y = matmul(x, gather(self.kernel[...], *self.axes))
        if self.kernel_scale is not None:
            y = (y * self.kernel_scale[...]).astype(self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            if dropout_key is not None and self.lora_dropout > 0:
                keep = 1.0 - self.lora_dropout
                x = jnp.where(jax.random.bernoulli(dropout_key, keep, x.shape), x / keep, 0)
            rows, columns = adapter_axes(*self.axes)
            inner = checkpoint_name(matmul(x, gather(self.lora_a[...], rows, None)), "lora")
            y = y + matmul(inner, gather(self.lora_b[...], None, columns)) * self.lora_scale
        return y


class RMSNorm(nnx.Module):
    """Zhang & Sennrich 2019, as LLaMA computes it: normalise in float32, cast back, then scale."""

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


def make_layers(create: Callable[[nnx.Rngs], nnx.Module], count: int, *, scan: bool, rngs: nnx.Rngs) -> Any:
    """``count`` layers: one module whose arrays have a leading layer axis (scan), or a list of modules."""
    if not scan:
        return nnx.List([create(rngs) for _ in range(count)])

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def stacked(rngs: nnx.Rngs) -> nnx.Module:
        return create(rngs)

    return stacked(rngs)

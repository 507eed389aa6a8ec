"""The parts that both towers share: Linear with an optional low-rank adapter, norms, attention, stacked layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.models.config import LoRAConfig

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def scaled_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal with standard deviation 1/sqrt(fan_in), fan_in being the second last axis."""
    return (jax.random.normal(key, shape) * shape[-2] ** -0.5).astype(dtype)


class Linear(nnx.Module):
    """``x @ kernel + bias``, plus ``(alpha/rank) · dropout(x) @ lora_a @ lora_b`` where the layer is adapted (Hu et al. 2021).

    The kernel is (in, out). ``lora_b`` starts at zero, so an adapted layer begins as its base. Adapters are float32, cast at use.
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
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if bias else None
        self.lora_scale = lora.scale if lora else 0.0
        self.lora_dropout = lora.dropout if lora else 0.0
        self.lora_a = nnx.LoRAParam(scaled_normal(rngs.params(), (in_features, lora.rank), jnp.float32)) if lora else None
        self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, out_features), jnp.float32)) if lora else None

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """(..., in) -> (..., out) in ``dtype``. Dropout acts only on the adapter's input, and only when a key is given."""
        x = x.astype(self.dtype)
        y = x @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            if dropout_key is not None and self.lora_dropout > 0:
                keep = 1.0 - self.lora_dropout
                x = jnp.where(jax.random.bernoulli(dropout_key, keep, x.shape), x / keep, 0)
            y = y + (x @ self.lora_a[...].astype(self.dtype)) @ self.lora_b[...].astype(self.dtype) * self.lora_scale
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


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads; softmax in float32.

    Args:
        q: (B, T, H, K).
        k, v: (B, G, S, K), G dividing H: query head h reads key/value head h // (H/G).
        mask: bool, broadcastable to (B, T, S), True where attended; None attends everywhere. Masked scores are the dtype's minimum rather
            than -inf, so rows that attend nowhere stay finite.

    Returns:
        (B, T, H*K) in q's dtype.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, length, groups, heads // groups, width) * jnp.asarray(width**-0.5, q.dtype)
    scores = jnp.einsum("btgrk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrts,bgsk->btgrk", weights, v).reshape(batch, length, heads * width)


def make_layers(create: Callable[[nnx.Rngs], nnx.Module], count: int, *, scan: bool, rngs: nnx.Rngs) -> Any:
    """``count`` layers: one module whose arrays have a leading layer axis (scan), or a list of modules."""
    if not scan:
        return nnx.List([create(rngs) for _ in range(count)])

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def stacked(rngs: nnx.Rngs) -> nnx.Module:
        return create(rngs)

    return stacked(rngs)

"""Attention: a portable implementation, cuDNN's flash attention (GPU) and splash attention (TPU)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from chatpose_jax.errors import UserError
from chatpose_jax.models.layers import contract
from chatpose_jax.models.sharding import RULES, current_mesh, platform

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q, k, v) -> (B, T, H*K); shapes as in ``attention``."""

LANES = 128
"""Splash attention needs sequences and heads whose sizes are multiples of this."""
LARGEST_BLOCK = 512
LEAST_LENGTH_OF_HALVES = 256
"""Shorter sequences are not split in halves: that would save less time than it costs to compile."""


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, bias: jax.Array | None = None
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads; softmax in float32.

    Args:
        q: (B, T, H, K).
        k, v: (B, G, S, K), G dividing H: query head h reads key/value head h // (H/G).
        mask: bool, broadcastable to (B, T, S), True where a query may attend to a key; None means everywhere. Masked scores are the dtype's
            minimum rather than -inf, so that the output stays finite for queries with no key.
        bias: (B, H, T, S) float32, added to the scores.

    Returns:
        (B, T, H*K) in q's dtype.
    """
    batch, length, heads, width = q.shape
    groups, dtype = k.shape[1], q.dtype
    if platform() == "cpu":  # batched bfloat16 matmuls are slow on CPU, and fail for some layouts
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    # This order of axes avoids a transposed copy of the output, which XLA's CPU backend makes otherwise.
    q = q.reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    scores = contract("bgrtk,bgsk->bgrts", q * jnp.asarray(width**-0.5, q.dtype), k)
    if bias is not None:
        scores += bias.reshape(scores.shape)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = contract("bgrts,bgsk->bgrtk", weights, v).astype(dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads * width)


def causal_attention(setting: str, length: int, head_dim: int, dtype: Any, segments: jax.Array | None) -> Attend:
    """Causal self-attention of whole sequences: a token attends to itself and to earlier tokens of its segment.

    Args:
        setting: ``ModelConfig.attention``. "auto" is splash on TPU and cuDNN on GPU where they support this head size and dtype, else the
            portable implementation. On CPU splash runs in interpret mode, which is slow and meant for tests.
        length: T.
        head_dim: K.
        dtype: of q, k and v.
        segments: (B, T) int32. Tokens attend only within their segment; 0 marks padding, which no other token attends to. None means that each
            row is one segment.

    Raises UserError for a setting that the platform, the head size or the dtype does not support.
    """
    kernel = _choose(setting, head_dim, jnp.dtype(dtype))
    if kernel == "splash":
        return _splash(length, segments)
    same = None if segments is None else segments[:, :, None] == segments[:, None, :]
    if kernel == "cudnn":
        return lambda q, k, v: _cudnn(q, k, v, None if same is None else same[:, None])
    mask = jnp.tri(length, dtype=bool)[None]
    if segments is not None:
        query, key = segments[:, :, None], segments[:, None, :]
        mask &= (key > 0) & ((query == key) | (query == 0))
    return lambda q, k, v: _halves(q, k, v, mask)


def _halves(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """``attention`` with a causal mask. For long sequences the first half of the queries attends to the first half of the keys only, so that
    3/4 of all scores are computed.
    """
    length, mesh = q.shape[1], current_mesh()
    # Where the mesh's tensor axis does not divide the key/value heads, each half would gather keys and values again.
    whole = mesh is not None and RULES.spec((None, "heads"), k.shape[:2], mesh)[1] is None
    if whole or length < LEAST_LENGTH_OF_HALVES:
        return attention(q, k, v, mask)
    half = length // 2
    first = attention(q[:, :half], k[:, :, :half], v[:, :, :half], mask[:, :half, :half])
    return jnp.concatenate([first, attention(q[:, half:], k, v, mask[:, half:])], axis=1)


def _choose(setting: str, head_dim: int, dtype: Any) -> str:
    where, half = platform(), dtype in (jnp.bfloat16, jnp.float16)
    fits = {"cudnn": half and head_dim % 8 == 0 and head_dim <= 128, "splash": head_dim % LANES == 0}
    if setting == "auto":
        best = {"gpu": "cudnn", "tpu": "splash"}.get(where, "xla")
        return best if fits.get(best) else "xla"
    if setting == "cudnn" and (where != "gpu" or not fits["cudnn"]):
        raise UserError(
            f"model.attention='cudnn' needs a GPU, bfloat16 or float16 and heads of a multiple of 8 up to 128; "
            f"found {where}, {dtype}, {head_dim}: set model.attention=auto"
        )
    if setting == "splash" and (where == "gpu" or (where == "tpu" and not fits["splash"])):
        raise UserError(
            f"model.attention='splash' needs a TPU and heads of a multiple of {LANES}; found {where}, {head_dim}: set model.attention=auto"
        )
    return setting


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Flash attention (Dao et al. 2022) of NVIDIA's cuDNN. mask: (B, 1, T, T), applied together with the causal mask."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    return y.reshape(*q.shape[:2], -1)


def _splash(length: int, segments: jax.Array | None) -> Attend:
    """Splash attention of ``jax.experimental.pallas``, which skips the blocks above the diagonal.

    A sequence is padded to a multiple of the block size; the padding is a segment of its own. On a mesh each device computes its own rows and
    heads (``shard_map``).
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    padded = -(-length // LANES) * LANES
    block = math.gcd(padded, LARGEST_BLOCK)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def pad(x: jax.Array, axis: int, value: int = 0) -> jax.Array:
        widths = [(0, padded - length if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=value) if padded > length else x

    ids = None if segments is None else pad(segments, 1, -1)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        mask = splash.MultiHeadMask([splash.CausalMask((padded, padded))] * q.shape[1])
        kernel = splash.make_splash_mha(
            mask,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="attention",
            interpret=platform() == "cpu",
        )
        if ids is None:
            return jax.vmap(kernel)(q, k, v)
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids)))(q, k, v, ids)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        batch, _, heads, width = q.shape
        q = pad((q * jnp.asarray(width**-0.5, q.dtype)).swapaxes(1, 2), 2)
        k, v = pad(k, 2), pad(v, 2)
        mesh = current_mesh()
        if mesh is None:
            y = local(q, k, v, ids)
        else:
            rows, split, _, _ = RULES.spec(("batch", "heads", None, None), k.shape, mesh)
            spec = PartitionSpec(rows, split)
            y = jax.shard_map(
                local, mesh=mesh, in_specs=(spec, spec, spec, PartitionSpec(rows)), out_specs=spec, check_vma=False
            )(q, k, v, ids)
        return y[:, :, :length].swapaxes(1, 2).reshape(batch, length, heads * width)

    return attend

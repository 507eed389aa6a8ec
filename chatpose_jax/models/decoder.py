"""The decoder of LLaMA (Touvron et al. 2023) and its relatives: RMSNorm, rotary positions, grouped-query attention, SwiGLU, a KV cache.

What sets Llama 3, SmolLM2, Qwen2 and Qwen3 apart are fields of ``TextConfig``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding

from chatpose_jax.models.attention import Attend
from chatpose_jax.models.config import LoRAConfig, ModelConfig, TextConfig
from chatpose_jax.models.heads import head_class
from chatpose_jax.models.layers import Linear, RMSNorm, make_layers, matmul, scaled_normal
from chatpose_jax.models.remat import checkpoint
from chatpose_jax.models.sharding import RULES, constrain, gather_weight, platform
from chatpose_jax.settings import one_line

CACHE_AXES = ("batch", "heads", None, None)
"""Logical axes of a layer's keys and values in the cache."""
STATE_AXES = ("batch", None, None)
"""Logical axes of the final states in the cache."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all tokens so far, and their final states where the pose head reads the conversation.

    Token n of a row is in slot n. What a row holds from slot ``lengths`` on is never read: to forget the end of a conversation, lower its length.

    keys, values: one (B, G, S, K) array for each layer; with scanned layers one (L, B, G, S, K) array.
    lengths: (B,) int32, number of tokens of each row, which is also the slot and the position of its next token.
    states: (B, S, D) after the final norm, in the compute dtype, for a pose head that reads the conversation; None for others.
    """

    keys: Any
    values: Any
    lengths: jax.Array
    states: jax.Array | None = None

    __repr__ = one_line

    @property
    def capacity(self) -> int:
        """S."""
        return int(jax.tree.leaves(self.keys)[0].shape[-2])


def init_cache(config: ModelConfig, batch: int, capacity: int, mesh: Mesh | None = None) -> KVCache:
    """An empty cache of ``capacity`` slots in the compute dtype. mesh: its rows and heads are sharded on it; None is one device.

    It keeps final states where the pose head of ``config`` reads the conversation.
    """
    text = config.text
    shape = (batch, text.num_kv_heads, capacity, text.head_dim)

    def zeros(shape: tuple[int, ...], dtype: Any, *logical: Any) -> Any:
        device = None if mesh is None else NamedSharding(mesh, RULES.spec(logical, shape, mesh))
        return jnp.zeros(shape, dtype, device=device)

    def layers() -> Any:
        if config.scan_layers:
            return zeros((text.num_layers, *shape), config.dtype, *CACHE_AXES)
        return tuple(zeros(shape, config.dtype, *CACHE_AXES) for _ in range(text.num_layers))

    reads = head_class(config.head.name).reads
    states = zeros((batch, capacity, text.hidden_size), config.dtype, *STATE_AXES) if reads == "conversation" else None
    return KVCache(layers(), layers(), zeros((batch,), jnp.int32, "batch"), states)


def extend(cache: jax.Array, new: jax.Array, lengths: jax.Array, rows: jax.Array | None = None) -> jax.Array:
    """cache (B, …, S, K) with new (R, …, T, K) from slot ``lengths`` (R,) on, in all rows or in ``rows`` (R,). ``lengths + T`` must not exceed S."""
    if rows is None:
        return jax.vmap(lambda old, new, n: jax.lax.dynamic_update_slice_in_dim(old, new, n, axis=old.ndim - 2))(
            cache, new, lengths
        )
    where = jax.lax.ScatterDimensionNumbers(tuple(range(1, new.ndim)), (0,), (0, new.ndim - 2))
    return jax.lax.scatter(
        cache, jnp.stack([rows, lengths], axis=1), new, where, unique_indices=True, mode="promise_in_bounds"
    )


def _place(cache: KVCache, rows: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """The lengths of these rows, and the rows: what ``extend`` needs to know."""
    return (cache.lengths if rows is None else cache.lengths[rows]), rows


def frequencies(text: TextConfig) -> jax.Array:
    """(head_dim / 2,) float32 angles per position of RoPE (Su et al. 2021), stretched as ``TextConfig.rope_scaling`` says."""
    plain = text.rope_theta ** (-jnp.arange(0, text.head_dim, 2, dtype=jnp.float32) / text.head_dim)
    scaling = text.rope_scaling
    if scaling is None:
        return plain
    turns = scaling.original_context * plain / (2 * jnp.pi)
    kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    kept = jnp.clip(kept, 0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def rotary(positions: jax.Array, text: TextConfig) -> tuple[jax.Array, jax.Array]:
    """(B, T) positions -> cosines and sines (B, T, head_dim / 2) in float32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(text)
    if platform() != "cpu":
        return jnp.cos(angles), jnp.sin(angles)
    # On CPU, XLA would fuse cos and sin into every unrolled layer and compute them again for every head. It does not fuse operations out of a
    # loop, so they are computed in one.
    cos, sin = jax.lax.map(lambda second: jnp.where(second, jnp.sin(angles), jnp.cos(angles)), jnp.array([False, True]))
    return cos, sin


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate (B, T, H, K) by its positions; the halves of K pair up, as in LLaMA's released weights for transformers."""
    cos, sin = (part[:, :, None] for part in angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class DecoderAttention(nnx.Module):
    def __init__(self, text: TextConfig, projections: dict[str, LoRAConfig | None], **kwargs: Any):
        self.head_dim = text.head_dim
        inner, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        read, write = {**kwargs, "axes": ("embed", "heads")}, {**kwargs, "axes": ("heads", "embed")}
        read["bias"] = text.qkv_bias
        self.q_proj = Linear(text.hidden_size, inner, lora=projections["q_proj"], **read)
        self.k_proj = Linear(text.hidden_size, kv, lora=projections["k_proj"], **read)
        self.v_proj = Linear(text.hidden_size, kv, lora=projections["v_proj"], **read)
        self.o_proj = Linear(inner, text.hidden_size, lora=projections["o_proj"], **write)
        norm: dict[str, Any] = {"eps": text.rms_norm_eps, "param_dtype": jnp.dtype(kwargs["param_dtype"])}
        self.q_norm = RMSNorm(text.head_dim, **norm) if text.qk_norm else None
        self.k_norm = RMSNorm(text.head_dim, **norm) if text.qk_norm else None

    def __call__(
        self, x: jax.Array, angles: Any, attend: Attend, cache: Any, place: Any, keys: Any
    ) -> tuple[jax.Array, Any]:
        def project(linear: Linear, key: int, norm: RMSNorm | None = None) -> jax.Array:
            y = linear(x, None if keys is None else keys[key])
            y = y.reshape(*y.shape[:2], -1, self.head_dim)
            return y if norm is None else norm(y)

        q = rotate(project(self.q_proj, 0, self.q_norm), angles)
        k = rotate(project(self.k_proj, 1, self.k_norm), angles).swapaxes(1, 2)
        v = project(self.v_proj, 2).swapaxes(1, 2)
        q, k, v = (checkpoint_name(part, "qkv") for part in (q, k, v))
        if cache is not None:
            # Shard the new keys and values like the cache; otherwise the compiler may reshard the cache, which is far larger.
            k, v = (constrain(part, *CACHE_AXES) for part in (k, v))
            k, v = (extend(old, new, *place) for old, new in zip(cache, (k, v)))
            cache, rows = (k, v), place[1]
            k, v = (k, v) if rows is None else (k[rows], v[rows])
        y = checkpoint_name(attend(q, k, v), "attention")
        return checkpoint_name(self.o_proj(y, None if keys is None else keys[3]), "out"), cache


class DecoderMLP(nnx.Module):
    def __init__(self, text: TextConfig, projections: dict[str, LoRAConfig | None], **kwargs: Any):
        width, inner = text.hidden_size, text.intermediate_size
        read, write = {**kwargs, "axes": ("embed", "mlp")}, {**kwargs, "axes": ("mlp", "embed")}
        self.gate_proj = Linear(width, inner, lora=projections["gate_proj"], **read)
        self.up_proj = Linear(width, inner, lora=projections["up_proj"], **read)
        self.down_proj = Linear(inner, width, lora=projections["down_proj"], **write)

    def __call__(self, x: jax.Array, keys: Any) -> jax.Array:
        gate, up, down = (None, None, None) if keys is None else keys[4:]
        inner = checkpoint_name(self.gate_proj(x, gate), "mlp"), checkpoint_name(self.up_proj(x, up), "mlp")
        return self.down_proj(jax.nn.silu(inner[0]) * inner[1], down)


class DecoderLayer(nnx.Module):
    """Pre-norm block. Called with the layer's (keys, values) cache, or None, and the ``_place`` of the new tokens in it; ``dropout_key`` feeds its
    adapters."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        text, lora = config.text, config.lora
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        projections = {name: lora if lora is not None and name in lora.targets else None for name in names}
        kwargs: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        kwargs["quantize"] = config.quantize
        norm: dict[str, Any] = {"eps": text.rms_norm_eps, "param_dtype": jnp.dtype(config.param_dtype)}
        self.input_norm = RMSNorm(text.hidden_size, **norm)
        self.attn = DecoderAttention(text, projections, **kwargs)
        self.post_attention_norm = RMSNorm(text.hidden_size, **norm)
        self.mlp = DecoderMLP(text, projections, **kwargs)

    def __call__(
        self, x: jax.Array, angles: Any, attend: Attend, cache: Any = None, place: Any = None, dropout_key: Any = None
    ) -> tuple[jax.Array, Any]:
        keys = None if dropout_key is None else jax.random.split(dropout_key, 7)
        y, cache = self.attn(self.input_norm(x), angles, attend, cache, place, keys)
        x = x + y
        return constrain(x + self.mlp(self.post_attention_norm(x), keys), "batch", None, None), cache


class Embedding(nnx.Module):
    """Token embeddings. Rows from ``base_vocab_size`` on are a separate float32 parameter, ``added``: new tokens train while the rest is frozen."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        text = config.text
        self.base, self.dtype = text.base_vocab_size, jnp.dtype(config.dtype)
        shape = (text.base_vocab_size, text.hidden_size)
        self.embedding = nnx.Param((jax.random.normal(rngs.params(), shape) * 0.02).astype(config.param_dtype))
        self.added = nnx.Param(jax.random.normal(rngs.params(), (text.num_added_tokens, text.hidden_size)) * 0.02)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """(B, T) ids inside the vocabulary -> (B, T, D)."""
        rows = gather_weight(self.embedding[...], "vocabulary", "embed")[jnp.clip(ids, 0, self.base - 1)].astype(
            self.dtype
        )
        rows = constrain(rows, "batch", None, None)
        if self.added.shape[0] == 0:
            return rows
        added = self.added[...][jnp.clip(ids - self.base, 0, self.added.shape[0] - 1)].astype(self.dtype)
        return jnp.where((ids >= self.base)[..., None], added, rows)


class LMHead(nnx.Module):
    """Untied output projection, in two parameters like the embedding: ``kernel`` (D, base vocabulary) and ``added`` (D, new tokens)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        text = config.text
        self.kernel = nnx.Param(
            scaled_normal(rngs.params(), (text.hidden_size, text.base_vocab_size), config.param_dtype)
        )
        self.added = nnx.Param(scaled_normal(rngs.params(), (text.hidden_size, text.num_added_tokens), jnp.float32))


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        text = self.config = config.text
        self.dtype = jnp.dtype(config.dtype)
        self.scan, self.leading = config.scan_layers, config.leading_layers
        self.embed_tokens = Embedding(config, rngs=rngs)
        bare = config.replace(lora=None)
        self.layers = make_layers(
            lambda rngs: DecoderLayer(config, rngs=rngs),
            text.num_layers,
            scan=self.scan,
            rngs=rngs,
            plain=lambda rngs: DecoderLayer(bare, rngs=rngs),
            leading=self.leading,
        )
        self.plain = nnx.graphdef(nnx.eval_shape(lambda: DecoderLayer(bare, rngs=nnx.Rngs(0))))
        self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps, param_dtype=jnp.dtype(config.param_dtype))
        self.lm_head = None if text.tied else LMHead(config, rngs=rngs)

    @property
    def output_axes(self) -> str:
        """The order of the axes of ``output_weights``: "io" as (D, V), or "oi" as (V, D) where they are those of the embedding."""
        return "oi" if self.lm_head is None else "io"

    def output_weights(self) -> tuple[jax.Array, jax.Array]:
        """The LM head's weights of the base vocabulary and of the new tokens, as stored (``output_axes``)."""
        if self.lm_head is not None:
            return self.lm_head.kernel[...], self.lm_head.added[...]
        return self.embed_tokens.embedding[...], self.embed_tokens.added[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., D) -> (..., V) float32."""
        hidden = hidden.astype(self.dtype)
        scores = [matmul(hidden, weight, self.output_axes) for weight in self.output_weights()]
        return jnp.concatenate(scores, axis=-1).astype(jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cache: KVCache | None = None,
        rows: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
        remat: str = "none",
        led: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """Run all layers and the final norm.

        Args:
            x: (B, T, D) embeddings.
            positions: (B, T) rotary positions.
            attend: attention of T queries to S keys; S = T without a cache, the cache's capacity with one.
            cache: new keys and values are written from ``cache.lengths`` on; the caller updates ``lengths``.
            rows: (B,) int32, the rows of the cache that those of ``x`` continue; None for all in order.
            dropout_key: turns adapter dropout on.
            remat: which activations are saved for the backward pass, see ``models.remat``.
            led: ``x`` is the result of ``lead``, after which the other layers run. Not with a cache.

        Returns:
            hidden (B, T, D) after the final RMSNorm, and the cache with new keys, values and states.
        """
        first = self.leading if led else 0
        x, pairs = self._run(x, positions, attend, cache, rows, dropout_key, remat, first, self.config.num_layers)
        hidden = self.norm(x)
        if cache is not None:
            states = cache.states
            if states is not None:
                new = constrain(hidden, *STATE_AXES).astype(states.dtype)
                states = extend(states, new, *_place(cache, rows))
            cache = dataclasses.replace(cache, keys=pairs[0], values=pairs[1], states=states)
        return hidden, cache

    def lead(self, x: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """(B, T, D) embeddings -> (B, T, D) after the layers before the first with adapters (``ModelConfig.leading_layers``)."""
        return self._run(x, positions, attend, None, None, None, "none", 0, self.leading)[0]

    def _run(
        self,
        x: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cache: KVCache | None,
        rows: jax.Array | None,
        dropout_key: jax.Array | None,
        remat: str,
        first: int,
        last: int,
    ) -> tuple[jax.Array, Any]:
        """The layers from ``first`` up to ``last``, each of them 0, the number of leading layers, or that of all. Also returns keys and values."""
        angles = rotary(positions, self.config)
        place = None if cache is None else _place(cache, rows)
        kv = None if cache is None else (cache.keys, cache.values)
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers)

        def run(layer: DecoderLayer, x: jax.Array, kv: Any, key: Any) -> tuple[jax.Array, Any]:
            return layer(x, angles, attend, kv, place, key)

        if not self.scan:
            outputs, body = [], checkpoint(run, remat, scanned=False)
            for i in range(first, last):
                pair = None if cache is None else (cache.keys[i], cache.values[i])
                x, pair = body(self.layers[i], x, pair, None if keys is None else keys[i])
                outputs.append(pair)
            return x, None if cache is None else tuple(zip(*outputs))
        if not self.leading:
            body = checkpoint(run, remat, scanned=True)
            return jax.lax.scan(lambda x, part: body(part[0], x, *part[1:]), x, (self.layers, kv, keys))

        # Two loops, because only that of the layers with adapters may need a gradient. Each takes its layers out of the whole stack, one at a time:
        # slices of the stack would be copies of the base.
        split: Any = nnx.split(self.layers, nnx.LoRAParam, ...)
        graph, adapters, base = split

        def loop(x: jax.Array, begin: int, end: int, kind: Any, own: Any) -> tuple[jax.Array, Any]:
            def step(base: Any, x: jax.Array, index: jax.Array, own: Any, kv: Any, key: Any) -> Any:
                weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), base)
                return run(nnx.merge(kind, weights, own), x, kv, key)

            body = checkpoint(step, remat, scanned=True, copies=True)
            parts = jnp.arange(begin, end), own, *jax.tree.map(lambda a: a[begin:end], (kv, keys))
            return jax.lax.scan(lambda x, part: body(base, x, *part), x, parts)

        each = []
        for begin, end, kind, own in (
            (0, self.leading, self.plain, nnx.State({})),
            (self.leading, self.config.num_layers, graph, adapters),
        ):
            if first <= begin <= end <= last:
                x, pairs = loop(x, begin, end, kind, own)
                each.append(pairs)
        return x, None if cache is None else jax.tree.map(lambda *pairs: jnp.concatenate(pairs), *each)

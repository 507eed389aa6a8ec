"""A small transformer decoder (Vaswani et al. 2017) with one learned query for each joint, as in DETR (Carion et al. 2020). It attends to the
whole conversation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models.attention import attention
from chatpose_jax.models.heads.base import PoseHead, States
from chatpose_jax.models.heads.parts import ROTATIONS, sizes, start_numbers
from chatpose_jax.models.layers import Linear, RMSNorm, contract
from smpl_jax.pose import Pose


def _norm(width: int) -> RMSNorm:
    return RMSNorm(width, eps=1e-6, param_dtype=jnp.float32)


class Attention(nnx.Module):
    """Attention from ``x`` to ``memory``, both ``width`` wide, with projections of queries, keys, values and output."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.q_proj = Linear(width, width, axes=("embed", "heads"), rngs=rngs)
        self.k_proj = Linear(width, width, axes=("embed", "heads"), rngs=rngs)
        self.v_proj = Linear(width, width, axes=("embed", "heads"), rngs=rngs)
        self.o_proj = Linear(width, width, axes=("heads", "embed"), rngs=rngs)

    def __call__(
        self, x: jax.Array, memory: jax.Array, mask: jax.Array | None, bias: jax.Array | None = None
    ) -> jax.Array:
        """x (B, Q, W), memory (B, S, W), mask (B, Q, S) or None, bias (B, H, Q, S) or None -> (B, Q, W)."""
        q, k, v = (
            y.reshape(*y.shape[:-1], self.heads, -1) for y in (self.q_proj(x), self.k_proj(memory), self.v_proj(memory))
        )
        return self.o_proj(attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, bias))


def distance_bias(before: jax.Array, heads: int) -> jax.Array:
    """ALiBi (Press et al. 2022, section 3): (B, P, T) bool -> (B, H, P, T), minus the slope of a head by the number of visible tokens from each
    token to the last one. The slopes of H heads are 2^(-8/H), 2^(-16/H), …, 2^-8.
    """
    after = jnp.cumsum(before[..., ::-1], axis=-1)[..., ::-1] - 1.0
    slopes = 2.0 ** (-8.0 * jnp.arange(1, heads + 1) / heads)
    return -slopes[:, None, None] * jnp.maximum(after, 0)[:, None]


class JointLayer(nnx.Module):
    """A pre-norm layer: self-attention among the joints of a pose, cross-attention to the conversation, an MLP of four times the width."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.self_norm, self.self_attn = _norm(width), Attention(width, heads, rngs=rngs)
        self.cross_norm, self.cross_attn = _norm(width), Attention(width, heads, rngs=rngs)
        self.mlp_norm = _norm(width)
        self.fc1 = Linear(width, 4 * width, bias=True, rngs=rngs)
        self.fc2 = Linear(4 * width, width, bias=True, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array, memory: jax.Array, before: jax.Array, bias: jax.Array | None) -> jax.Array:
        """x (B, P, J, W), memory (B, T, W), before (B, P, T), bias (B, H, P, T) or None -> (B, P, J, W)."""
        batch, poses, joints, width = x.shape
        y = self.self_norm(x).reshape(batch * poses, joints, width)
        x = x + self.self_attn(y, y, None).reshape(x.shape)
        # The joints of all poses attend in one call, so that keys and values exist only once for each conversation.
        y = self.cross_norm(x).reshape(batch, poses * joints, width)
        before, bias = jnp.repeat(before, joints, axis=1), None if bias is None else jnp.repeat(bias, joints, axis=2)
        x = x + self.cross_attn(y, memory, before, bias).reshape(x.shape)
        return x + self.fc2(jax.nn.gelu(self.fc1(self.mlp_norm(x))))


class QueriesHead(PoseHead):
    """One learned query for each joint. Joints attend to each other in both directions, and to the states of the conversation up to their pose token.

    A projection of the token's own state is added to each query, so that the queries know which pose of the conversation they compute. Everything is
    float32, except for the projection of the conversation, which has the dtype of its states.

    layers, heads: layers and attention heads of the transformer. hidden: its width, a multiple of ``heads``.
    standardise: ``shift`` (D,) is added to the states, and ``scale`` (D,) multiplies the sum. ``train.head_start`` sets them from the mean and the
        standard deviation of states: all states of a language model have much in common, which hides what differs.
    recency: scores of the conversation fall with the distance from the pose token, by another slope in each attention head (ALiBi, Press et al.
        2022). So a fresh head reads the last words more than an earlier turn.
    """

    reads = "conversation"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        layers: int = 2,
        heads: int = 8,
        hidden: int = 512,
        standardise: bool = False,
        recency: bool = False,
    ):
        sizes(layers=layers, heads=heads, hidden=hidden)
        if hidden % heads:
            raise UserError(f"model.head.options: hidden={hidden} must be a multiple of heads={heads}")
        self.recency = recency
        self.shift = nnx.Param(jnp.zeros(width)) if standardise else None
        self.scale = nnx.Param(jnp.ones(width)) if standardise else None
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (self.num_joints, hidden)))
        self.token = Linear(width, hidden, axes=(None, None), rngs=rngs)
        self.memory = Linear(width, hidden, axes=(None, None), rngs=rngs)
        self.memory_norm, self.norm = _norm(hidden), _norm(hidden)
        self.layers = nnx.List([JointLayer(hidden, heads, rngs=rngs) for _ in range(layers)])
        for (
            layer
        ) in self.layers:  # attend evenly at first; random queries read a few random tokens, which training has to undo
            layer.cross_attn.q_proj.kernel[...] = layer.cross_attn.q_proj.kernel[...] * 0.01
        self.rotation = Linear(hidden, 6, axes=(None, None), rngs=rngs)
        self.rotation.kernel[...] = self.rotation.kernel[...] * 0.1
        self.start = nnx.Param(start_numbers("6d", self.num_joints))

    def __call__(self, states: States, key: jax.Array) -> Pose:
        assert states.conversation is not None and states.before is not None
        read, token = self._standard(states.conversation), self._standard(states.token)
        memory = self.memory_norm(contract("btd,dw->btw", read, self.memory.kernel[...].astype(read.dtype)))
        x = self.queries[...] + self.token(token)[..., None, :]
        bias = distance_bias(states.before, self.layers[0].cross_attn.heads) if self.recency else None
        for layer in self.layers:
            x = layer(x, memory, states.before, bias)
        return Pose(ROTATIONS["6d"].to_matrix(self.start[...] + self.rotation(self.norm(x))), "camera")

    def _standard(self, states: jax.Array) -> jax.Array:
        if self.shift is None or self.scale is None:
            return states
        return ((states.astype(jnp.float32) + self.shift[...]) * self.scale[...]).astype(states.dtype)

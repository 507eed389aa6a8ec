"""Small heads of every kind, states for them, and a way to train them on a few numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from chatpose_jax.models.config import HeadConfig
from chatpose_jax.models.heads import create_head
from chatpose_jax.models.heads.base import PoseHead, States
from chatpose_jax.models.heads.parts import measured_mean
from smpl_jax.pose import Pose

WIDTH = 16

HEADS = {
    "mlp": HeadConfig("mlp"),
    "svd9d": HeadConfig("mlp", (("rotation", "svd9d"),)),
    "quaternion": HeadConfig("mlp", (("rotation", "quaternion"),)),
    "axis_angle": HeadConfig("mlp", (("rotation", "axis_angle"),)),
    "shape": HeadConfig("shape"),
    "queries": HeadConfig("queries", (("layers", 1), ("heads", 2), ("hidden", 16))),
    "flow": HeadConfig("flow", (("steps", 3), ("layers", 1), ("hidden", 32))),
    "gaussian": HeadConfig("gaussian"),
}


@functools.cache
def make(name: str) -> PoseHead:
    return nnx.jit(lambda: create_head(HEADS[name], WIDTH, rngs=nnx.Rngs(0)))()  # type: ignore[no-any-return]


def states(batch: int = 2, poses: int = 3, length: int = 7, seed: int = 0) -> States:
    """Random ones; pose p may see the first ``length - poses + p + 1`` of the conversation."""
    token, conversation = jax.random.split(jax.random.key(seed))
    seen = jnp.arange(length) <= length - poses + jnp.arange(poses)[:, None]
    return States(
        jax.random.normal(token, (batch, poses, WIDTH)),
        jax.random.normal(conversation, (batch, length, WIDTH)),
        jnp.broadcast_to(seen, (batch, poses, length)),
    )


def l1(predicted: Pose, target: Pose, mask: jax.Array) -> dict[str, jax.Array]:
    error = jnp.abs(predicted.rotations - target.rotations).mean(axis=(-2, -1))
    return {"l1": measured_mean(error, target, mask)}


def train(head: PoseHead, states: States, target: Callable[[jax.Array], Pose], steps: int, rate: float) -> PoseHead:
    """Adam on the head's own loss; ``target`` draws a batch of poses from a key."""
    graph, params = nnx.split(head)
    adam = optax.adam(rate)

    @jax.jit
    def run(params: Any) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, memory = carry
            draw, key = jax.random.split(key)
            wanted = target(draw)

            def loss(params: Any) -> jax.Array:
                return sum(
                    nnx.merge(graph, params).loss(states, wanted, jnp.ones(wanted.shape, bool), key, l1).values()
                )

            updates, memory = adam.update(jax.grad(loss)(params), memory)
            return (optax.apply_updates(params, updates), memory), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, adam.init(params)), keys)[0][0]

    return nnx.merge(graph, run(params))

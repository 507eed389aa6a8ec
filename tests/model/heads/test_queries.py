"""Queries see what came before their pose token, and read long conversations without copies."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from chatpose_jax.errors import UserError
from chatpose_jax.models.attention import attention
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.models.heads import create_head
from chatpose_jax.models.heads.base import States
from chatpose_jax.models.heads.queries import distance_bias
from smpl_jax.pose import Pose

from .common import HEADS, WIDTH, l1, make, states

KEY = jax.random.key(0)


def test_a_pose_depends_on_what_came_before_it_alone() -> None:
    head, given = make("queries"), states()
    run = nnx.jit(lambda head, given: head(given, KEY).rotations)
    rotations = run(head, given)
    for t in range(given.conversation.shape[1]):
        changed = dataclasses.replace(given, conversation=given.conversation.at[:, t].add(1))
        differs = (run(head, changed) != rotations).any(axis=(-3, -2, -1))
        np.testing.assert_array_equal(differs, given.before[:, :, t], err_msg=f"state {t}")


def test_states_are_standardised_by_the_head() -> None:
    plain = make("queries")
    options = (*HEADS["queries"].options, ("standardise", True))
    head = create_head(HeadConfig("queries", options), WIDTH, rngs=nnx.Rngs(0))
    nnx.update(head, nnx.state(plain))
    given = states()
    mean, deviation = jnp.arange(WIDTH) - 3.0, 1 + jnp.arange(WIDTH) / 4.0
    head.shift[...], head.scale[...] = -mean, 1 / deviation
    assert given.conversation is not None
    moved = dataclasses.replace(
        given, token=given.token * deviation + mean, conversation=given.conversation * deviation + mean
    )
    np.testing.assert_allclose(head(moved, KEY).rotations, plain(given, KEY).rotations, atol=2e-5)


def test_a_head_with_recency_weighs_states_by_their_distance() -> None:
    """The bias by hand, and a uniform attention with it."""
    before = jnp.array([[[True, True, True, False], [False, True, True, True]]])
    bias = distance_bias(before, 2)
    assert bias.shape == (1, 2, 2, 4)
    np.testing.assert_allclose(bias[0, :, 0, :3], [[-2 / 16, -1 / 16, 0], [-2 / 256, -1 / 256, 0]])
    np.testing.assert_allclose(bias[0, 0, 1, 1:], [-2 / 16, -1 / 16, 0])
    q, k = jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 2, 4, 1))
    v = jnp.broadcast_to(jnp.array([1.0, 2, 4, 8])[None, None, :, None], k.shape)
    weights = np.exp([-2 / 16, -1 / 16, 0])
    y = attention(q, k, v, before, bias)
    assert float(y[0, 0, 0]) == pytest.approx(float((weights * [1, 2, 4]).sum() / weights.sum()))
    options = (*HEADS["queries"].options, ("recency", True))
    head = create_head(HeadConfig("queries", options), WIDTH, rngs=nnx.Rngs(0))
    nnx.update(head, nnx.state(make("queries")))
    assert not np.allclose(head(states(), KEY).rotations, make("queries")(states(), KEY).rotations, atol=1e-6)


def test_every_joint_depends_on_every_query() -> None:
    head, given = make("queries"), states()
    graph, params = nnx.split(head)

    @jax.jit
    def entries(queries: jax.Array) -> jax.Array:
        return nnx.merge(graph, {**params, "queries": nnx.Param(queries)})(given, KEY).rotations[0, 0, :, 0, 1]

    jacobian = jax.jit(jax.jacrev(entries))(head.queries[...])
    assert (jnp.abs(jacobian).max(axis=-1) > 0).all()


def test_at_13b_nothing_is_as_large_as_a_conversation_for_each_pose() -> None:
    """Traced, with its gradient, for four poses in each of two conversations of 4096 tokens."""
    batch, poses, length, width = 2, 4, 4096, 5120
    head = nnx.eval_shape(lambda: create_head(HeadConfig("queries"), width, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(head)
    given = States(
        jax.ShapeDtypeStruct((batch, poses, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, length, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, poses, length), jnp.bool),
    )
    target = Pose(jax.ShapeDtypeStruct((batch, poses, 24, 3, 3), jnp.float32), "camera")

    def loss(params: Any, given: States, target: Pose) -> jax.Array:
        return nnx.merge(graph, params).loss(given, target, jnp.ones((batch, poses), bool), KEY, l1)["l1"]

    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1), allow_int=True))(params, given, target)
    sizes = list(_sizes(traced.jaxpr))
    assert len(sizes) > 100
    assert max(sizes) <= batch * length * width


def _sizes(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield from (math.prod(out.aval.shape) for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _sizes(inner)


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="hidden=30 must be a multiple of heads=4"):
        create_head(HeadConfig("queries", (("hidden", 30), ("heads", 4))), WIDTH, rngs=nnx.Rngs(0))

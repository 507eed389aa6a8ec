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
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.models.heads import create_head
from chatpose_jax.models.heads.base import States
from smpl_jax.pose import Pose

from .common import WIDTH, l1, make, states

KEY = jax.random.key(0)


def test_a_pose_depends_on_what_came_before_it_alone() -> None:
    head, given = make("queries"), states()
    run = nnx.jit(lambda head, given: head(given, KEY).rotations)
    rotations = run(head, given)
    for t in range(given.conversation.shape[1]):
        changed = dataclasses.replace(given, conversation=given.conversation.at[:, t].add(1))
        differs = (run(head, changed) != rotations).any(axis=(-3, -2, -1))
        np.testing.assert_array_equal(differs, given.before[:, :, t], err_msg=f"state {t}")


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

"""The density is one, its samples follow it, and it is likeliest where it is true."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chatpose_jax.models.heads.gaussian import LARGEST, LEAST, Rotations
from smpl_jax.pose import Pose
from smpl_jax.rotations import axis_angle_to_matrix, geodesic_distance, quaternion_to_matrix

from .common import make, states

KEY = jax.random.key(0)
MEAN = axis_angle_to_matrix(jnp.array([0.5, 2.0, -1.0]))
AXES = axis_angle_to_matrix(jnp.array([1.0, 0.3, 0.4]))
DEVIATIONS = {"widest": [LARGEST] * 3, "one wide": [LARGEST, 0.3, 0.3], "uneven": [1.2, 0.8, 0.5], "round": [0.5] * 3}


def distribution(deviations: list[float]) -> Rotations:
    return Rotations(MEAN, AXES, jnp.array(deviations))


@functools.partial(jax.jit, static_argnums=1)
def draw(of: Rotations, count: int) -> jax.Array:
    return jax.vmap(of.sample)(jax.random.split(KEY, count))


@jax.jit
def log_density(of: Rotations, rotations: jax.Array) -> jax.Array:
    return of.log_density(rotations)


@pytest.mark.parametrize("deviations", DEVIATIONS.values(), ids=DEVIATIONS)
def test_density_integrates_to_one_and_samples_follow_it(deviations: list[float]) -> None:
    """Over uniform rotations the density's mean is 1, and the mean of density times anything is the samples' mean of it."""
    of, count = distribution(deviations), 200_000
    uniform = quaternion_to_matrix(jax.random.normal(KEY, (count, 4)))
    density = np.asarray(jnp.exp(log_density(of, uniform)), np.float64)
    assert density.mean() == pytest.approx(1, abs=0.005 + 4 * density.std() / count**0.5)
    samples = draw(of, count)

    def moments(rotations: jax.Array) -> np.ndarray:
        """The distance from the mean, and the mean rotation's entries: what turns differently about different axes."""
        angle = geodesic_distance(rotations, MEAN)[:, None]
        return np.asarray(jnp.concatenate([angle, rotations.reshape(-1, 9)], axis=1), np.float64)

    weighed = density[:, None] * moments(uniform)
    bound = 0.01 + 4 * (weighed.std(axis=0) + moments(samples).std(axis=0)) / count**0.5
    np.testing.assert_array_less(np.abs(weighed.mean(axis=0) - moments(samples).mean(axis=0)), bound)


def test_likelihood_is_least_at_the_truth() -> None:
    """Gibbs' inequality: of all parameters the true ones give samples the least negative log-likelihood."""
    truth = distribution([0.9, 0.4, 0.2])
    samples = draw(truth, 20_000)
    turn = axis_angle_to_matrix(jnp.array([0.1, -0.1, 0.1]))
    others = {
        "mean": truth._replace(mean=truth.mean @ turn),
        "axes": truth._replace(axes=truth.axes @ turn),
        "wider": truth._replace(deviations=truth.deviations * 1.15),
        "narrower": truth._replace(deviations=truth.deviations / 1.15),
        "another axis wide": truth._replace(deviations=truth.deviations[::-1]),
    }
    least = -log_density(truth, samples).mean()
    for name, other in others.items():
        assert -log_density(other, samples).mean() > least + 0.005, name


def test_likelihood_of_the_head_is_by_joint_and_most_at_the_mean() -> None:
    head, given = make("gaussian"), states()
    made = nnx.jit(lambda head: head(given, KEY))(head)
    likely = nnx.jit(lambda head, pose: head.log_likelihood(given, pose))
    likelihood = likely(head, made)
    assert likelihood.shape == (2, 3, 24)
    turned = Pose(made.rotations @ axis_angle_to_matrix(jnp.array([0.3, 0, 0])), "camera")
    assert (likely(head, turned) < likelihood).all()


def test_the_example_of_the_docs_runs() -> None:
    page = (Path(__file__).parents[3] / "docs/heads.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["nats"].shape == (2, 1, 24) and names["deviations"].shape == (2, 1, 24, 3)


def test_deviations_are_bounded_whatever_the_state() -> None:
    head, given = make("gaussian"), states()
    distribution = nnx.jit(lambda head, token: head.distribution(token))
    for scale in (1e-3, 1e4):
        of = distribution(head, given.token * scale)
        assert (of.deviations >= LEAST).all() and (of.deviations <= LARGEST).all()
        assert jnp.isfinite(log_density(of, jnp.eye(3))).all()


def test_samples_are_the_mean_and_seeded_draws() -> None:
    head, given = make("gaussian"), states()
    draws = nnx.jit(lambda head: head.sample(given, KEY, 4))
    samples = draws(head)
    assert head.draws and samples.shape == (4, 2, 3)
    np.testing.assert_array_equal(samples.rotations, draws(head).rotations)
    made = nnx.jit(lambda head: head(given, KEY))(head)
    np.testing.assert_allclose(samples.rotations[0], made.rotations, atol=1e-6)
    for one, other in ((0, 1), (1, 2), (2, 3)):
        assert geodesic_distance(samples.rotations[one], samples.rotations[other]).min() > 1e-3

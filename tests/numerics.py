"""How closely two computations of one thing must agree: as closely as rounding allows, on whatever processor the tests run.

Programs and processors sum in different orders, so results differ by what rounding does to them: the condition of what is computed times eps. That is
measured where the test runs. Every weight moves by one rounding, and the results move with it; orthogonalising a 6D rotation, say, may magnify that a
hundredfold for one joint and not at all for the next. Rounding happens inside sums too, of some hundred terms here: hence a margin. A wrong detail
of a model is thousands of roundings; tests that need to see one show that they do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MARGIN = 16
DRAWS = 4
EPS = 2.0**-23

# Bounds of what a training step gives, relative, where measuring would mean to train five times. What was recorded on other
# instruction sets (CONTRIBUTING.md) used less than a quarter of them.
LOSS = 5 * MARGIN * EPS
"""A loss is a mean of positive numbers, whose own condition is 1; what they are made of carries on a rounding of the forward about fivefold."""
TRAINED = 2 * LOSS
"""A loss after a few steps, over another mesh or number of processes: the steps carry on what rounding did to the weights."""
GRADIENT = 10 * LOSS
"""A gradient, of the largest of its array, and what is computed from gradients: terms of both signs cancel in its sums."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A result in float64, and by how much each of its entries moves where every weight moves by one rounding. eps: of its dtype."""

    value: np.ndarray
    noise: np.ndarray
    eps: float

    def __getitem__(self, place: Any) -> Rounded:
        """A part of the result."""
        return Rounded(self.value[place], self.noise[place], self.eps)

    @property
    def bound(self) -> float:
        """How far another computation of the same may be from this one, at the most."""
        return MARGIN * max(float(self.noise.max(initial=0)), self.eps * float(np.abs(self.value).max(initial=0)))


def _floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _move(params: Any, seed: int) -> Any:
    """In NumPy: a program for each tree of weights would take seconds to compile."""
    generator = np.random.default_rng(seed)

    def one(x: Any) -> Any:
        if not _floating(x):
            return x
        sign = generator.choice(np.array([-1, 1], x.dtype), x.shape)
        moved = np.asarray(x) * (1 + np.array(jnp.finfo(x.dtype).eps, x.dtype) * sign)
        return jax.device_put(moved, x.sharding if getattr(x, "committed", False) else None)

    return jax.tree.map(one, params)


def rounded(run: Callable[[Any], Any], params: Any) -> Any:
    """``run(params)``, each of its floating arrays a ``Rounded``, others as they are. It is called five times: compile it."""
    moved = [run(_move(params, seed)) for seed in range(DRAWS)]

    def one(x: Any, *others: Any) -> Any:
        if not _floating(x):
            return np.asarray(x)
        value = np.asarray(x, np.float64)
        noise = np.max([np.abs(np.asarray(other, np.float64) - value) for other in others], axis=0)
        return Rounded(value, noise, float(jnp.finfo(x.dtype).eps))

    return jax.tree.map(one, run(params), *moved)


def near(found: Any, expected: Any, message: str = "") -> None:
    """For geometry, whose condition is about 1: no entry is off by more than the margin, in roundings of the largest number to float32."""
    expected = np.asarray(expected, np.float64)
    bound = MARGIN * EPS * float(np.abs(expected).max(initial=0))
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=bound, err_msg=message)


def agree(expected: Rounded, *others: Any, message: str = "") -> None:
    """Other computations of the same give it, no entry further off than the bound."""
    for other in others:
        other = np.asarray(other.value if isinstance(other, Rounded) else other, np.float64)
        assert other.shape == expected.value.shape, message
        np.testing.assert_allclose(other, expected.value, rtol=0, atol=expected.bound, err_msg=message)

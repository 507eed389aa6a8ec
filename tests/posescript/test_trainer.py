"""The trainer: it learns, and a run that was stopped goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.posescript.layers import BatchNorm, Key, Linear, dropout
from chatpose_jax.posescript.trainer import METRICS, Batch, Examples, Recipe, TrainerConfig, train_network


class Regression(nnx.Module):
    """Poses from the first token of their captions; ``base`` is frozen."""

    frozen = ("base",)

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.base = Linear(1, 8, rngs=rngs)
        self.norm = BatchNorm(8)
        self.out = Linear(8, 6, rngs=rngs)

    def predict(self, batch: Batch, key: Key) -> jax.Array:
        x = jnp.sin(self.base(batch.tokens[:, :1] / 10.0))
        return self.out(dropout(self.norm(x, key is not None), 0.1, key)).reshape(-1, 2, 3)

    def loss(self, batch: Batch, key: Key) -> tuple[jax.Array, dict[str, jax.Array]]:
        error = jnp.square(self.predict(batch, key) - batch.poses).mean()
        return error, {"root": jnp.sqrt(error)}

    def validate(self, examples: Examples) -> dict[str, float]:
        return {"error": float(np.mean([self.loss(batch, None)[0] for batch in examples.batches(16)]))}


RECIPE = Recipe(Regression.loss, Regression.validate, "error", higher=False)


def data() -> Examples:
    words = np.random.default_rng(0).integers(1, 30, 50)
    poses = np.sin(words[:, None, None] / 10 + np.arange(6).reshape(2, 3)).astype(np.float32)
    return Examples(poses, [[np.array([word, 1], np.int32), np.array([word, 2, 3], np.int32)] for word in words])


def train(
    folder: Path, epochs: int = 6, identity: str = "one", **settings: object
) -> tuple[Regression, dict[str, float]]:
    config = TrainerConfig(epochs=epochs, batch_size=16, learning_rate=0.02, **settings)  # type: ignore[arg-type]
    return train_network(
        Regression(),
        RECIPE,
        data(),
        config,
        folder,
        validation=data(),
        identity={"name": identity},
        say=lambda line: None,
        progress=False,
    )


def numbers(network: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(network))]


def test_it_learns_and_leaves_frozen_modules_alone(tmp_path: Path) -> None:
    start = Regression().validate(data())["error"]
    network, found = train(tmp_path, epochs=30)
    assert found["error"] == pytest.approx(network.validate(data())["error"]) and found["error"] < start / 4
    np.testing.assert_array_equal(network.base.kernel[...], Regression().base.kernel[...])
    assert np.abs(network.norm.mean[...]).max() > 0.01
    assert len((tmp_path / METRICS).read_text().splitlines()) == 30


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    whole, found = train(tmp_path / "whole", halve_every=2)
    train(tmp_path / "parts", epochs=4, halve_every=2)
    with (tmp_path / "parts" / METRICS).open("a") as file:
        file.write('{"epoch": 5}\n')  # of an epoch that was not saved
    parts, again = train(tmp_path / "parts", halve_every=2)
    for a, b in zip(numbers(whole), numbers(parts)):
        np.testing.assert_array_equal(a, b)
    assert found == again
    assert (tmp_path / "whole" / METRICS).read_text() == (tmp_path / "parts" / METRICS).read_text()


def test_the_best_epoch_is_the_result_or_the_last(tmp_path: Path) -> None:
    calls = iter(range(1, 100))
    recipe = RECIPE._replace(validate=lambda network, examples: {"error": float(next(calls))})  # ever worse

    def fit(folder: Path, result: str) -> tuple[Regression, dict[str, float]]:
        config = TrainerConfig(epochs=3, batch_size=16, result=result)  # type: ignore[arg-type]
        return train_network(
            Regression(),
            recipe,
            data(),
            config,
            folder,
            validation=data(),
            identity={},
            say=lambda line: None,
            progress=False,
        )

    best, found = fit(tmp_path / "best", "best")
    assert found == {**found, "epoch": 1, "error": 1}
    last, found = fit(tmp_path / "last", "last")
    assert found["epoch"] == 3
    assert any((a != b).any() for a, b in zip(numbers(best), numbers(last)))


def test_faults_are_one_line(tmp_path: Path) -> None:
    train(tmp_path, epochs=2)
    with pytest.raises(UserError, match="other settings of name"):
        train(tmp_path, epochs=2, identity="two")
    with pytest.raises(UserError, match="run of 2 epochs, more than"):
        train(tmp_path, epochs=1)
    (tmp_path / "checkpoint.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no readable checkpoint"):
        train(tmp_path, epochs=2)
    with pytest.raises(UserError, match="fewer than a batch"):
        train_network(
            Regression(),
            RECIPE,
            data(),
            TrainerConfig(batch_size=64),
            tmp_path / "few",
            validation=data(),
            identity={},
            progress=False,
        )

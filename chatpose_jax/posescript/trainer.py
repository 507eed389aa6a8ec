"""Trains PoseScript's networks: Adam over epochs of poses, each with one of its captions. A run that was stopped goes on after its last epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from chatpose_jax.errors import UserError
from chatpose_jax.locks import only_writer
from chatpose_jax.posescript.tokens import pad
from chatpose_jax.settings import check_types, one_line, require
from smpl_jax._files import write_whole

CHECKPOINT, BEST, METRICS = "checkpoint.npz", "best.npz", "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Settings of training; the defaults are those of PoseScript's retriever (ECCV 2022).

    epochs: times that each pose is seen. batch_size: poses of a step; the last, smaller batch of an epoch is left out.
    learning_rate: of Adam. halve_every: epochs after which it is halved, again and again; 0 keeps it.
    weight_decay: added to the gradient, as PyTorch's Adam does.
    eval_every: epochs between two validations. result: "best" by validation, or "last".
    seed: of weights, order, captions and dropout.
    """

    epochs: int = 500
    batch_size: int = 32
    learning_rate: float = 2e-4
    halve_every: int = 0
    weight_decay: float = 0.0
    eval_every: int = 1
    result: Literal["best", "last"] = "best"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "train")
        require(self, "train", "at least 1", lambda value: value >= 1, "epochs", "eval_every")
        require(self, "train", "at least 2", lambda value: value >= 2, "batch_size")  # batch norm needs two
        require(self, "train", "positive", lambda value: value > 0, "learning_rate")
        require(self, "train", "at least 0", lambda value: value >= 0, "halve_every", "weight_decay", "seed")


class Batch(NamedTuple):
    """Poses and a text of each. poses: (B, J, 3) float32 axis-angles in radians. tokens: (B, T) int32. lengths: (B,) int32. measured: (B, J) bool,
    for losses that compare rotations."""

    poses: Any
    tokens: Any
    lengths: Any
    measured: Any = None

    def __repr__(self) -> str:
        return one_line(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """What a network trains on.

    poses: (N, J, 3) float32, as ``PoseInput`` gives them. tokens: for each pose the ids of each caption. measured: (N, J) bool; None means all.
    """

    poses: np.ndarray
    tokens: Sequence[Sequence[np.ndarray]]
    measured: np.ndarray | None = None

    __repr__ = one_line

    def batch(self, rows: Sequence[int], choice: Sequence[int]) -> Batch:
        """Some poses, each with one caption: that of number choice[i], modulo the number of captions of rows[i]."""
        ids, lengths = pad([self.tokens[row][pick % len(self.tokens[row])] for row, pick in zip(rows, choice)])
        at = np.asarray(rows)
        return Batch(self.poses[at], ids, lengths, None if self.measured is None else self.measured[at])

    def batches(self, size: int) -> Iterator[Batch]:
        """All poses in their order, pose n with its caption n, modulo the number of its captions. The last batch may be smaller."""
        for start in range(0, len(self.poses), size):
            rows = range(start, min(start + size, len(self.poses)))
            yield self.batch(rows, rows)


class Recipe(NamedTuple):
    """How a kind of network trains.

    loss: (network, batch, key) -> the loss to minimise, and parts to log. key: of dropout and samples.
    validate: (network, examples) -> metrics of the network as it is.
    best: the metric by which the best epoch is chosen. higher: whether higher is better.
    """

    loss: Callable[[Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    validate: Callable[[Any, Examples], Mapping[str, float]]
    best: str
    higher: bool


def print_line(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def train_network(
    network: Any,
    recipe: Recipe,
    examples: Examples,
    config: TrainerConfig,
    folder: Path,
    *,
    validation: Examples,
    identity: Mapping[str, Any],
    say: Callable[[str], Any] = print_line,
    progress: bool = True,
) -> tuple[Any, dict[str, Any]]:
    """Trains a network, or goes on with a run in ``folder``.

    Args:
        network: an ``nnx.Module`` as it starts. Its ``nnx.Param`` train, but for those of the modules whose names are in its attribute ``frozen``;
            its ``nnx.BatchStat`` it changes itself.
        examples: at least ``config.batch_size``.
        folder: of the run: checkpoints, and ``metrics.jsonl`` with a line for each epoch. One process at a time may use it.
        validation: examples that do not train.
        identity: settings as JSON that must be the same when a run goes on, apart from the number of epochs.
        say: takes lines of text. progress: show a bar.

    Returns:
        The network, the best one or the last by ``config.result``; and what was measured: ``epoch`` and the metrics of that network.

    Raises:
        UserError: too few examples, a run with other settings, a damaged checkpoint, or a loss that is not finite.
    """
    if len(examples.poses) < config.batch_size:
        raise UserError(
            f"{len(examples.poses)} poses with captions are fewer than a batch: lower train.batch_size={config.batch_size}, or take more data"
        )
    with only_writer(folder, folder / ".lock"):
        return _Run(network, recipe, examples, config, folder, validation, identity, say, progress).run()


class _Run:
    def __init__(
        self,
        network: Any,
        recipe: Recipe,
        examples: Examples,
        config: TrainerConfig,
        folder: Path,
        validation: Examples,
        identity: Mapping[str, Any],
        say: Callable[[str], Any],
        progress: bool,
    ) -> None:
        self.examples, self.config, self.folder = examples, config, folder
        self.recipe, self.validation, self.identity = recipe, validation, dict(identity)
        self.say, self.progress = say, progress
        self.steps = len(examples.poses) // config.batch_size  # of an epoch
        frozen = nnx.Any(*(nnx.PathContains(name) for name in network.frozen)) if network.frozen else nnx.Nothing()
        trained = nnx.All(nnx.Param, nnx.Not(frozen))
        graph, params, stats, self.rest = cast(tuple[Any, ...], nnx.split(network, trained, nnx.BatchStat, ...))
        self.graph = graph
        halved = range(config.halve_every or config.epochs, config.epochs, config.halve_every or 1)
        rate = optax.piecewise_constant_schedule(config.learning_rate, {epoch * self.steps: 0.5 for epoch in halved})
        optimizer = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(rate))
        self.state = (params, stats, optimizer.init(params))

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, rest: Any, batch: Batch, key: jax.Array) -> Any:
            params, stats, optimum = state

            def loss(params: Any) -> Any:
                model = nnx.merge(graph, params, stats, rest, copy=True)
                value, parts = recipe.loss(model, batch, key)
                return value, (parts, nnx.state(model, nnx.BatchStat))

            (value, (parts, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            updates, optimum = optimizer.update(gradient, optimum, params)
            return (optax.apply_updates(params, updates), stats, optimum), {"loss": value, **parts}

        self.step = step

    def run(self) -> tuple[Any, dict[str, Any]]:
        epoch, found = self._resume()
        bar = tqdm(
            total=self.config.epochs * self.steps, initial=epoch * self.steps, unit="step", disable=not self.progress,
            dynamic_ncols=True, mininterval=1.0 if sys.stderr.isatty() else 30.0,
        )  # fmt: skip
        with contextlib.closing(bar):
            while epoch < self.config.epochs:
                epoch += 1
                line: dict[str, Any] = {"epoch": epoch, **self._epoch(epoch, bar)}
                if epoch % self.config.eval_every == 0 or epoch == self.config.epochs:
                    line |= self.recipe.validate(self.network(), self.validation)
                    now, before = line[self.recipe.best], found.get(self.recipe.best)
                    if before is None or (now > before if self.recipe.higher else now < before):
                        found = line
                        self._save(BEST, self.state[:2], line)
                    self.say(_words(line) + ("  (best)" if found is line else ""))
                self._log(line)
                self._save(CHECKPOINT, self.state, {"identity": self.identity, "epoch": epoch, "found": found})
        if self.config.result == "best":
            self.state = (*self._load(BEST, self.state[:2])[0], self.state[2])
            return self.network(), found
        return self.network(), {"epoch": epoch}

    def network(self) -> Any:
        """The network as it is now."""
        return nnx.merge(self.graph, *jax.tree.map(lambda x: x.copy(), self.state[:2]), self.rest)

    def _epoch(self, epoch: int, bar: tqdm) -> dict[str, float]:
        size = self.config.batch_size
        random = np.random.default_rng([self.config.seed, epoch])
        order = random.permutation(len(self.examples.poses))
        choice = random.integers(2**31, size=len(order))
        key = jax.random.fold_in(jax.random.key(self.config.seed), epoch)
        sums: dict[str, Any] = {}
        for number in range(self.steps):
            rows = slice(number * size, (number + 1) * size)
            batch = self.examples.batch(order[rows].tolist(), choice[rows].tolist())
            self.state, values = self.step(self.state, self.rest, batch, jax.random.fold_in(key, number))
            sums = {name: sums.get(name, 0) + value for name, value in values.items()}
            bar.update()
        means = {name: float(value) / self.steps for name, value in sums.items()}
        if not np.isfinite(means["loss"]):
            raise UserError(
                f"epoch {epoch}: the loss is {means['loss']}; lower train.learning_rate. The run goes on after epoch {epoch - 1}"
            )
        bar.set_postfix(epoch=epoch, loss=f"{means['loss']:.3f}")
        return means

    def _resume(self) -> tuple[int, dict[str, Any]]:
        if not (self.folder / CHECKPOINT).is_file():
            return 0, {}
        self.state, about = self._load(CHECKPOINT, self.state)
        if about["identity"] != self.identity:
            differing = sorted(
                name
                for name in {*self.identity, *about["identity"]}
                if self.identity.get(name) != about["identity"].get(name)
            )
            raise UserError(
                f"{self.folder} has a run with other settings of {', '.join(differing)}: go back to those, or choose another folder"
            )
        epoch = about["epoch"]
        if epoch > self.config.epochs:
            raise UserError(
                f"{self.folder} has a run of {epoch} epochs, more than train.epochs={self.config.epochs}: choose another folder, or raise it"
            )
        lines = (self.folder / METRICS).read_text().splitlines() if (self.folder / METRICS).is_file() else []
        write_whole(self.folder / METRICS, lambda file: file.write("".join(f"{x}\n" for x in lines[:epoch]).encode()))
        self.say(f"going on after epoch {epoch} in {self.folder}")
        return epoch, about["found"]

    def _log(self, line: Mapping[str, Any]) -> None:
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self, name: str, state: Any, about: Any) -> None:
        arrays: dict[str, Any] = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(state))}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        write_whole(self.folder / name, lambda file: np.savez(file, **arrays))

    def _load(self, name: str, like: Any) -> tuple[Any, Any]:
        leaves, form = jax.tree.flatten(like)
        path = self.folder / name
        try:
            with np.load(io.BytesIO(path.read_bytes())) as arrays:
                found = [arrays[str(number)] for number in range(len(leaves))]
                about = json.loads(arrays["about"].tobytes())
        except Exception as error:  # zipfile, numpy and json each raise their own
            raise UserError(
                f"{path}: no readable checkpoint ({error}); choose another folder, or delete this run"
            ) from None
        if [x.shape for x in found] != [x.shape for x in leaves]:
            raise UserError(f"{path}: a checkpoint of another network; choose another folder")
        return jax.tree.unflatten(form, [jax.numpy.asarray(x) for x in found]), about


def _words(line: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in line.items())

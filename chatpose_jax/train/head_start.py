"""A head start for the pose head: it learns alone at first, from states of the model that a run starts from, which are computed once.

A fresh head tells the adapters nothing that they could learn from. Linear probing before fine-tuning does the same for classifiers (Kumar et al.
2022, "Fine-tuning can distort pretrained features").
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import ChatPoseModel, bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.sharding import on_mesh
from chatpose_jax.train import feed, hosts
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.layout import lay_out
from chatpose_jax.train.loss import final_states
from chatpose_jax.train.optimizer import optimizer
from chatpose_jax.train.pose_loss import PoseLoss
from chatpose_jax.train.step import POSES
from chatpose_jax.train.trainable import Flat, merge, unflatten

HEAD = "pose_head/"
SHIFT, SCALE = f"{HEAD}shift", f"{HEAD}scale"
READ = ("attention_mask", "pose_index", "pose_mask", "poses", "segment_ids")
"""The arrays of a batch that are needed besides the states."""


def head_start(
    model: ModelConfig,
    config: TrainConfig,
    trainable: Flat,
    frozen: Flat,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh | None = None,
    *,
    progress: bool = True,
) -> Flat:
    """The trainable arrays with a trained pose head.

    The states of ``config.head_start.batches`` micro-batches are computed and stay on the devices, sharded by rows. Then the head takes
    ``config.head_start.steps`` updates, each of one of them, in a new order in each pass. Optimiser and multipliers are the run's; the rate is
    ``rate`` × the run's, and falls to 0. A head with ``shift`` and ``scale`` (``standardise`` of "queries") first gets those of the states.

    Args:
        model: as the run computes (``layout.at_run_time``).
        trainable, frozen: as the step takes them, on the mesh; the layers of ``frozen`` as ``model`` says.
        batches: of ``batch_size * accumulate`` rows, this process's rows of them.

    Raises UserError if the head does not train, or no batch has a pose.
    """
    settings = config.head_start
    head = {path: leaf for path, leaf in trainable.items() if path.startswith(HEAD)}
    others = {path: leaf for path, leaf in trainable.items() if path not in head}
    if not head:
        raise UserError("train.head_start: the pose head is frozen in train.trainable, so it cannot learn alone")
    rules = tuple(row for row in config.trainable if any(re.fullmatch(row.pattern, path) for path in head))

    def model_of(head: Flat, others: Flat, frozen: Flat) -> ChatPoseModel:
        return bind(model, merge(lay_out({**others, **head}, model), frozen))

    @jax.jit
    def states(head: Flat, others: Flat, frozen: Flat, batch: Mapping[str, Any]) -> jax.Array:
        with on_mesh(mesh):
            return final_states(model_of(head, others, frozen), batch, remat=config.remat)

    kept = []
    with _bar(settings.batches, "states", "batch", progress) as bar:
        for placed in itertools.islice(_micro_batches(config, batches, mesh), settings.batches):
            read = {name: placed[name] for name in READ if name in placed}
            kept.append({**read, "hidden": states(head, others, frozen, placed)})
            bar.update()
    if not (kept := [batch for batch in kept if bool(jnp.any(batch["pose_mask"]))]):
        raise UserError("train.head_start: its batches have no pose; raise train.head_start.batches")
    if {SHIFT, SCALE} <= set(head):
        mean, deviation = _moments(kept)
        head |= {SHIFT: -mean, SCALE: 1 / jnp.maximum(deviation, 1e-3 * deviation.mean())}

    warmup = min(config.warmup_steps, settings.steps // 10)
    alone = dataclasses.replace(
        config,
        steps=settings.steps,
        warmup_steps=warmup,
        learning_rate=config.learning_rate * settings.rate,
        final_lr_ratio=0.0,
        trainable=rules,
    )
    tx, distance = optimizer(alone, unflatten(head)), PoseLoss(config.pose_loss)

    def objective(head: Flat, others: Flat, frozen: Flat, batch: Mapping[str, Any], key: jax.Array) -> Any:
        bound = model_of(head, others, frozen)
        read = bound.states(batch["hidden"], batch["pose_index"], batch.get("segment_ids"))
        parts = bound.pose_head.loss(read, batch["poses"], batch["pose_mask"], key, distance)
        return sum(parts.values()), parts

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(head: Flat, moments: Any, *rest: Any) -> tuple[Flat, Any, dict[str, jax.Array]]:
        with on_mesh(mesh):
            slopes, parts = jax.grad(objective, has_aux=True)(head, *rest)
            changes, moments = tx.update(slopes, moments, head)
            return optax.apply_updates(head, changes), moments, parts

    moments, key = tx.init(head), jax.random.fold_in(jax.random.key(config.seed), POSES)
    with _bar(settings.steps, "head start", "step", progress) as bar:
        for step, place in zip(range(settings.steps), _orders(len(kept), config.seed)):
            head, moments, parts = update(head, moments, others, frozen, kept[place], jax.random.fold_in(key, step))
            if step % 25 == 24:
                bar.set_postfix({name: f"{float(value):.3f}" for name, value in parts.items()}, refresh=False)
            bar.update()
    return {**others, **head}


def _bar(total: int, label: str, unit: str, progress: bool) -> tqdm:
    shown = progress and hosts.primary()
    return tqdm(total=total, desc=label, unit=unit, disable=not shown, dynamic_ncols=True, mininterval=1)


def _micro_batches(
    config: TrainConfig, batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh | None
) -> Iterator[dict[str, Any]]:
    for batch in batches:
        rows = len(batch["input_ids"]) // config.accumulate
        for first in range(0, rows * config.accumulate, rows):
            part = jax.tree.map(lambda x: x[first : first + rows], dict(batch))  # noqa: B023
            yield feed.put(part, mesh, config.batch_size)


@jax.jit
def _sums(hidden: jax.Array, present: jax.Array) -> jax.Array:
    """(3, D): the sums of states, of their squares, and their number."""
    states, there = hidden.astype(jnp.float32), (present > 0)[..., None]
    return jnp.stack([jnp.where(there, x, 0).sum((0, 1)) for x in (states, states**2, jnp.ones_like(states))])


def _moments(kept: list[dict[str, Any]]) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation (D,) of the states of all tokens."""
    total, square, count = sum(_sums(batch["hidden"], batch["attention_mask"]) for batch in kept)  # type: ignore[misc]
    mean = total / count
    return mean, jnp.sqrt(jnp.maximum(square / count - mean**2, 0))


def _orders(count: int, seed: int) -> Iterator[int]:
    for number in itertools.count():
        yield from np.random.default_rng([seed, POSES, number]).permutation(count).tolist()

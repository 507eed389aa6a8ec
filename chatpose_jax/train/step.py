"""One optimiser step as one jitted function of plain pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from chatpose_jax.models.chatpose import bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.train import trainable as table
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.loss import loss
from chatpose_jax.train.optimizer import learning_rate, optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: () int32, updates done. trainable: arrays by path. opt_state: optax's, for the trainable ones only."""

    step: jax.Array
    trainable: table.Flat
    opt_state: Any


def init_state(config: TrainConfig, params: Mapping[str, Any]) -> tuple[TrainState, table.Flat]:
    """The state at step 0, and the frozen arrays that stay outside it."""
    trainable, frozen = table.split(params, config.trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer(config, params).init(trainable)), frozen


def make_step(
    model_config: ModelConfig, config: TrainConfig, params: Mapping[str, Any]
) -> Callable[[TrainState, table.Flat, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step ``(state, frozen, batch) -> (state, metrics)``. The state is donated; frozen arrays are only read.

    With ``accumulate`` > 1 every array of the batch has that many micro-batches on a further leading axis. Dropout draws from (seed, step), so
    a resumed run repeats an unbroken one.
    """
    tx = optimizer(config, params)
    schedule = learning_rate(config)

    def objective(trainable: table.Flat, frozen: table.Flat, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        model = bind(model_config, table.merge(trainable, frozen))
        drop = model_config.lora is not None and model_config.lora.dropout > 0
        return loss(
            model,
            batch,
            lambda_text=config.lambda_text,
            lambda_pose=config.lambda_pose,
            dropout_key=key if drop else None,
            remat=config.remat,
        )

    gradient = jax.grad(objective, has_aux=True)

    def step(
        state: TrainState, frozen: table.Flat, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if config.accumulate == 1:
            grads, metrics = gradient(state.trainable, frozen, batch, key)
        else:

            def micro(total: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradient(state.trainable, frozen, part[0], part[1])), None

            keys = jax.random.split(key, config.accumulate)
            shapes = jax.eval_shape(gradient, state.trainable, frozen, jax.tree.map(lambda x: x[0], batch), keys[0])
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            total, _ = jax.lax.scan(micro, zeros, (batch, keys))
            grads, metrics = jax.tree.map(lambda x: x / config.accumulate, total)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return jax.jit(step, donate_argnums=0)

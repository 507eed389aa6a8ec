"""One optimiser step as one jitted function of plain pytrees, on one device or on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chatpose_jax.models.chatpose import ChatPoseModel, bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.sharding import batch_sharding, on_mesh, shardings
from chatpose_jax.settings import one_line
from chatpose_jax.train import trainable as table
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.layout import lay_out
from chatpose_jax.train.loss import counts, final_states, loss
from chatpose_jax.train.optimizer import learning_rate, optimizer
from chatpose_jax.train.pose_loss import PoseLoss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: () int32, number of batches seen. trainable: arrays by path, layers stacked. opt_state: optax's state, only for trainable arrays.

    skipped: (2,) int32, number of updates dropped because loss or gradient was not finite: in total, and the latest ones in a row.
    """

    step: jax.Array
    trainable: table.Flat
    opt_state: Any
    skipped: jax.Array

    __repr__ = one_line


POSES = int.from_bytes(b"pose")
"""Folded into the key of the pose head's loss, so that it differs from the keys of dropout, which are numbered from 0."""

Step = Callable[[TrainState, table.Flat, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]


def _initial(config: TrainConfig, params: Mapping[str, Any], trainable: table.Flat) -> TrainState:
    opt_state = optimizer(config, params).init(trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, opt_state, jnp.zeros((2,), jnp.int32))


def state_shardings(config: TrainConfig, params: Mapping[str, Any], mesh: Mesh) -> tuple[TrainState, table.Flat]:
    """Shardings of the state and of the frozen arrays. The optimiser's moments are sharded like their parameter; other state is replicated.

    params: arrays or abstract shapes.
    """
    trainable, frozen = table.split(params, config.trainable)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in trainable.items()}
    places = shardings(shapes, mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = next((key.key for key in path if getattr(key, "key", None) in places), None)
        return places[name] if name is not None and leaf.shape == shapes[name].shape else whole

    abstract = jax.eval_shape(lambda trainable: _initial(config, params, trainable), shapes)
    return jax.tree_util.tree_map_with_path(place, abstract), shardings(frozen, mesh)


def abstract_state(config: TrainConfig, params: Mapping[str, Any], mesh: Mesh) -> tuple[TrainState, table.Flat]:
    """Shapes and shardings of the result of ``init_state``. Nothing is allocated, and the mesh may be one of another machine.

    params: abstract shapes, layers stacked.
    """
    trainable, frozen = table.split(params, config.trainable)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in trainable.items()}
    state = jax.eval_shape(lambda trainable: _initial(config, params, trainable), shapes)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (state, frozen),
        state_shardings(config, params, mesh),
    )


def init_state(
    config: TrainConfig, params: Mapping[str, Any], mesh: Mesh | None = None
) -> tuple[TrainState, table.Flat]:
    """The state at step 0, and the frozen arrays, which are not part of the state. Layers are stacked in ``params`` and in both results.

    mesh: both are put on this mesh; arrays that are already there are not moved. None leaves everything in place.
    """
    trainable, frozen = table.split(params, config.trainable)
    if mesh is None:
        return _initial(config, params, trainable), frozen
    state_places, frozen_places = state_shardings(config, params, mesh)
    trainable, frozen = jax.device_put((trainable, frozen), (state_places.trainable, frozen_places))
    rest = jax.jit(
        lambda trainable: dataclasses.replace(_initial(config, params, trainable), trainable={}),
        out_shardings=dataclasses.replace(state_places, trainable={}),
    )(trainable)
    return dataclasses.replace(rest, trainable=trainable), frozen


def make_step(
    model_config: ModelConfig, config: TrainConfig, params: Mapping[str, Any], mesh: Mesh | None = None
) -> Step:
    """The jitted step ``(state, frozen, batch) -> (state, metrics)``. The state is donated; frozen arrays are only read.

    ``model_config.scan_layers`` says how the layers of ``frozen`` lie (``layout.lay_out``), and how the model runs. Those of the state are stacked.

    With ``accumulate`` > 1, every array of the batch has the micro-batches on an additional leading axis. Each part of the loss is the mean over
    what counts for it in the whole batch: tokens, measured joints, known betas. So the update equals that of one large batch. Dropout and the pose
    head's loss use separate keys made from (seed, step, micro-batch), so a resumed run repeats an uninterrupted one. If loss or gradient is not
    finite, the update is dropped and counted in the metrics ``skipped`` (in total) and ``skipped_in_a_row``.

    Args:
        params: arrays or abstract shapes, layers stacked.
        mesh: the mesh of ``init_state``. Batches are sharded on it by ``models.sharding.batch_sharding``.
    """
    tx = optimizer(config, params)
    schedule = learning_rate(config)
    distance = PoseLoss(config.pose_loss)
    masks = table.masks(params, config.trainable, model_config.pose_token_id - model_config.text.base_vocab_size)

    def model_of(trainable: table.Flat, frozen: table.Flat) -> ChatPoseModel:
        return bind(model_config, table.merge(lay_out(trainable, model_config), frozen))

    def objective(
        trainable: table.Flat, frozen: table.Flat, batch: Mapping[str, Any], key: jax.Array, weights: Any, scale: Any
    ) -> Any:
        model = model_of(trainable, frozen)
        drop = model_config.lora is not None and model_config.lora.dropout > 0
        hidden = final_states(model, batch, dropout_key=key if drop else None, remat=config.remat)
        return loss(
            model,
            hidden,
            batch,
            lambda_text=config.lambda_text,
            lambda_pose=config.lambda_pose,
            distance=functools.partial(distance, scale=scale),
            weights=weights,
            key=jax.random.fold_in(key, POSES),
        )

    gradient = jax.grad(objective, has_aux=True)

    def gradients(trainable: table.Flat, frozen: table.Flat, batch: Mapping[str, Any], key: jax.Array) -> Any:
        if config.accumulate == 1:
            return gradient(trainable, frozen, batch, key, None, None)

        def micro(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(trainable, frozen, *part, scale)), None

        keys = jax.random.split(key, config.accumulate)
        head = model_of(trainable, frozen).pose_head
        shares = jax.tree.map(lambda n: n / jnp.maximum(n.sum(), 1), jax.vmap(functools.partial(counts, head))(batch))
        scale = distance.scale(batch["poses"], batch["pose_mask"])  # makes these parts exact under the share of poses
        shares = shares._replace(parts={name: share for name, share in shares.parts.items() if name not in scale})
        parts = (batch, keys, shares)
        shapes = jax.eval_shape(gradient, trainable, frozen, *jax.tree.map(lambda x: x[0], parts), scale)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(micro, zeros, parts)[0]

    def step(
        state: TrainState, frozen: table.Flat, batch: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        with on_mesh(mesh):
            if mesh is not None:
                rows = batch_sharding(mesh, stacked=config.accumulate > 1)
                batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), dict(batch))
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
            grads, metrics = gradients(state.trainable, frozen, batch, key)
            grads = table.select(masks, grads, jax.tree.map(jnp.zeros_like, grads))
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
            updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
            trainable = table.select(masks, optax.apply_updates(state.trainable, updates), state.trainable)
            trainable, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (trainable, opt_state),
                (state.trainable, state.opt_state),
            )
            skipped = jnp.where(finite, state.skipped.at[1].set(0), state.skipped + 1)
        metrics = {
            **metrics,
            "grad_norm": norm,
            "learning_rate": schedule(state.step - state.skipped[0]),
            "skipped": skipped[0],
            "skipped_in_a_row": skipped[1],
        }
        return TrainState(state.step + 1, trainable, opt_state, skipped), metrics

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    places = state_shardings(config, params, mesh)[0]
    return jax.jit(step, donate_argnums=0, out_shardings=(places, NamedSharding(mesh, PartitionSpec())))

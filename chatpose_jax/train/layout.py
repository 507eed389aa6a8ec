"""How a model lies in memory and computes while a run trains: layers stacked and scanned, or unrolled; the dtype.

Only the frozen base, and what the model is called with, are unrolled. What trains stays stacked in either layout, and so do checkpoints and model
folders. So the table of what trains, masks, moments, norms and hashes know one set of paths.
"""

from __future__ import annotations

from jax.sharding import Mesh

from chatpose_jax.models.arithmetic import fast_dtype
from chatpose_jax.models.chatpose import stack_layers, unstack_layers
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.sharding import on_mesh, platform
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.trainable import Flat, flatten, unflatten


def at_run_time(model: ModelConfig, config: TrainConfig, mesh: Mesh | None = None) -> ModelConfig:
    """The configuration with the layout and the compute dtype that ``train.layers`` and ``train.dtype`` choose for the devices of ``mesh``, or for
    the default device.
    """
    with on_mesh(mesh):
        unrolled = config.layers == "unrolled" or (config.layers == "auto" and platform() == "cpu")
        dtype = fast_dtype(model.dtype) if config.dtype == "auto" else config.dtype
    return model.replace(scan_layers=not unrolled, dtype=dtype)


def lay_out(flat: Flat, model: ModelConfig, *, consume: bool = False) -> Flat:
    """Arrays by path with stacked layers, in the layout of ``model``; also a part of the model, also inside a traced function.

    consume: frees each stacked array once it is unrolled, so that the base is never in memory twice.
    """
    return flat if model.scan_layers else flatten(unstack_layers(unflatten(flat), consume=consume, config=model))


def stacked(flat: Flat, model: ModelConfig, *, consume: bool = False) -> Flat:
    """The inverse of ``lay_out``."""
    return flat if model.scan_layers else flatten(stack_layers(unflatten(flat), consume=consume))

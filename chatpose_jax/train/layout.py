"""How layers lie in memory while a run trains: stacked and scanned, or unrolled.

Only the frozen base, and what the model is called with, are unrolled. What trains stays stacked in either layout, and so do checkpoints and model
folders. So the table of what trains, masks, moments, norms and hashes know one set of paths.
"""

from __future__ import annotations

from jax.sharding import Mesh

from chatpose_jax.models.chatpose import stack_layers, unstack_layers
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.sharding import on_mesh, platform
from chatpose_jax.train.config import Layers
from chatpose_jax.train.trainable import Flat, flatten, unflatten


def at_run_time(model: ModelConfig, layers: Layers, mesh: Mesh | None = None) -> ModelConfig:
    """The configuration with the layout that ``train.layers`` chooses for the devices of ``mesh``, or for the default device."""
    with on_mesh(mesh):
        unrolled = layers == "unrolled" or (layers == "auto" and platform() == "cpu")
    return model.replace(scan_layers=not unrolled)


def lay_out(flat: Flat, model: ModelConfig, *, consume: bool = False) -> Flat:
    """Arrays by path with stacked layers, in the layout of ``model``; also a part of the model, also inside a traced function.

    consume: frees each stacked array once it is unrolled, so that the base is never in memory twice.
    """
    return flat if model.scan_layers else flatten(unstack_layers(unflatten(flat), consume=consume, config=model))


def stacked(flat: Flat, model: ModelConfig, *, consume: bool = False) -> Flat:
    """The inverse of ``lay_out``."""
    return flat if model.scan_layers else flatten(stack_layers(unflatten(flat), consume=consume))

"""The start of a run: model settings, processor and parameters, from a model folder or fresh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import Params, abstract_params, attend_evenly, init_params
from chatpose_jax.models.config import ModelConfig, preset
from chatpose_jax.models.quantize import QUANTIZATIONS
from chatpose_jax.models.sharding import place, shardings
from chatpose_jax.processing.processor import Processor, tiny_processor
from chatpose_jax.storage import Location
from chatpose_jax.train import hosts
from chatpose_jax.train.run_config import RunConfig
from chatpose_jax.train.trainable import Flat, flatten, unflatten
from chatpose_jax.weights import folder as model_folder
from chatpose_jax.weights.arrays import read_metadata


def adopt(config: RunConfig, init: Location) -> RunConfig:
    """The configuration with the architecture and token ids of the model that it starts from. It is quantised if either of the two is.

    Raises UserError if both are, in different ways.
    """
    base = model_folder.read_config(init)
    keep = config.model
    if "none" != base.quantize != keep.quantize != "none":
        raise UserError(
            f"{init} is {base.quantize}, and model.quantize is {keep.quantize}: leave model.quantize out, or start from a folder "
            "that is not quantised"
        )
    changes = {
        name: getattr(keep, name) for name in ("lora", "head", "dtype", "param_dtype", "scan_layers", "attention")
    }
    if keep.quantize != "none":
        changes["quantize"] = keep.quantize
    return dataclasses.replace(config, model=base.replace(**changes))


def make_processor(config: RunConfig, init: Location | None) -> Processor:
    """The processor of the model that the run starts from, or that of ``tiny``, which comes with the package."""
    if init is not None:
        return Processor.load(init / model_folder.TOKENIZER, config.model)
    if config.model.text.vocab_size != preset("tiny").text.vocab_size:
        raise UserError(
            "this configuration needs weights to start from: give --init FOLDER, which 'chatpose convert LLAVA FOLDER "
            "--vision clip-vit-large-patch14-336' makes of LLaVA-1.5 of this size (README.md says where to get both); "
            "only the preset tiny trains from scratch"
        )
    return tiny_processor(config.model, config.data.template)


def initial_params(
    config: RunConfig, init: Location | None, mesh: Mesh | None = None, say: Callable[[str], None] = hosts.say
) -> Params:
    """Fresh parameters, or those of ``init``, with fresh adapters and pose head if it has none. They are made or read onto the mesh, and then
    quantised if the configuration is and ``init`` is not. ``say`` reports where they come from.

    Raises UserError if the folder has adapters that this configuration does not have, or if shapes differ.
    """
    key = jax.random.key(config.train.seed)
    if init is None:
        return attend_evenly(init_params(config.model, key, mesh))
    base = model_folder.read_config(init)
    model = config.model.replace(quantize=base.quantize)
    wanted, held = flatten(abstract_params(model)), read_metadata(init / model_folder.PARAMS)
    if lost := sorted(path for path in set(held) - set(wanted) if not path.startswith("pose_head/")):
        raise UserError(
            f"{init} contains {lost[0]} ({len(lost)} such arrays), which this configuration would drop: "
            "set model.lora to that of the folder"
        )
    other_head = model.head != base.head
    fresh = sorted(path for path in wanted if path not in held or (other_head and path.startswith("pose_head/")))
    if wrong := [path for path in wanted if path not in fresh and held[path].shape != wanted[path].shape]:
        raise UserError(
            f"{init}: {wrong[0]} is {held[wrong[0]].shape}, this configuration needs {wanted[wrong[0]].shape}"
        )
    kept = {path: leaf for path, leaf in wanted.items() if path not in fresh}
    target = unflatten({**held, **kept})
    loaded = flatten(model_folder.load_params(init, target if mesh is None else place(target, mesh)))

    def make(key: jax.Array) -> dict[str, jax.Array]:
        everything = flatten(init_params(model, key))
        return {path: everything[path] for path in fresh}

    places = None if mesh is None else shardings({path: wanted[path] for path in fresh}, mesh)
    made = jax.jit(make, out_shardings=places)(key) if fresh else {}
    say(f"starting from {init}" + (f"; new: {', '.join(fresh)}" if fresh else ""))
    if other_head and any(path.startswith("pose_head/") for path in held):
        say(
            f"its pose head, {base.head}, is replaced by a fresh {model.head}: to keep it, set model.head to that of the folder"
        )
    whole = {path: made[path] if path in made else loaded.pop(path) for path in wanted}
    return unflatten(whole if config.model == model else to_codes(whole, config.model, mesh))


def to_codes(flat: Flat, model: ModelConfig, mesh: Mesh | None) -> Flat:
    """Quantises the kernels that are quantised in ``model``, one after the other, on their devices. Empties ``flat``."""
    quantization, wanted = QUANTIZATIONS[model.quantize], flatten(abstract_params(model))
    for path in [path for path, leaf in wanted.items() if leaf.dtype == quantization.codes]:
        pair = path, quantization.scale_path(path)
        placed = None if mesh is None else shardings({name: wanted[name] for name in pair}, mesh)
        places = None if placed is None else tuple(placed[name] for name in pair)
        flat |= zip(pair, jax.jit(quantization, out_shardings=places)(flat.pop(path)))
    return {path: flat.pop(path) for path in wanted}

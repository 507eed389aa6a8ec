"""How parameters lie on a device mesh: a table from paths to logical axes, and one from logical axes to mesh axes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chatpose_jax.errors import UserError

# The first row that matches a path decides. Axes are named from the last one backwards: a leading layer axis is never split.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)/kernel", ("embed", "heads")),
    (r".*/(o_proj|down_proj|fc2)/kernel", ("heads", "embed")),
    (r".*/lora_a", ("embed", None)),
    (r".*/lora_b", (None, "embed")),
    (r"decoder/embed_tokens/embedding", ("vocabulary", "embed")),
    (r"decoder/lm_head/kernel", ("embed", "vocabulary")),
    (r".*", ()),
)

# Weights are gathered over "fsdp" where they are used, and split over "tensor" for good. Axes that a mesh lacks split nothing.
AXES: dict[str, str] = {"embed": "fsdp", "heads": "tensor", "vocabulary": "tensor"}


def partition_specs(params: Mapping[Any, Any], mesh: Mesh, axes: Mapping[str, str] = AXES) -> dict[Any, Any]:
    """A ``PartitionSpec`` for every parameter (arrays or abstract shapes), in the same nested dict.

    An axis whose size its mesh axis does not divide stays whole. Raises UserError when two axes of one array claim the same mesh axis.
    """
    compiled = [(re.compile(pattern), names) for pattern, names in RULES]

    def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        names = next(names for pattern, names in compiled if pattern.fullmatch(path))
        placed: list[str | None] = [None] * len(shape)
        for dimension, name in zip(range(len(shape) - len(names), len(shape)), names):
            axis = axes.get(name) if name is not None else None
            if axis in mesh.shape and shape[dimension] % mesh.shape[axis] == 0:
                placed[dimension] = axis
        used = [axis for axis in placed if axis is not None]
        if len(used) != len(set(used)):
            raise UserError(
                f"{path}: two axes of {shape} are mapped to the mesh axis {used[0]!r}; see models/sharding.py"
            )
        return PartitionSpec(*placed)

    def walk(node: Mapping[Any, Any], prefix: str) -> dict[Any, Any]:
        return {
            key: walk(value, f"{prefix}{key}/") if isinstance(value, Mapping) else spec(f"{prefix}{key}", value.shape)
            for key, value in node.items()
        }

    return walk(params, "")


def place(abstract: Mapping[Any, Any], mesh: Mesh) -> dict[Any, Any]:
    """The same abstract shapes with a ``NamedSharding`` on each: what ``weights.folder.load_params`` reads straight onto the mesh."""
    specs = partition_specs(abstract, mesh)
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        dict(abstract),
        specs,
    )

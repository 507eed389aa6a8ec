"""How arrays lie on a device mesh ``data × fsdp × tensor``: a table from paths to logical axes, and rules from those to mesh axes.

Parameters and batches are placed by it (``place``, ``batch_sharding``); inside a traced function ``on_mesh`` says where it will run, and
``constrain`` pins an activation there.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from chatpose_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

Logical = str | tuple[str, ...] | None
"""A logical axis, several that one dimension is split over in turn, or none."""

# The first row that matches a path decides. Axes are named from the last one backwards: a leading layer axis is never split.
# An adapter's factor is as thin as its rank: its long side is split over whatever its kernel is split over.
PARAMETERS: tuple[tuple[str, tuple[Logical, ...]], ...] = (
    (r".*/(q_proj|k_proj|v_proj)/kernel", ("embed", "heads")),
    (r".*/(gate_proj|up_proj|fc1)/kernel", ("embed", "mlp")),
    (r".*/o_proj/kernel", ("heads", "embed")),
    (r".*/(down_proj|fc2)/kernel", ("mlp", "embed")),
    (r".*/(q_proj|k_proj|v_proj)/kernel_scale", ("heads",)),
    (r".*/(gate_proj|up_proj)/kernel_scale", ("mlp",)),
    (r".*/(o_proj|down_proj)/lora_a", (("heads", "embed"), None)),
    (r".*/(o_proj|down_proj)/lora_b", (None, "embed")),
    (r".*/lora_a", ("embed", None)),
    (r".*/lora_b", (None, ("heads", "embed"))),
    (r"decoder/embed_tokens/embedding", ("vocabulary", "embed")),
    (r"decoder/lm_head/kernel", ("embed", "vocabulary")),
    (r".*", ()),
)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axes split each logical axis. Mesh axes that a mesh lacks split nothing.

    batch: rows of a batch.
    embed: the residual stream's width in weights, which are gathered over "fsdp" where they are used.
    heads, mlp, vocabulary: split over "tensor" for good, weights and activations.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocabulary: tuple[str, ...] = ("tensor",)

    def axes(self, logical: Logical, mesh: Any) -> tuple[str, ...]:
        """The mesh axes of one dimension."""
        names = (logical,) if isinstance(logical, str) else logical or ()
        return tuple(axis for name in names for axis in getattr(self, name) if axis in mesh.shape)

    def spec(self, logical: Sequence[Logical], shape: Sequence[int], mesh: Any, what: str = "array") -> PartitionSpec:
        """The spec of an array whose last dimensions have these logical axes.

        A dimension that its mesh axes do not divide stays whole. Raises UserError when two dimensions claim one mesh axis.
        """
        placed: list[Any] = [None] * len(shape)
        claimed: list[str] = []
        for dimension, name in zip(range(len(shape) - len(logical), len(shape)), logical):
            axes = self.axes(name, mesh)
            if axes and shape[dimension] % math.prod(mesh.shape[axis] for axis in axes) == 0:
                placed[dimension] = axes if len(axes) > 1 else axes[0]
                claimed += axes
        if twice := sorted({axis for axis in claimed if claimed.count(axis) > 1}):
            raise UserError(
                f"{what}: two axes of {tuple(shape)} are mapped to the mesh axis {twice[0]!r}; see models/sharding.py"
            )
        return PartitionSpec(*placed)


RULES = ShardingRules()


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of automatic axes over ``devices`` (all by default), laid out as their network is.

    Args:
        data, fsdp, tensor: devices along each axis; -1 on one of them takes what is left.

    Raises UserError when the sizes do not multiply to the number of devices; one process alone may leave devices unused.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    total = math.prod(sizes)
    alone = len({device.process_index for device in devices}) == 1
    if -1 in sizes or total > len(devices) or (total < len(devices) and not alone):
        asked = " × ".join(f"{name} {size}" for name, size in zip(MESH_AXES, (data, fsdp, tensor)))
        raise UserError(f"a mesh of {asked} does not fit {len(devices)} devices: change train.mesh")
    grid = mesh_utils.create_device_mesh(sizes, devices=devices[:total], allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_specs(params: Mapping[Any, Any], mesh: Any, rules: ShardingRules = RULES) -> dict[Any, Any]:
    """A ``PartitionSpec`` for every parameter (arrays or abstract shapes), in the same nested dict, or dict of paths.

    mesh: a ``Mesh`` or an ``AbstractMesh``. Raises UserError when two axes of one array claim the same mesh axis.
    """
    compiled = [(re.compile(pattern), names) for pattern, names in PARAMETERS]

    def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        logical = next(names for pattern, names in compiled if pattern.fullmatch(path))
        return rules.spec(logical, shape, mesh, path)

    def walk(node: Mapping[Any, Any], prefix: str) -> dict[Any, Any]:
        return {
            key: walk(value, f"{prefix}{key}/") if isinstance(value, Mapping) else spec(f"{prefix}{key}", value.shape)
            for key, value in node.items()
        }

    return walk(params, "")


def shardings(params: Mapping[Any, Any], mesh: Mesh, rules: ShardingRules = RULES) -> dict[Any, Any]:
    """A ``NamedSharding`` for every parameter, in the same nested dict."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(params, mesh, rules))


def place(abstract: Mapping[Any, Any], mesh: Mesh, rules: ShardingRules = RULES) -> dict[Any, Any]:
    """The same abstract shapes with a ``NamedSharding`` on each: what ``weights.folder.load_params`` reads straight onto the mesh."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        dict(abstract),
        shardings(abstract, mesh, rules),
    )


def batch_sharding(mesh: Mesh, rules: ShardingRules = RULES, *, stacked: bool = False) -> NamedSharding:
    """Rows over all devices that do not share a product. stacked: behind a leading axis of micro-batches."""
    rows = rules.axes("batch", mesh)
    return NamedSharding(mesh, PartitionSpec(None, rows) if stacked else PartitionSpec(rows))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters (arrays, or abstract shapes that ``place`` gave) lie on; None for one device."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    return next(
        (
            place.mesh
            for place in places
            if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh) and place.mesh.size > 1
        ),
        None,
    )


_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)
_GATHERS: contextvars.ContextVar[bool] = contextvars.ContextVar("gathers", default=True)


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None, *, gathers: bool = True) -> Iterator[None]:
    """Inside a traced function: what is traced in this block will run on ``mesh``, which may be of another machine than this one.

    ``None`` is this process's default device. Enter it within the function that is traced, never around a call of a jitted one.
    gathers: what ``gather`` does. Few tokens had better travel to where the weights are kept.
    """
    tokens = _MESH.set(mesh), _GATHERS.set(gathers)
    try:
        yield
    finally:
        _MESH.reset(tokens[0])
        _GATHERS.reset(tokens[1])


def current_mesh() -> Mesh | None:
    """The mesh that is being traced for, when it has more than one device."""
    mesh = _MESH.get()
    return mesh if mesh is not None and mesh.size > 1 else None


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: what is being traced for, which on a planning machine is not what runs here."""
    mesh = _MESH.get()
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def constrain(x: jax.Array, *logical: Logical) -> jax.Array:
    """Pin an activation to the mesh that is being traced for: one logical axis or None a dimension. Without a mesh, nothing."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, RULES.spec(logical, x.shape, mesh)))


STORED = "embed"
"""The logical axis that weights are split over only where they are kept."""


def gather(x: jax.Array, *logical: Logical) -> jax.Array:
    """A parameter as a product uses it: whole along what only storage splits. Its gradient is split again as it is summed up.

    Said outright, for otherwise the compiler may split the product instead, and loop over pieces of the weights.
    Where ``on_mesh`` asks for that, the parameter is left as it lies.
    """
    if current_mesh() is None or not _GATHERS.get():
        return x
    return checkpoint_name(_gather(x, logical), GATHERED)


GATHERED = "gathered"
"""What remat policies call gathered weights: they are never kept for the backward pass."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, logical: tuple[Logical, ...]) -> jax.Array:
    names = [(name,) if isinstance(name, str) else name or () for name in logical]
    return constrain(x, *(tuple(part for part in name if part != STORED) for name in names))


def _gather_forward(x: jax.Array, logical: tuple[Logical, ...]) -> tuple[jax.Array, None]:
    return _gather(x, logical), None


def _gather_backward(logical: tuple[Logical, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, *logical),)


_gather.defvjp(_gather_forward, _gather_backward)

"""Sharding over a device mesh ``slice × data × fsdp × tensor``.

Two tables decide: ``PARAMETERS`` maps a parameter's path to logical axes, ``ShardingRules`` maps logical axes to mesh axes. ``place`` and
``batch_sharding`` apply them to parameters and batches. Inside a traced function, ``on_mesh`` sets the mesh and ``constrain`` shards an
activation on it.
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
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from chatpose_jax.errors import UserError

MESH_AXES = ("slice", "data", "fsdp", "tensor")

Logical = str | tuple[str, ...] | None
"""The logical axis of one dimension: a name, several names (the dimension is split over all of them), or None (not split)."""

# The first row whose pattern matches the path applies. Its axes are those of the last dimensions: the leading layer axis of stacked layers
# has none and is never split. An adapter's factors are thin (one side is the rank), so only the long side is split, over all mesh axes that
# split the layer's kernel.
PARAMETERS: tuple[tuple[str, tuple[Logical, ...]], ...] = (
    (r".*/(q_proj|k_proj|v_proj)/kernel", ("embed", "heads")),
    (r".*/(gate_proj|up_proj|fc1)/kernel", ("embed", "mlp")),
    (r".*/o_proj/kernel", ("heads", "embed")),
    (r".*/(down_proj|fc2)/kernel", ("mlp", "embed")),
    (r".*/(q_proj|k_proj|v_proj)/kernel_scale", ("heads",)),
    (r".*/(gate_proj|up_proj)/kernel_scale", ("mlp",)),
    (r".*/(q_proj|k_proj|v_proj)/group_scale", (None, ("heads", "embed"))),
    (r".*/(gate_proj|up_proj)/group_scale", (None, ("mlp", "embed"))),
    (r".*/o_proj/group_scale", ("heads", "embed")),
    (r".*/down_proj/group_scale", ("mlp", "embed")),
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
    """Which mesh axes split each logical axis. A mesh axis that the mesh does not have is left out.

    batch: rows of a batch. Nothing else is split over "slice": the network between slices is slow, and carries only sums of gradients.
    embed: the residual stream's width, in weights only. These are all-gathered over "fsdp" before each matmul (``gather_weight``).
    heads, mlp, vocabulary: split over "tensor", in weights and in activations (tensor parallelism).
    """

    batch: tuple[str, ...] = ("slice", "data", "fsdp")
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocabulary: tuple[str, ...] = ("tensor",)

    def axes(self, logical: Logical, mesh: Any) -> tuple[str, ...]:
        """The mesh axes that split a dimension with this logical axis."""
        names = (logical,) if isinstance(logical, str) else logical or ()
        return tuple(axis for name in names for axis in getattr(self, name) if axis in mesh.shape)

    def spec(self, logical: Sequence[Logical], shape: Sequence[int], mesh: Any, what: str = "array") -> PartitionSpec:
        """The ``PartitionSpec`` of an array whose last dimensions have these logical axes.

        A dimension that its mesh axes do not divide evenly is not split. Raises UserError when two dimensions need the same mesh axis.
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


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, slices: int = -1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of ``AxisType.Auto`` axes over ``devices`` (all by default), in an order that suits their interconnect.

    Args:
        data, fsdp, tensor: number of devices of a slice along each axis; -1, for at most one axis, takes all remaining devices.
        slices: number of slices, groups of devices that a slower network connects; -1 takes what TPUs say, and one elsewhere. CPUs and GPUs are
            cut into equal parts in their order (GPUs: first by ``slice_index``, which counts NVLink domains).

    Raises UserError when the product of the sizes is not the number of devices, and when ``slices`` is not what TPUs say. A single process may
    use fewer devices than it has.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=slice_of)
    if devices[0].platform == "tpu":
        found = len({slice_of(device) for device in devices})
        if slices not in (-1, found):
            raise UserError(
                f"train.mesh.slices={slices}: these TPUs are {found} slice(s); -1 takes as many as there are"
            )
        slices = found
    slices = max(slices, 1)
    sizes = [data, fsdp, tensor]
    given = slices * math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    total = slices * math.prod(sizes)
    alone = len({device.process_index for device in devices}) == 1
    if -1 in sizes or total > len(devices) or (total < len(devices) and not alone):
        asked = " × ".join(f"{name} {size}" for name, size in zip(MESH_AXES, (slices, data, fsdp, tensor)))
        raise UserError(f"a mesh of {asked} does not fit {len(devices)} devices: change train.mesh")
    parts = np.split(np.array(devices[:total], dtype=object), slices)
    grids = [mesh_utils.create_device_mesh(sizes, devices=list(part), allow_split_physical_axes=True) for part in parts]
    return Mesh(np.stack(grids), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def slice_of(device: Any) -> int:
    """The number of the slice that a device belongs to: of a TPU's slice, of a GPU's NVLink domain; 0 where devices have none."""
    return getattr(device, "slice_index", None) or 0


def partition_specs(params: Mapping[Any, Any], mesh: Any, rules: ShardingRules = RULES) -> dict[Any, Any]:
    """A ``PartitionSpec`` for every parameter.

    params: arrays or abstract shapes, as a nested dict or a flat dict by path; the result has the same structure.
    mesh: a ``Mesh`` or an ``AbstractMesh``. Raises UserError when two dimensions of one array need the same mesh axis.
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
    """The same abstract shapes, each with its ``NamedSharding``; ``weights.folder.load_params`` reads arrays directly into that sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        dict(abstract),
        shardings(abstract, mesh, rules),
    )


def batch_sharding(mesh: Mesh, rules: ShardingRules = RULES, *, stacked: bool = False) -> NamedSharding:
    """The sharding of a batch: its rows are split over the mesh axes "slice", "data" and "fsdp".

    stacked: the arrays have a leading axis of micro-batches, which is not split.
    """
    rows = rules.axes("batch", mesh)
    return NamedSharding(mesh, PartitionSpec(None, rows) if stacked else PartitionSpec(rows))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh of parameters (arrays, or abstract shapes from ``place``); None where they are on one device."""
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
    """Context manager for a traced function: the operations traced in the block will run on ``mesh``.

    Use it inside the function that is traced, not around the call of a jitted function: a cached trace would ignore it.

    mesh: may belong to another machine (ahead-of-time compilation); None is this process's default device.
    gathers: whether ``gather_weight`` all-gathers weights. When decoding, a step has few tokens: it is cheaper to send the activations to the
        sharded weights.
    """
    tokens = _MESH.set(mesh), _GATHERS.set(gathers)
    try:
        yield
    finally:
        _MESH.reset(tokens[0])
        _GATHERS.reset(tokens[1])


def current_mesh() -> Mesh | None:
    """The mesh of the enclosing ``on_mesh``; None where there is none or it has one device."""
    mesh = _MESH.get()
    return mesh if mesh is not None and mesh.size > 1 else None


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: the platform that the traced program will run on. It may differ from this machine's (``chatpose plan``)."""
    mesh = _MESH.get()
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def constrain(x: jax.Array, *logical: Logical) -> jax.Array:
    """Shard an activation on the mesh of the enclosing ``on_mesh``; without a mesh, return it as it is.

    logical: for each dimension its logical axis, or None.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, RULES.spec(logical, x.shape, mesh)))


STORED = "embed"
"""The logical axis that is split in storage only: ``gather_weight`` all-gathers it before use."""


def gather_weight(x: jax.Array, *logical: Logical) -> jax.Array:
    """All-gather a weight over "fsdp" before a matmul; its sharding over "tensor" stays. The gradient is reduce-scattered.

    Without this explicit constraint the compiler may shard the matmul instead, and loop over shards of the weight. Under
    ``on_mesh(gathers=False)`` the weight is returned as it is.

    logical: the logical axis of each dimension of ``x``, or None.
    """
    if current_mesh() is None or not _GATHERS.get():
        return x
    return checkpoint_name(_gather(x, logical), GATHERED)


def splits(logical: Logical) -> int:
    """Number of parts in which a matmul finds the axis of a weight that comes from ``gather_weight``."""
    mesh = current_mesh()
    if mesh is None or (logical == STORED and _GATHERS.get()):
        return 1
    return math.prod(mesh.shape[axis] for axis in RULES.axes(logical, mesh))


GATHERED = "gathered"
"""The checkpoint name of all-gathered weights. Remat policies never save them: the backward pass gathers them again."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, logical: tuple[Logical, ...]) -> jax.Array:
    names = [(name,) if isinstance(name, str) else name or () for name in logical]
    return constrain(x, *(tuple(part for part in name if part != STORED) for name in names))


def _gather_forward(x: jax.Array, logical: tuple[Logical, ...]) -> tuple[jax.Array, None]:
    return _gather(x, logical), None


def _gather_backward(logical: tuple[Logical, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    if platform() == "tpu" and None in logical:
        # Of an adapter, whose rank is not split. Asked for the whole sum first, the compiler reduces it and keeps a part: one reduce-scatter.
        # Otherwise it may turn the matmul into a loop that sends parts of its result from chip to chip, which takes many more collectives and much
        # longer to compile. The whole gradient of a kernel would take too much memory.
        gradient = _gather(gradient, logical)
    return (constrain(gradient, *logical),)


_gather.defvjp(_gather_forward, _gather_backward)

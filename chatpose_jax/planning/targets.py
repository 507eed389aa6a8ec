"""Target machines of ``chatpose plan``: the peaks of each chip, and devices to compile for on a machine that has none of them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chatpose_jax.errors import UserError
from chatpose_jax.train.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that real programs reach (docs/scaling.md: sources). wait, wait_between: seconds that even the smallest collective takes,
    inside a slice and between slices.
    """

    products: float
    memory: float
    network: float
    wait: float
    wait_between: float

    def __str__(self) -> str:
        return (
            f"{100 * self.products:.0f} % of the peak for products, {100 * self.memory:.0f} % for memory, "
            f"{100 * self.network:.0f} % for the network, {1e6 * self.wait:.0f} µs a collective, {1e6 * self.wait_between:.0f} µs one between slices"
        )


EFFICIENCY = Efficiency(products=0.5, memory=0.65, network=0.65, wait=20e-6, wait_between=200e-6)

# What XLA must know to compile for a GPU that this machine lacks: (cores, L2 bytes, clock in GHz, shared memory of a core, of a block,
# compute capability, name).
_CARDS: dict[str, tuple[int, int, float, int, int, tuple[int, int], str]] = {
    "a100": (108, 41943040, 1.41, 167936, 166912, (8, 0), "NVIDIA A100-SXM4-80GB"),
    "a100-40": (108, 41943040, 1.41, 167936, 166912, (8, 0), "NVIDIA A100-SXM4-40GB"),
    "h100": (132, 52428800, 1.98, 233472, 232448, (9, 0), "NVIDIA H100 80GB HBM3"),
    "h200": (132, 52428800, 1.98, 233472, 232448, (9, 0), "NVIDIA H200"),
    "l4": (58, 50331648, 2.04, 102400, 101376, (8, 9), "NVIDIA L4"),
    "a10g": (80, 6291456, 1.71, 102400, 101376, (8, 6), "NVIDIA A10G"),
    "rtx4090": (128, 75497472, 2.52, 102400, 101376, (8, 9), "NVIDIA GeForce RTX 4090"),
    "rtx3090": (82, 6291456, 1.7, 102400, 101376, (8, 6), "NVIDIA GeForce RTX 3090"),
    "rtx3060": (28, 3145728, 1.78, 102400, 101376, (8, 6), "NVIDIA GeForce RTX 3060"),
    "rtx4060": (24, 25165824, 2.46, 102400, 101376, (8, 9), "NVIDIA GeForce RTX 4060"),
}

ALIASES = {"v5litepod": "v5e", "a100-80": "a100"}
"""Other names of chips, used by their makers and by clouds."""

_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORUS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

SLICES: dict[str, tuple[int, tuple[str, ...]]] = {
    "v4": (2, _TORUS),
    "v5e": (1, _PLANE),
    "v5p": (2, _TORUS),
    "v6e": (1, _PLANE),
}
"""How to read names such as v5p-128: the units that a chip counts for (v4 and v5p count TensorCores, two a chip), and the topologies that Google
offers."""

EXAMPLES = "v5e-16, v5p-128, v6e-8, v5e:4x4, v5e:8x8*2, v5p:4x4x4, h100, h100:8, h200:8, a100:8, a100-40:8, rtx4090"


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine of ``chips`` chips of one kind, in ``slices`` equal parts. chip: None for CPU devices, whose peaks are unknown."""

    name: str
    chips: int
    chip: Chip | None
    slices: int = 1

    @property
    def one(self) -> str:
        """The name of one slice."""
        return self.name.partition("*")[0]


def parse(name: str) -> Target:
    """The target of a name: ``v5e-16`` or ``v5p-128`` (a TPU slice by Google's name), ``v5e:4x8`` (a TPU and its topology), ``h100`` or ``h100:8``
    (GPUs and their number), ``cpu:8``. ``*N`` after any of them means N such slices, or N machines of such GPUs. Raises UserError for any other name.
    """
    one, times, number = name.lower().partition("*")
    slices = int(number) if re.fullmatch(r"\d{1,4}", number) else int(not times)
    kind, _, size = one.partition(":")
    kind = ALIASES.get(kind.removesuffix("gb"), kind.removesuffix("gb"))
    if not size and (match := re.fullmatch(r"(.*?)-(\d+)", kind)):
        maker = ALIASES.get(match[1], match[1])
        if maker in SLICES:
            kind, size = maker, _topology(name, maker, int(match[2]))
    chip = CHIPS.get(kind)
    form = r"\d+x\d+(x\d+)?" if chip is not None and chip.platform == "tpu" else r"(\d+)?"
    if (chip is None and kind != "cpu") or not re.fullmatch(form, size) or "0" in size.split("x") or not slices:
        raise UserError(
            f"--target {name}: expected a chip ({', '.join(CHIPS)}) and its size, topology or count, and *N for N slices, "
            f"such as {EXAMPLES}"
        )
    if slices > 1 and chip is not None and chip.between is None:
        raise UserError(f"--target {name}: no figure is known for a network between several {kind}")
    chips = slices * math.prod(int(n) for n in (size or "1").split("x"))
    return Target(f"{kind}:{size or 1}" + f"*{slices}" * (slices > 1), chips, chip, slices)


def _topology(name: str, kind: str, number: int) -> str:
    cores, topologies = SLICES[kind]
    known = {cores * math.prod(map(int, shape.split("x"))): shape for shape in topologies}
    if number not in known:
        counts = "TensorCores, two a chip" if cores == 2 else "chips"
        raise UserError(
            f"--target {name}: {kind}-N counts {counts}, and N is one of {', '.join(map(str, known))}; "
            f"for another shape write its topology, such as {kind}:{topologies[3]}"
        )
    return known[number]


def devices(target: Target) -> Sequence[Any]:
    """Devices of the target, to compile for but not to run on. Raises UserError that says what to install."""
    if target.chip is None:
        here = jax.devices("cpu")
        if len(here) < target.chips:
            raise UserError(
                f"this process has {len(here)} CPU devices, not {target.chips}: "
                f"set XLA_FLAGS=--xla_force_host_platform_device_count={target.chips}"
            )
        return here[: target.chips]
    return _tpu(target) if target.chip.platform == "tpu" else _gpu(target)


EFFORT = -1.0
"""The lowest effort. A TPU compiler spends most of its time on making the program fast, and a plan does not run it; docs/scaling.md compares."""


def compiler_options(target: Target, effort: float = EFFORT) -> tuple[dict[str, Any] | None, str]:
    """Compiler options for a target, and their description for the plan ("" where there are none).

    GPU: autotuning is off, because it runs kernels on the card. TPU: ``effort``, from -1 to 0, is how hard the compiler tries to make the program
    fast; a training run uses 0. The option's name depends on the compiler's version, so each name is tried.
    """
    if target.chip is None:
        return None, ""
    if target.chip.platform == "gpu":
        return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}, ""
    # A number up to jax 0.10, levels since then. The lowest level gives the same program as -1.
    level = "O0" if effort <= -0.5 else "O1"
    for options in ({"exec_time_optimization_effort": float(effort)}, {"optimization_level": level} if effort else {}):
        if _takes(target, options):
            return options or None, ", ".join(
                f"{name}={value}" for name, value in options.items()
            ) or "the compiler's default, a run's"
    return None, f"the compiler's default: it takes no option for effort, --effort {effort:g} was not followed"


def _takes(target: Target, options: dict[str, Any]) -> bool:
    """Whether the target's compiler accepts these options; tried on an empty program."""
    mesh = Mesh(np.array(devices(target)[:1]), ("x",))
    number = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    lowered = jax.jit(lambda x: x).trace(number).lower(lowering_platforms=("tpu",))
    try:
        lowered.compile(compiler_options=options)
    except (jax.errors.JaxRuntimeError, ValueError) as problem:
        if re.search(r"No such compile option|is not a valid", str(problem)):
            return False
        raise
    return True


def _tpu(target: Target) -> Sequence[Any]:
    from jax.experimental import topologies

    _require("libtpu", "TPUs", "tpu")
    # Without these libtpu asks a metadata server what machine this is, and reports errors where there is none; and only one plan could run at a time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault(
        "TPU_ACCELERATOR_TYPE", "v5litepod-4"
    )  # this host's type; the topology decides what is compiled for
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"num_slices": target.slices}
    if target.chips == target.slices:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if target.name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as on Cloud TPU
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=target.one, **options).devices
    except Exception as error:
        raise UserError(
            f"--target {target.name}: libtpu refuses this topology: {' '.join(str(error).split())[:300]}"
        ) from error


def _gpu(target: Target) -> Sequence[Any]:
    from jax.experimental import topologies

    _require("jax_cuda13_plugin", "GPUs", "gpu")
    kind, shape = (
        target.name.partition(":")[0],
        f"{target.slices}x1x{target.chips // target.slices}",
    )  # slices, hosts, cards of a host
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name=kind, topology=shape, target_config=_card(kind)
        ).devices
    except Exception as error:
        raise UserError(
            f"--target {target.name}: the CUDA plugin refuses: {' '.join(str(error).split())[:300]}; "
            "JAX_PLATFORMS=cpu must be set before jax looks for devices, as `chatpose plan` does"
        ) from error


def _require(module: str, what: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise UserError(
            f'planning for {what} needs their compiler: pip install ".[{extra}]" in the checkout (any machine will do)'
        )


def _card(kind: str) -> str:
    """The text form of XLA's ``GpuTargetConfigProto`` for a GPU."""
    cores, l2, clock, per_core, per_block, (major, minor), title = _CARDS[kind]
    chip = CHIPS[kind]
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {1536 if major == 8 and minor else 2048}
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core} shared_memory_per_block_optin: {per_block}
  core_count: {cores} fpus_per_core: {64 if (major, minor) == (8, 0) else 128}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {int(chip.memory)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{title}"
"""

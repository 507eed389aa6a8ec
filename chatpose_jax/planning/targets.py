"""Machines to plan for: what a chip can do, and devices of a machine that is not here, for the compiler to compile for."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from chatpose_jax.errors import UserError

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks by the makers' data sheets.

    flops: dense bfloat16 operations a second. memory: bytes that a program may use. bandwidth: of that memory, bytes a second.
    network: bytes a second that a chip can send to its neighbours, over all links in one direction.
    """

    platform: str
    flops: float
    memory: float
    bandwidth: float
    network: float


CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 275e12, 30.75 * GiB, 1.23e12, 2.7e11),
    "v5e": Chip("tpu", 197e12, 15.75 * GiB, 8.2e11, 1.8e11),
    "v5p": Chip("tpu", 459e12, 95.74 * GiB, 2.77e12, 5.4e11),
    "v6e": Chip("tpu", 918e12, 31.25 * GiB, 1.64e12, 3.6e11),
    "a100": Chip("gpu", 312e12, 79.1 * GiB, 2.04e12, 3.0e11),
    "h100": Chip("gpu", 989e12, 79.1 * GiB, 3.35e12, 4.5e11),
    "h200": Chip("gpu", 989e12, 139.8 * GiB, 4.8e12, 4.5e11),
}

# What XLA must know of a card that is not there: (cores, L2 bytes, clock in GHz, shared memory a core, a block, compute capability).
_CARDS: dict[str, tuple[int, int, float, int, int, tuple[int, int], str]] = {
    "a100": (108, 41943040, 1.41, 167936, 166912, (8, 0), "NVIDIA A100-SXM4-80GB"),
    "h100": (132, 52428800, 1.98, 233472, 232448, (9, 0), "NVIDIA H100 80GB HBM3"),
    "h200": (132, 52428800, 1.98, 233472, 232448, (9, 0), "NVIDIA H200"),
}

EXAMPLES = "v5e:2x4, v5e:16x16, v5p:4x4x4, v6e:2x4, h100, h100:8, h200:8"


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine: ``chips`` of one kind. chip is None on this CPU, of which nothing is known."""

    name: str
    chips: int
    chip: Chip | None


def parse(name: str) -> Target:
    """``v5e:4x8`` (a TPU and its topology), ``h100`` or ``h100:8`` (a GPU and how many), ``cpu:8``. Raises UserError."""
    kind, _, size = name.lower().partition(":")
    chip = CHIPS.get(kind)
    form = r"\d+x\d+(x\d+)?" if chip is not None and chip.platform == "tpu" else r"(\d+)?"
    if (chip is None and kind != "cpu") or not re.fullmatch(form, size) or "0" in size.split("x"):
        raise UserError(
            f"--target {name}: expected a chip ({', '.join(CHIPS)}) and its topology or count, such as {EXAMPLES}"
        )
    return Target(f"{kind}:{size or 1}", math.prod(int(n) for n in (size or "1").split("x")), chip)


def devices(target: Target) -> Sequence[Any]:
    """The target's devices: good for compiling, not for running. Raises UserError that says what to install."""
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
"""The least: most of a TPU compiler's time goes into a fast program, which a plan does not run; docs/scaling.md compares the figures."""


def compiler_options(target: Target, effort: float = EFFORT) -> dict[str, Any] | None:
    """For GPUs no autotuning: it runs kernels, for which the card would have to be here. For TPUs the effort that is spent on a fast program,
    -1 to 0, where a run has 0.
    """
    if target.chip is None:
        return None
    if target.chip.platform == "gpu":
        return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    return {"exec_time_optimization_effort": float(effort)}


def _tpu(target: Target) -> Sequence[Any]:
    from jax.experimental import topologies

    _require("libtpu", "TPUs", "tpu")
    # No cloud to ask what machine this is, and several plans may be made at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if target.chips == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=target.name, **options).devices
    except Exception as error:
        raise UserError(
            f"--target {target.name}: libtpu refuses this topology: {' '.join(str(error).split())[:300]}"
        ) from error


def _gpu(target: Target) -> Sequence[Any]:
    from jax.experimental import topologies

    _require("jax_cuda13_plugin", "GPUs", "gpu")
    kind, shape = target.name.partition(":")[0], f"1x1x{target.chips}"  # slices, hosts, cards of a host
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name=kind, topology=shape, target_config=_card(kind)
        ).devices
    except Exception as error:
        raise UserError(
            f"--target {target.name}: the CUDA plugin refuses: {' '.join(str(error).split())[:300]}; "
            "set JAX_PLATFORMS=cpu if this machine has no GPU"
        ) from error


def _require(module: str, what: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise UserError(
            f'planning for {what} needs their compiler: pip install "chatpose-jax[{extra}]", or ".[{extra}]" in a checkout (any machine will do)'
        )


def _card(kind: str) -> str:
    """A card as XLA's ``GpuTargetConfigProto``, in text."""
    cores, l2, clock, per_core, per_block, (major, minor), title = _CARDS[kind]
    chip = CHIPS[kind]
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core} shared_memory_per_block_optin: {per_block}
  core_count: {cores} fpus_per_core: {128 if major > 8 else 64} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {int(chip.memory)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{title}"
"""

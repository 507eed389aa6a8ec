"""What the makers of chips promise, and which chip a device is."""

from __future__ import annotations

import dataclasses

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures from the makers' data sheets.

    flops: dense bfloat16 operations a second. memory: bytes that a program may use. bandwidth: bytes a second of that memory.
    network: bytes a second that a chip can send to its neighbours, all links together, in one direction.
    between: the same over the network between slices (GPUs: machines), a chip's share of it. None: no such network.
    """

    platform: str
    flops: float
    memory: float
    bandwidth: float
    network: float
    between: float | None = None


CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 275e12, 30.75 * GiB, 1.23e12, 2.7e11, 6.25e9),
    "v5e": Chip("tpu", 197e12, 15.75 * GiB, 8.2e11, 1.8e11, 3.125e9),
    "v5p": Chip("tpu", 459e12, 95.74 * GiB, 2.77e12, 5.4e11, 6.25e9),
    "v6e": Chip("tpu", 918e12, 31.25 * GiB, 1.64e12, 3.6e11, 1.25e10),
    "a100": Chip("gpu", 312e12, 79.1 * GiB, 2.04e12, 3.0e11, 2.5e10),
    "a100-40": Chip("gpu", 312e12, 39.3 * GiB, 1.555e12, 3.0e11, 2.5e10),
    "h100": Chip("gpu", 989e12, 79.1 * GiB, 3.35e12, 4.5e11, 5.0e10),
    "h200": Chip("gpu", 989e12, 139.8 * GiB, 4.8e12, 4.5e11, 5.0e10),
    # Smaller cards: operations with float32 sums, and the memory that CUDA reports, less half a GiB for its own context. Their network is PCIe.
    "l4": Chip("gpu", 121e12, 21.5 * GiB, 3.0e11, 3.2e10),
    "a10g": Chip("gpu", 70e12, 21.5 * GiB, 6.0e11, 3.2e10),
    "rtx4090": Chip("gpu", 165e12, 23.1 * GiB, 1.008e12, 3.2e10),
    "rtx3090": Chip("gpu", 71e12, 23.1 * GiB, 9.36e11, 3.2e10),
    "rtx3060": Chip("gpu", 25.5e12, 11.2 * GiB, 3.6e11, 3.2e10),
    "rtx4060": Chip("gpu", 30e12, 7.2 * GiB, 2.72e11, 1.6e10),
}
"""Sources of ``between``: Google's pages on v5p (50 Gbit/s a chip), v5e and v6e (6.4 and 25.6 Tbit/s for 256 chips); the scaling book for v4;
NVIDIA's DGX machines, one port for each GPU, of 200 Gbit/s (A100) or 400 Gbit/s (H100, H200)."""

DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A10G": "a10g",
}
"""How a ``device_kind`` begins -> a chip of ``CHIPS``; the first that fits counts."""


def chip_of(device_kind: str) -> str | None:
    """The row of ``CHIPS`` of a device as JAX names it; None for one that is not known, as any CPU."""
    return next((chip for kind, chip in DEVICE_KINDS.items() if device_kind.startswith(kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Operations per second that the maker promises for a device as JAX names it; None for one that is not known, as any CPU."""
    name = chip_of(device_kind)
    return None if name is None else CHIPS[name].flops

"""What one card gives to plain programs: its memory's bandwidth and its products, beside its maker's figures; and the versions here.

python bench/card.py [--preset small] [--json card.json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from decoder import card, cores, write

from chatpose_jax.train.chips import chip_of

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax", "optax", "orbax-checkpoint", "numpy")
PACKAGES += ("torch", "transformers", "peft")


def timed(function: Callable[[], Any], repeats: int = 20) -> float:
    """Median seconds of three blocks of calls."""

    def block() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            output = function()
        jax.block_until_ready(output)
        return (time.perf_counter() - begin) / repeats

    block()
    return statistics.median(block() for _ in range(3))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("13b", "small"), default="13b")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    megabytes, size = (1024, 8192) if args.preset == "13b" else (16, 256)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device, chip = card()
    result: dict[str, Any] = {
        "device": device, "chip": chip_of(device), "python": platform.python_version(), "cores": cores(), "versions": versions,
        "memory_bytes": (jax.devices()[0].memory_stats() or {}).get("bytes_limit"),
        "makers_bandwidth": chip and chip.bandwidth, "makers_flops": chip and chip.flops,
    }  # fmt: skip
    write(args.json, result)
    print(f"{device}, {cores()} cores, Python {result['python']}, {versions}", flush=True)
    memory = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    result["bandwidth"] = 2 * memory.nbytes / timed(lambda: add(memory))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    result["flops"] = 2.0 * size**3 / timed(lambda: product(a, b))
    exact = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    result["flops_float32"] = 2.0 * size**3 / timed(lambda: exact(a, b), repeats=3)
    write(args.json, result)
    print(
        f"copies {result['bandwidth'] / 1e12:.2f} TB/s, bfloat16 products {result['flops'] / 1e12:.0f} TFLOP/s, "
        f"float32 {result['flops_float32'] / 1e12:.1f} TFLOP/s"
    )
    return result


if __name__ == "__main__":
    main()

"""The body on one GPU: microseconds a body, forward and with its gradient, beside what the card allows.

The bound is the longer of two times at the maker's figures: reading the inputs and the body's arrays and writing the vertices
once; and the operations of the blend shapes and of skinning in float32, outside the tensor cores, which would round to 10 bits.
The model is random, in SMPL's exact format.

    python bench/body_gpu.py [--batch 1024 16384] [--json body.json]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from body import random_smpl
from decoder import card, write

from chatpose_jax.train.chips import chip_of
from smpl_jax import axis_angle_to_matrix, load_body, vertices
from smpl_jax.body import BodyModel

FLOAT32 = {"h100": 67e12, "h200": 67e12, "a100": 19.5e12, "a100-40": 19.5e12}
"""Float32 operations a second outside the tensor cores: NVIDIA's data sheets of H100 SXM, H200 and A100. Other cards have no bound here."""
SECONDS = 0.2
"""Time of one block of calls; five blocks are timed."""


def bound(body: BodyModel, batch: int, bandwidth: float, flops: float) -> dict[str, float]:
    """Seconds of a forward pass and of one with the gradient of poses and shapes, at the card's peaks."""
    vertex, bases, joints = 3 * body.num_vertices, len(body.bases), body.num_joints
    operations = 2.0 * batch * (bases * vertex + 12 * joints * body.num_vertices + 3 * vertex)
    arrays = 4.0 * (bases * vertex + joints * body.num_vertices + vertex)
    moved = 4.0 * batch * (3 * joints + body.num_betas + vertex)
    return {
        "forward": max(operations / flops, (arrays + moved) / bandwidth),
        # The gradient repeats both products with the cotangent of the vertices in place of the vertices.
        "forward + backward": 2 * max(operations / flops, (arrays + moved) / bandwidth),
    }


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Median seconds of a call, of blocks of calls of which each waits for the last."""

    def block(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            output = function(*arguments)
        jax.block_until_ready(output)
        return (time.perf_counter() - begin) / count

    block(2)
    count = max(1, int(SECONDS / block(2)))
    return statistics.median(block(count) for _ in range(5))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "SMPL_NEUTRAL.pkl"
        random_smpl(path)
        body = load_body(path)
    device, chip = card()
    result: dict[str, Any] = {"device": device, "rows": []}
    posed = jax.jit(lambda pose, betas: vertices(body, axis_angle_to_matrix(pose), betas))
    slope = jax.jit(jax.grad(lambda pose, betas, weight: jnp.vdot(posed(pose, betas), weight), argnums=(0, 1)))
    for batch in args.batch:
        rng = np.random.default_rng(batch)
        pose, betas, weight = (
            jnp.asarray(rng.standard_normal((batch, *shape), np.float32) * scale)
            for scale, shape in ((0.3, (24, 3)), (1, (10,)), (1, (body.num_vertices, 3)))
        )
        flops = FLOAT32.get(chip_of(device) or "")
        least = {} if chip is None or flops is None else bound(body, batch, chip.bandwidth, flops)
        for what, seconds in (
            ("forward", timed(posed, pose, betas)),
            ("forward + backward", timed(slope, pose, betas, weight)),
        ):
            row = {"batch": batch, "what": what, "seconds": seconds, "bound_seconds": least.get(what)}
            result["rows"].append(row)
            write(args.json, result)
            share = f"  {100 * least[what] / seconds:.0f} % of the bound of {1e3 * least[what]:.3f} ms" if least else ""
            print(
                f"B={batch:<6} {what:<19} {1e3 * seconds:9.3f} ms  {1e6 * seconds / batch:.3f} µs a body{share}",
                flush=True,
            )
    return result


if __name__ == "__main__":
    main()

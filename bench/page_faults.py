"""A step of ``tiny`` with freed memory given back to the kernel and kept (``chatpose_jax.train.allocator``), in processes in turn.

Needs Linux with glibc. Whatever else runs on the machine is in the figures: run it on a quiet one.

    JAX_PLATFORMS=cpu python bench/page_faults.py [--batch 16] [--length 48] [--turns 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

PROGRAM = """
import json, resource, statistics, sys, time
from chatpose_jax.train.allocator import keep_freed_memory
mode, batch, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
assert mode == "given back" or keep_freed_memory()
import jax
from chatpose_jax.train.run_config import load_config
from chatpose_jax.models.chatpose import init_params, fake_batch
from chatpose_jax.train.step import init_state, make_step
config = load_config("tiny", [])
params = init_params(config.model, jax.random.key(0))
state, frozen = init_state(config.train, params)
step, rows = make_step(config.model, config.train, params), fake_batch(config.model, batch, length)
seconds = []
for number in range(60):
    if number == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    state, metrics = step(state, frozen, rows)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - start)
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 40
print(json.dumps({"seconds": statistics.median(seconds[20:]), "faults": faults}))
"""


def measure(mode: str, batch: int, length: int) -> dict[str, float]:
    """Median seconds and page faults of a step."""
    command = [sys.executable, "-c", PROGRAM, mode, str(batch), str(length)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    print("| given back: ms, page faults | kept: ms, page faults | given back / kept time |")
    print("|---|---|---|")
    for _ in range(args.turns):
        back, kept = (measure(mode, args.batch, args.length) for mode in ("given back", "kept"))
        cells = (f"{1000 * one['seconds']:.0f}, {one['faults']}" for one in (back, kept))
        print(f"| {' | '.join(cells)} | **{back['seconds'] / kept['seconds']:.2f}** |", flush=True)


if __name__ == "__main__":
    main()

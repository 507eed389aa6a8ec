"""What a bucket costs a run: a checkpoint beside one on a local disk of equal bandwidth, and a step.

    python bench/bucket.py [--bucket gs] [--mib 128] [--rounds 3] [--steps 160] [--json bucket.json]

``--bucket`` is gs or s3 for an emulator on this machine (the packages that the tests use), or the address of a folder on a
bucket of yours. The same state is saved by turns on a disk and on the bucket; ``wait`` is part of the time. A disk of equal
bandwidth would take: the checkpoint on the disk, without the time in which this disk writes and syncs the same files, but
with the time in which the bucket takes them.

A step is one of a small model whose runs save to either place, by turns. Steps between two saves are apart from those beside
a save that is under way in the background. Here each answer of an emulator waits for 20 ms or more, as those of a store in
another building do, and the emulator has a processor of its own if there are two. So this measures waiting, not the
emulator's work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from chatpose_jax.models.chatpose import fake_batch, init_params
from chatpose_jax.models.config import preset
from chatpose_jax.storage import Location, kvstore, location, remove_tree, tree
from chatpose_jax.train.checkpoints import Checkpoints
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.step import TrainState
from chatpose_jax.train.trainer import train

ROOT = Path(__file__).resolve().parent.parent
ARRAYS = 16
GOAL = 1.3
STEP_GOAL = 1.03
"""A step on a bucket, over one on a disk: not more than two runs on one disk differ by."""
PAUSE = 0.01
"""Seconds before each part of an emulator's answer, which has two or three."""
ROWS = 16
WARM = 5
"""The first steps of a run are not counted."""


@contextmanager
def apart() -> Iterator[None]:
    """Processes that start in the block have the last processor for themselves, if there are several; this program has the others from now on."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(mine) < 2:
        yield
        return
    os.sched_setaffinity(0, mine[-1:])
    yield
    os.sched_setaffinity(0, mine[:-1])


@contextmanager
def place(bucket: str) -> Iterator[tuple[Location, Callable[[bool], None]]]:
    """A fresh folder on the bucket, and a function that makes each of an emulator's answers wait, or no longer."""
    name = f"bench-{os.getpid()}"
    if "://" in bucket:
        yield location(bucket) / name, lambda _: None
        remove_tree(location(bucket) / name)
        return
    sys.path.insert(0, str(ROOT))
    from tests.emulators import BUCKET, running_store

    with ExitStack() as running:
        with apart():
            emulator = running.enter_context(running_store(bucket))
        os.environ.update(emulator.environment)
        yield location(f"{bucket}://{BUCKET}/{name}"), lambda slow: emulator.fail(int(slow), ("slow",), PAUSE)


def state(mib: int, step: int) -> TrainState:
    """Random numbers, which no compression makes smaller by much."""
    key = jax.random.key(step)
    arrays = {
        f"array{n}": jax.random.normal(jax.random.fold_in(key, n), (mib * 2**18 // ARRAYS,)) for n in range(ARRAYS)
    }
    return TrainState(jnp.int32(step), arrays, (), jnp.zeros((2,), jnp.int32))


def seconds(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def send(folder: Location, files: list[bytes]) -> None:
    """The files of a checkpoint at once, written by TensorStore, as Orbax does."""
    store = ts.KvStore.open(kvstore(folder)).result()
    for done in [store.write(str(number), data) for number, data in enumerate(files)]:
        done.result()


def checkpoints(disk: Path, bucket: Location, mib: int, rounds: int) -> dict[str, float]:
    """Median seconds of a checkpoint and of its bare files, on either; one round to warm up."""
    found: dict[str, list[float]] = {}
    size = 0
    with (
        closing(Checkpoints(disk / "saved", keep=1, identity={}, frozen={}, result=disk)) as local,
        closing(Checkpoints(bucket / "saved", keep=1, identity={}, frozen={}, result=bucket)) as remote,
    ):
        for step in range(rounds + 1):
            held = jax.block_until_ready(state(mib, step + 1))

            def save(to: Checkpoints, held: TrainState = held) -> None:
                to.save(held, {})
                to.wait()

            times = {"disk": seconds(lambda: save(local)), "bucket": seconds(lambda: save(remote))}
            folder = disk / "saved" / str(step + 1)
            files = [(folder / name).read_bytes() for name in tree(folder)]
            size = sum(map(len, files))
            times["bare disk"] = seconds(lambda files=files: send(disk / "bare", files))  # type: ignore[misc]
            times["bare bucket"] = seconds(lambda files=files: send(bucket / "bare", files))  # type: ignore[misc]
            if step:
                for name, value in times.items():
                    found.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    equal = medians["disk"] - medians["bare disk"] + medians["bare bucket"]
    return {**medians, "mib": size / 2**20, "equal disk": equal, "ratio": medians["bucket"] / equal}


class Batches:
    """Two batches by turns."""

    def __init__(self, model: Any):
        self.held = [fake_batch(model, batch=ROWS, length=64, seed=seed) for seed in range(2)]

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.held

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def steps(out: Location, count: int) -> dict[str, list[float]]:
    """Seconds of the steps of a run: of those between two saves, of those beside one, and of those that begin one."""
    model, every = preset("tiny"), count // 2
    settings = TrainConfig(
        steps=count, batch_size=ROWS, accumulate=1, save_every=every, log_every=count, eval_every=0, remat="none"
    )
    at: list[float] = []
    params = init_params(model, jax.random.key(0))
    train(
        model, settings, params, Batches(model), out, progress=False, say=lambda _: None,
        callback=lambda step, values: at.append(time.perf_counter()),
    )  # fmt: skip
    seconds = np.diff(at)  # at index n - 1 from step n, which is logged before it is saved, to the next one
    return {
        "between": [*seconds[WARM : every - 1], *seconds[every + every // 2 :]],
        "beside": [*seconds[every : every + every // 2]],
        "begin": [seconds[every - 1]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", default="gs", help="gs, s3, or the address of a folder")
    parser.add_argument("--mib", type=int, default=128, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160, help="of each of six runs; 0: checkpoints only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with place(arguments.bucket) as (bucket, slow), tempfile.TemporaryDirectory() as folder:
        disk = Path(folder)
        jax.config.update("jax_compilation_cache_dir", str(disk / "compiled"))
        found = checkpoints(disk, bucket, arguments.mib, arguments.rounds)
        places = {"disk": disk, "bucket": bucket}
        runs: dict[str, dict[str, list[float]]] = {name: {} for name in places}
        slow(True)
        for turn in range(3 if arguments.steps else 0):
            for name, where in places.items():
                for kind, values in steps(where / f"run{turn}", arguments.steps).items():
                    runs[name].setdefault(kind, []).extend(values)
        slow(False)
    print(f"{found['mib']:.0f} MiB           checkpoint   its bare files")
    for name in places:
        print(f"{name:16s}  {found[name]:9.2f} s {found[f'bare {name}']:14.2f} s")
    print(f"disk of equal bandwidth: {found['equal disk']:.2f} s; ratio {found['ratio']:.2f} (goal: at most {GOAL})")
    good = found["ratio"] <= GOAL
    if arguments.steps:
        print("a step, ms: median (quarters)        between saves              beside one   that begins one")
        for name, times in runs.items():
            found |= {f"step {kind}, {name}": statistics.median(values) for kind, values in times.items()}
            quarters = [
                "{1:.1f} ({0:.1f} to {2:.1f})".format(*np.percentile(times[kind], (25, 50, 75)) * 1000)
                for kind in ("between", "beside")
            ]
            print(f"{name:24s}{quarters[0]:>26s}{quarters[1]:>24s}{found[f'step begin, {name}'] * 1000:18.1f}")
        found["step ratio"] = found["step between, bucket"] / found["step between, disk"]
        good = good and found["step ratio"] <= STEP_GOAL
        print(f"ratio of the steps between saves: {found['step ratio']:.3f} (goal: at most {STEP_GOAL})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bucket": arguments.bucket, **found}, indent=1) + "\n")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

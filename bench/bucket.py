"""What a bucket costs a run: a checkpoint beside one on a local disk of equal bandwidth, and a step between two checkpoints.

    python bench/bucket.py [--bucket gs] [--mib 256] [--rounds 3] [--json bucket.json]

``--bucket`` is gs or s3 for an emulator on this machine (the packages that the tests use), or the address of a folder on a
bucket of yours. The same state is saved by turns on a disk and on the bucket; ``wait`` is part of the time. A disk of equal
bandwidth would take: the checkpoint on the disk, without the time in which this disk writes and syncs the same files, but
with the time in which the bucket takes them. A step is one of a small model, whose log goes to either place.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
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


@contextmanager
def place(bucket: str) -> Iterator[Location]:
    """A fresh folder on the bucket."""
    name = f"bench-{os.getpid()}"
    if "://" in bucket:
        yield location(bucket) / name
        remove_tree(location(bucket) / name)
        return
    sys.path.insert(0, str(ROOT))
    from tests.emulators import BUCKET, running_store

    with running_store(bucket) as emulator:
        os.environ.update(emulator.environment)
        yield location(f"{bucket}://{BUCKET}/{name}")


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
        self.held = [fake_batch(model, batch=4, length=64, seed=seed) for seed in range(2)]

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.held

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def steps(out: Location, count: int) -> list[float]:
    """Seconds from step to step of a run, without those beside a save."""
    model = preset("tiny")
    every = count // 3
    settings = TrainConfig(
        steps=count, batch_size=4, accumulate=1, save_every=every, log_every=count, eval_every=0, remat="none"
    )
    at: list[float] = []
    params = init_params(model, jax.random.key(0))
    train(
        model, settings, params, Batches(model), out, progress=False, say=lambda _: None,
        callback=lambda step, values: at.append(time.perf_counter()),
    )  # fmt: skip
    return [
        b - a
        for step, (a, b) in enumerate(itertools.pairwise(at), 2)
        if step > 5 and step % every > 3 and step < count - 3
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", default="gs", help="gs, s3, or the address of a folder")
    parser.add_argument("--mib", type=int, default=256, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with place(arguments.bucket) as bucket, tempfile.TemporaryDirectory() as folder:
        disk = Path(folder)
        found = checkpoints(disk, bucket, arguments.mib, arguments.rounds)
        runs = {"disk": list[float](), "bucket": list[float]()}
        for turn in range(2 if arguments.steps else 0):
            runs["disk"] += steps(disk / f"run{turn}", arguments.steps)
            runs["bucket"] += steps(bucket / f"run{turn}", arguments.steps)
    print(f"{found['mib']:.0f} MiB           checkpoint   its bare files")
    for name in ("disk", "bucket"):
        print(f"{name:16s}  {found[name]:9.2f} s {found[f'bare {name}']:14.2f} s")
    print(f"disk of equal bandwidth: {found['equal disk']:.2f} s; ratio {found['ratio']:.2f} (goal: at most {GOAL})")
    if arguments.steps:
        found |= {f"step on {name}": float(np.median(values)) for name, values in runs.items()}
        print(
            f"a step: {found['step on disk'] * 1000:.1f} ms on the disk, {found['step on bucket'] * 1000:.1f} ms on the bucket"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"bucket": arguments.bucket, **found}, indent=1) + "\n")
    return int(found["ratio"] > GOAL)


if __name__ == "__main__":
    sys.exit(main())

"""How fast rows of a prepared folder are read from an object store, beside the same folder on a disk.

    python bench/prepared_store.py [--records N] [--delay SECONDS]

Emulators (``tests/emulators.py``) stand in for the stores. They are slow Python programs on the processors of the reader, so ``--delay``, which each
request waits before it is sent, and the numbers of requests and bytes say more about a real store than the rows per second.
Rows are read as training reads them: batches of 32 from all over the data set. "kept": the split is small enough that what was read stays in memory
(``data.shards.KEEP``), here in the first epoch, and in the second. "ranges": a larger split, of which only the wanted records are read.
"one by one": the same, each row alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatpose_jax import storage
from chatpose_jax.data import shards
from chatpose_jax.data.config import Split
from chatpose_jax.data.example import Example, rows_at
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.prepared import Prepared
from chatpose_jax.data.reader import About
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax.pose import Pose
from tests.emulators import BUCKET, running_store

BATCH, SHARDS = 32, 16


class Made:
    """Records with a pose: of two sentences, or with a JPEG of 256 × 256 as well."""

    about: ClassVar[About] = About("made", "CC0", "", ("nothing",))

    def __init__(self, source: Path, *, records: int = 1000, images: bool = False) -> None:
        self.records, self.images = records, images

    def parts(self, split: Split) -> Sequence[range]:
        step = -(-self.records // SHARDS)
        return (
            [range(start, min(start + step, self.records)) for start in range(0, self.records, step)]
            if split == "train"
            else []
        )

    def read(self, split: Split, part: range) -> Iterator[Record]:
        for number in part:
            random = seeded(0, number)
            question: Any = f"{random.integers(1 << 62)}: both arms are raised. Which pose is it?"
            pictures: tuple[bytes, ...] = ()
            if self.images:
                file = io.BytesIO()
                coarse = random.uniform(0, 255, (64, 64, 3)).astype(np.uint8)
                Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
                pictures, question = (file.getvalue(),), [{"type": "image"}, {"type": "text", "text": question}]
            talk = ({"role": "user", "content": question}, {"role": "assistant", "content": "It is <POSE>."})
            pose = Pose(np.tile(np.eye(3, dtype=np.float32), (1, 24, 1, 1)), "camera")
            yield Record(str(number), "image" if self.images else "text", (talk,), pictures, pose)


class Counted:
    """Ranges that are read from stores, and their bytes. delay: seconds that each waits; ``storage`` reads 32 at the same time."""

    def __init__(self, delay: float) -> None:
        self.delay, self.requests, self.bytes = delay, 0, 0
        self.read = storage.read_ranges

    def __call__(self, ranges: Sequence[tuple[storage.Location, int, int]]) -> list[bytes]:
        time.sleep(self.delay * -(-len(ranges) // 32))
        found = self.read(ranges)
        self.requests += len(ranges)
        self.bytes += sum(map(len, found))
        return found


def epoch(rows: Sequence[Example], seed: int, alone: bool = False, most: float = 60.0) -> tuple[int, float]:
    """Reads batches in a random order for one epoch, at most so many seconds: rows, and seconds."""
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    start, count = time.perf_counter(), 0
    for first in range(0, len(rows), BATCH):
        numbers = order[first : first + BATCH]
        found = [rows[number] for number in numbers] if alone else rows_at(rows, numbers)
        count += len(found)
        if time.perf_counter() - start > most:
            break
    return count, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=4000, help="of each data set")
    parser.add_argument("--delay", type=float, default=0.0, metavar="SECONDS", help="that each request waits")
    args = parser.parse_args()
    processor, counted = tiny_processor(preset("tiny")), Counted(args.delay)
    storage.read_ranges = counted
    print("| data set | where | | rows/s | requests | MB |\n|---|---|---|---|---|---|")
    with contextlib.ExitStack() as held:
        work = Path(held.enter_context(tempfile.TemporaryDirectory()))
        for scheme in ("gs", "s3"):
            os.environ |= held.enter_context(running_store(scheme)).environment
        for images in (False, True):
            name = "image" if images else "text"
            places = [work / name, *(storage.location(f"{scheme}://{BUCKET}/{name}") for scheme in ("gs", "s3"))]
            for place in places:
                prepare(
                    "prepared_store:Made",
                    work,
                    place,
                    processor=processor,
                    options={"records": args.records, "images": images},
                )
                where = str(place).partition("://")[0] if storage.is_bucket(place) else "disk"
                ways = ["kept", "kept, again", "ranges", "one by one"] if storage.is_bucket(place) else ["again"]
                rows: Any = Prepared(place, "train")
                if where == "disk":
                    epoch(rows, 0)
                for way in ways:
                    shards.KEEP = 1 << 30 if "kept" in way else 0
                    if way in ("kept", "ranges"):
                        rows = Prepared(place, "train")
                    counted.requests = counted.bytes = 0
                    count, took = epoch(rows, len(way), alone=way == "one by one")
                    figures = (
                        f"{counted.requests / count * len(rows):.0f} | {counted.bytes / 1e6 / count * len(rows):.1f}"
                    )
                    print(f"| {name} | {where} | {way} | {count / took:,.0f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

"""How many rows a second a core prepares: JPEG photographs decoded, cropped to 336 pixels, tokenised and batched.

    python bench/data.py

Photographs are drawn once, written as JPEG files and read back through the loader that training uses: one thread, more
threads, and Grain's processes. The last column is what the rate is worth: rows a second that a chip takes at a step
time; data is prepared on the host's cores while the chip computes.

Then the start: what a loader reads and keeps before its first batch, beside encoding every row, as it did before.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.example import Example
from chatpose_jax.models.config import preset
from chatpose_jax.processing.images import ImageSettings
from chatpose_jax.processing.processor import Processor, tiny_processor
from smpl_jax.pose import unmeasured

CAPTION = "Someone stands with both arms raised and looks to the left. Can you give the SMPL pose of this person?"


class Photographs(Sequence[Example]):
    """Rows of one JPEG file and one pose, as a data set of photographs has them."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        parts = [{"type": "image", "image": self.files[index]}, {"type": "text", "text": CAPTION}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Sure, it is <POSE>."}]
        return Example(f"photograph-{index}", "image", messages, unmeasured((1,)))


def write(folder: Path, count: int, width: int, height: int) -> list[str]:
    """JPEG files with as much detail as photographs: noise at several scales."""
    random = np.random.default_rng(0)
    files = []
    for index in range(count):
        image = np.zeros((height, width, 3), np.float32)
        for size in (8, 32, 128):
            coarse = random.uniform(0, 255, (size * height // width, size, 3)).astype(np.uint8)
            image += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 3
        path = folder / f"{index}.jpg"
        Image.fromarray(image.astype(np.uint8)).save(path, quality=90)
        files.append(str(path))
    return files


def rate(loader: BatchLoader, batches: int, batch_size: int) -> tuple[float, float]:
    """(rows a second, seconds of processor time a row) of batches after the first epoch, and two at least."""
    stream = iter(loader)
    for _ in range(max(2, len(loader))):
        next(stream)
    start, used = time.perf_counter(), _used()
    for _ in itertools.islice(stream, batches):
        pass
    rows = batches * batch_size
    return rows / (time.perf_counter() - start), (_used() - used) / rows


def start(data: Sequence[Example], size: int, batch: int) -> None:
    """Time and memory of a loader before its first batch, and of encoding every row."""

    def taken(make: Callable[[], object]) -> tuple[float, float]:
        began = time.perf_counter()
        make()
        seconds = time.perf_counter() - began
        tracemalloc.start()  # which slows Python down, so in a turn of its own
        kept = make()
        memory, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del kept
        return seconds, memory / 2**20

    processor = processor_at(size)
    encode_example(processor, data[0], 1024)  # what is loaded once
    ways = {
        "a loader": lambda: BatchLoader(data, processor, batch, buckets=1, cache=1 << 30),
        "every row encoded": lambda: [encode_example(processor, row, 1024, normalise=False) for row in data],
    }
    print(f"before the first batch, {len(data)} rows   seconds   MiB kept")
    found = {name: taken(make) for name, make in ways.items()}
    for name, (seconds, memory) in found.items():
        print(f"{name:38s} {seconds:10.2f} {memory:10.1f}")
    (one, less), (other, more) = found.values()
    print(f"{'ratio':38s} {other / one:10.1f} {more / less:10.1f}")


def _used() -> float:
    return sum(os.times()[:4])


def processor_at(size: int) -> Processor:
    """The tiny tokenizer with LLaVA's image size and patches."""
    config = preset("tiny")
    made = tiny_processor(config)
    made.images = ImageSettings(size=size)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=64)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--size", type=int, default=336, help="side of the images that the model sees")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--rows", type=int, default=500, help="of the set whose start is measured")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), arguments.photographs, arguments.width, arguments.height)
        size = sum(os.path.getsize(file) for file in files) / len(files) / 1024
        print(f"{len(files)} JPEG files of {arguments.width} × {arguments.height}, {size:.0f} KiB each; {cores} cores")
        print("reader                   rows/s   rows/s of a core   ms a row   feeds, at 1 s a step of 16 rows, chips")
        ways = [
            ("one thread", {}),
            ("one thread, rows kept", {"cache": 1 << 30}),
            (f"{cores} threads", {"threads": cores}),
            (f"{cores} processes", {"workers": cores}),
        ]
        for name, options in ways:
            data = Photographs(files)
            loader = BatchLoader(data, processor_at(arguments.size), arguments.batch, prefetch=4, buckets=1, **options)
            rows, seconds = rate(loader, arguments.batches, arguments.batch)
            # What processes use is not this one's before they end: there the rate over all cores says it.
            core = rows / cores if "workers" in options else 1 / seconds
            print(f"{name:22s} {rows:8.1f} {core:18.1f} {1000 / core:10.1f} {rows / 16:20.1f}", flush=True)
        start(Photographs((files * arguments.rows)[: arguments.rows]), arguments.size, arguments.batch)


if __name__ == "__main__":
    main()

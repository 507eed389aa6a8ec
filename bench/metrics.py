"""Time to score 35 000 answers, the size of 3DPW's test split: all columns of protocol C with their intervals, and reading of both files.

    python bench/metrics.py [--count 35000]

Rows lie in a prepared folder with a small JPEG each, as ``chatpose data prepare`` writes it; answers in a file of JSON lines, as ``chatpose eval``
keeps them. Nothing is asked: the answers are the true poses with noise.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from chatpose_jax.data.config import Split
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.prepared import Prepared
from chatpose_jax.data.reader import About
from chatpose_jax.data.readers.crop import to_matrices
from chatpose_jax.data.readers.threedpw import measured
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.evaluation.scores import means_of
from chatpose_jax.evaluation.system import Answer
from chatpose_jax.evaluation.tasks.estimation import Estimation
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax.pose import Pose

SEQUENCES = 24
TALK = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which pose is this?"}]},
    {"role": "assistant", "content": "Sure, it is <POSE>."},
)


class Made:
    """A reader of poses and images that are made up."""

    about: ClassVar[About] = About("made poses", "free", "bench/metrics.py", ("nothing",))

    def __init__(self, source: Path, *, count: int) -> None:
        self.count = count
        noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((256, 256)).save(file, "JPEG")
        self.image = file.getvalue()

    def parts(self, split: Split) -> Sequence[int]:
        return range(SEQUENCES) if split == "test" else ()

    def read(self, split: Split, part: int) -> Iterator[Record]:
        for i in range(part, self.count, SEQUENCES):
            key = f"sequence{part:02d}/image_{i:05d}.jpg"
            angles = seeded(0, key).normal(0, 0.4, (1, 24, 3))
            pose = Pose(to_matrices(angles), "camera", measured=measured(1))
            yield Record(key, "image", (TALK,), (self.image,), pose, f"sequence{part:02d}")


def clock() -> tuple[float, float]:
    """Seconds of the wall and of this process on its processors."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=35_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        prepare(
            "metrics:Made",
            folder,
            Path(folder, "data"),
            processor=tiny_processor(preset("tiny")),
            options={"count": count},
        )
        rows = Prepared(Path(folder, "data"), "test")
        rng = np.random.default_rng(1)
        with Path(folder, "answers.jsonl").open("w") as file:
            for row in rows:
                turned = row.poses.rotations[0] @ to_matrices(rng.normal(0, 0.2, (24, 3)))
                file.write(json.dumps(Answer("Sure, it is <POSE>.", Pose(turned, "camera")).to_json()) + "\n")
        task = Estimation(rows, "made")
        task.score([Answer("", rows[i].poses[0]) for i in range(4)] + [Answer()] * (count - 4))  # compiles

        times = [clock()]
        with Path(folder, "answers.jsonl").open() as file:
            answers = Answer.from_jsons([json.loads(line) for line in file])
        times.append(clock())
        (scores,) = task.score(answers)
        times.append(clock())
        means_of(scores.samples, [""] * count, {name: {} for name in scores.samples})
        times.append(clock())
    read, scored, resampled = np.diff(times, axis=0)
    print(f"{os.cpu_count()} cores, {count:,} samples, protocol C: {', '.join(scores.values)}")
    for words, (wall, cpu) in {
        "answers read": read,
        "rows read, scored, with intervals": scored,
        "together": read + scored,
        f"intervals of all columns over {count:,} groups instead of {SEQUENCES}": resampled,
    }.items():
        print(f"  {words:60} {wall:6.2f} s, {cpu:6.2f} s of processors")
    for name, value in scores.values.items():
        print(f"  {name:12} {value.value:8.3f} [{value.low:.3f}, {value.high:.3f}] {value.unit}")


if __name__ == "__main__":
    main()

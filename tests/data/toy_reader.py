"""A reader whose records are made up, and its files, for the tests of ``chatpose data``.

The environment variable TOY_PAUSE slows it down (seconds a record).
"""

from __future__ import annotations

import dataclasses
import io
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.errors import UserError
from smpl_jax.pose import Pose

TOY = "toy_reader:Toy"
"""Its name, where this folder is on the path of modules."""
WORDS = ["raise the left arm", "picture of a kneeling person", "empty", "bend both knees", "broken", "turn around"]


def write_words(folder: Path, times: int) -> Path:
    """Writes ``words.txt``, of so many times ``WORDS``. Returns the folder."""
    (folder / "words.txt").write_text("\n".join(WORDS * times) + "\n")
    return folder


class Toy:
    """Reads ``words.txt``, one row a line; a line "broken" is a damaged item, "empty" one without a pose."""

    about: ClassVar[About] = About(
        "Toy poses", "CC0, free for all uses", "https://example.org/toy", ("words.txt: a line a row",)
    )

    def __init__(self, source: Path, *, size: int = 8, variants: int = 2, seed: int = 0, fail: str = "") -> None:
        self.file, self.size, self.variants, self.seed, self.fail = source / "words.txt", size, variants, seed, fail
        if not self.file.is_file():
            raise missing(self.about, self.file)

    def parts(self, split: Split) -> Sequence[range]:
        lines = len(self.file.read_text().splitlines())
        ends = {"train": range(lines - 4), "val": range(lines - 4, lines), "test": range(0)}[split]
        return [ends[start : start + self.size] for start in range(0, len(ends), self.size)]

    def read(self, split: Split, part: range) -> Iterator[Record | Skipped]:
        lines = self.file.read_text().splitlines()
        for number in part:
            time.sleep(float(os.environ.get("TOY_PAUSE", 0)))
            word, key = lines[number], f"line {number}"
            if word == "half":  # of a character: JSON can hold it, and UTF-8 cannot
                yield Skipped("\ud800", "half", broken=True, detail="\ud800" * 5000)
                yield dataclasses.replace(self._record(key, word), group="\ud800")
            elif word == "broken":
                yield Skipped(key, "no such word", broken=True, detail=f"the line is {word!r}, as {object()} said")
            elif word == "empty":
                yield Skipped(key, "no pose")
            elif word == "fail":
                raise UserError(f"{self.file}: cannot be read") if self.fail == "user" else KeyError("x")
            else:
                yield self._record(key, word)

    def _record(self, key: str, word: str) -> Record:
        random = seeded(self.seed, key)
        poses = Pose(turns(random.normal(0, 0.3, (1, 24))), "camera")
        if word == "twisted":
            poses = poses.replace(rotations=poses.rotations * 2)
        if word == "moved":  # in a frame in which batches could not have it
            poses = poses.replace(frame="z-up", translation=np.ones((1, 3), np.float32))
        picture = word.startswith("picture")
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (40, 30, 3), np.uint8)).save(buffer, "JPEG")
        talks = []
        for variant in range(self.variants):
            question = f"{word}, said {'again and ' * variant}once. Which pose?"
            parts = [{"type": "image"}, {"type": "text", "text": question}] if picture else question
            talks.append(({"role": "user", "content": parts}, {"role": "assistant", "content": "It is <POSE>."}))
        return Record(
            key,
            "image" if picture else "text",
            tuple(talks),
            (buffer.getvalue(),) if picture else (),
            poses,
            word,
            {"number": random.integers(9), "joints": random.normal(size=(3, 3))},
        )


def turns(angles: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) about x by angles (...) in radians."""
    matrices = np.zeros((*angles.shape, 3, 3), np.float32)
    matrices[..., 0, 0] = 1
    matrices[..., 1, 1] = matrices[..., 2, 2] = np.cos(angles)
    matrices[..., 2, 1] = np.sin(angles)
    matrices[..., 1, 2] = -matrices[..., 2, 1]
    return matrices

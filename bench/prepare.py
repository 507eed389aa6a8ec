"""How fast ``chatpose data prepare`` is beside reading the same files and doing nothing with the records ("decoding alone").

    python bench/prepare.py [--clips FOLDER]

Images: tars in the layout of 4D-Humans, with drawn photographs in JPEG: each is decoded, cropped and encoded again. Instructions: the layout of
LLaVA's mix665k; each photograph is decoded to see that it is whole, and its file is stored as it is. Poses in words: motion capture, if a folder
of clips is given. One process does all; seconds are processor time, the least of several turns in which both take part.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from chatpose_jax.data.config import Split
from chatpose_jax.data.prepare import make_reader, prepare
from chatpose_jax.data.record import Record
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

WORDS = "the left arm is raised and both knees are slightly bent while the person looks to the right"


def photograph(seed: int) -> bytes:
    """A JPEG file of 640 × 480 with as much detail as photographs have."""
    random = np.random.default_rng(seed)
    picture = np.zeros((480, 640, 3), np.float32)
    for size in (8, 32, 128):
        coarse = random.uniform(0, 255, (size * 3 // 4, size, 3)).astype(np.uint8)
        picture += np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)) / 3
    file = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tars(folder: Path, count: int) -> None:
    """``coco``: two tars with one person in each photograph."""
    for number in range(2):
        path = folder / "dataset_tars" / "coco-train-2014-pruned" / f"{number:06d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for index in range(number, count, 2):
                random = np.random.default_rng(index)
                points = np.concatenate([random.uniform(150, 350, (44, 2)), np.ones((44, 1))], 1)
                person = {
                    "keypoints_2d": points.astype(np.float32),
                    "keypoints_3d": random.normal(size=(44, 4)).astype(np.float32),
                    "center": np.array([320.0, 240.0]),
                    "scale": np.array([1.2, 1.8]),
                    "body_pose": (random.normal(size=72) * 0.2).astype(np.float32),
                    "betas": np.zeros(10, np.float32),
                    "has_body_pose": np.array(1.0),
                    "has_betas": np.array(1.0),
                    "extra_info": {"fitting_loss": np.array({"reprojection_loss": 100.0}, dtype=object)},
                }
                for suffix, data in (("jpg", photograph(index % 20)), ("data.pyd", pickle.dumps([person]))):
                    info = tarfile.TarInfo(f"coco/{index:012d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_llava(folder: Path, count: int) -> None:
    """``llava``: conversations of four turns about a photograph."""
    images = folder / "coco" / "train2017"
    images.mkdir(parents=True)
    rows = []
    for index in range(count):
        (images / f"{index:012d}.jpg").write_bytes(photograph(index % 20))
        turns = [{"from": "human", "value": f"<image>\nWhat is in picture {index}?"}, {"from": "gpt", "value": WORDS}]
        for turn in range(3):
            turns += [
                {"from": "human", "value": f"And {turn}: {WORDS}?"},
                {"from": "gpt", "value": f"{WORDS}. {WORDS}."},
            ]
        name = f"coco/train2017/{index:012d}.jpg"
        rows.append({"id": f"{index:012d}", "image": name, "conversations": turns})
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))


def least(turns: int, *functions: Callable[[], Any]) -> list[float]:
    """The least processor time of each function, in seconds."""
    found: list[list[float]] = [[] for _ in functions]
    for _ in range(turns):
        for function, times in zip(functions, found):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
    return [min(times) for times in found]


def compare(name: str, source: Path, out: Path, turns: int, options: dict[str, Any]) -> str:
    """A row of the table for one data set."""
    processor = tiny_processor(preset("tiny"))
    count = 0

    def decode() -> None:
        nonlocal count
        reader = make_reader(name, source, options)
        count = sum(
            isinstance(item, Record)
            for split in get_args(Split)
            for part in reader.parts(split)
            for item in reader.read(split, part)
        )

    def write() -> None:
        shutil.rmtree(out, ignore_errors=True)
        prepare(name, source, out, processor=processor, options=options)

    alone, whole = least(turns, decode, write)
    extra = 1e3 * (whole - alone) / count
    return f"| `{name}` | {count} | {count / alone:.0f} | {count / whole:.0f} | {100 * alone / whole:.0f} % | {extra:.2f} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="records of each data set")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--clips", type=Path, help="folder of motion capture, for cmu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tars(root / "tars", args.rows)
        write_llava(root / "llava", args.rows)
        print(
            "| data set | records | decoding alone, records/s | prepare, records/s | | ms a record more |\n|---|---|---|---|---|---|"
        )
        print(compare("coco", root / "tars", root / "out", args.turns, {"plausible": False}), flush=True)
        if args.clips:
            print(compare("cmu", args.clips, root / "out", args.turns, {}), flush=True)
        print(compare("llava", root / "llava", root / "out", args.turns, {}), flush=True)


if __name__ == "__main__":
    main()

"""Rows from prepared shards: how many a second a core gives, where the time goes, and how a run over many rows starts.

    python bench/shards.py                  # the last part takes about a minute
    python bench/shards.py --only start     # or rates

Rates: three data sets are made up and prepared by ``chatpose data prepare``: poses in words, people in photographs (tars in the form of
4D-Humans), and photographs with four questions and answers (tars of a photograph and its conversation). They are read through the loader
that training uses, on one core: decoded, resized to 336 pixels, normalised, tokenised, collated. Beside it ``webdataset`` reads the tars
from which the shards were made, and does the same work by the same functions. It is no dependency: ``pip install webdataset`` for this
column, which is else left out. Times are of the processor, so other work on the machine changes them little.

Start: for an index of 10 thousand rows to a million, the time from opening it to the first batch, and the memory then held, each in a process
of its own.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from data import write as photographs
from PIL import Image

from chatpose_jax import storage
from chatpose_jax.data import batches, collate, prepared, record, store
from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import Split
from chatpose_jax.data.example import Example
from chatpose_jax.data.mixture import Mixture
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.prepared import Prepared
from chatpose_jax.data.reader import About
from chatpose_jax.data.readers.crop import to_matrices
from chatpose_jax.data.readers.humans4d import Coco, ask_for_pose
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.models.config import preset
from chatpose_jax.processing import images
from chatpose_jax.processing.processor import ModelIds, Processor, tiny_tokenizer
from smpl_jax.pose import Pose

WORDS = (
    "a person",
    "stands",
    "with both",
    "arms",
    "raised",
    "above",
    "the left",
    "knee",
    "bent",
    "looks down",
    "and forward",
)
BATCH = 16


def llava_processor() -> Processor:
    """The tiny tokenizer with LLaVA's image size, patches and context."""
    ids = dataclasses.replace(ModelIds.of(preset("tiny")), image_size=336, num_patches=576, context=4096)
    return Processor(tiny_tokenizer(), ids, "vicuna_v1")


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words)) + "."


@dataclasses.dataclass
class Words:
    """Rows of text and a pose, 40 to 120 words each."""

    source: Path
    about: ClassVar[About] = About("Made-up captions", "none", "", ("rows: their number",))

    def parts(self, split: Split) -> Sequence[range]:
        rows = int((self.source / "rows").read_text()) if split == "train" else 0
        return [range(rows)[start : start + 1000] for start in range(0, rows, 1000)]

    def read(self, split: Split, part: range) -> Iterator[Record]:
        return map(self.row, part)

    def row(self, number: int) -> Record:
        rng = seeded(0, number)
        pose = rng.normal(size=(1, 24, 3)).astype(np.float32) * 0.3
        talk = (
            {"role": "user", "content": sentence(rng, int(rng.integers(40, 121)))},
            {"role": "assistant", "content": "It is <POSE>."},
        )
        return Record(f"{number}", "text", (talk,), poses=Pose(to_matrices(pose), "camera"))


@dataclasses.dataclass
class Talks:
    """Rows of an image and four turns about it, from a tar of ``.jpg`` and ``.json``. max_side: as of the data set "llava"."""

    source: Path
    _: dataclasses.KW_ONLY
    max_side: int = 0
    about: ClassVar[About] = About("Made-up conversations", "none", "", ("talks.tar",))

    def parts(self, split: Split) -> Sequence[str]:
        return ("talks.tar",) if split == "train" else ()

    def read(self, split: Split, part: str) -> Iterator[Record]:
        with tarfile.open(self.source / part) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in files:
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                image = files[f"{key}.jpg"]
                if self.max_side:
                    smaller, file = Image.open(io.BytesIO(image)), io.BytesIO()
                    smaller.thumbnail((self.max_side, self.max_side), Image.Resampling.BICUBIC)
                    smaller.save(file, "JPEG", quality=95)
                    image = file.getvalue()
                yield Record(key, "instruction", (json.loads(files[name]),), (image,))


# Data sets, as tars and as prepared folders.


def make_sets(folder: Path, rows: int, processor: Processor) -> dict[str, tuple[Path, Prepared]]:
    """kind, with options -> the tar, and the rows of the prepared folder."""
    jpegs = [Path(file).read_bytes() for file in photographs(folder, min(rows, 64), 640, 480)]
    rng = np.random.default_rng(0)

    (folder / "rows").write_text(str(rows))
    words = Words(folder)
    tars: dict[str, Path] = {"text": folder / "words.tar"}
    with tarfile.open(tars["text"], "w") as tar:
        for number in range(rows):
            row = words.row(number)
            pose = io.BytesIO()
            np.save(pose, row.poses.rotations)
            add(tar, f"{number:06d}.json", json.dumps(row.conversations[0]).encode())
            add(tar, f"{number:06d}.pose.npy", pose.getvalue())

    tars["image"] = folder / "dataset_tars" / Coco.folder / "000000.tar"
    tars["image"].parent.mkdir(parents=True)
    with tarfile.open(tars["image"], "w") as tar:
        for row in range(rows):
            add(tar, f"coco/{row:012d}.jpg", jpegs[row % len(jpegs)])
            add(tar, f"coco/{row:012d}.data.pyd", pickle.dumps([person(rng)]))

    tars["instruction"] = folder / "talks.tar"
    with tarfile.open(tars["instruction"], "w") as tar:
        for row in range(rows):
            talk: list[dict[str, Any]] = []
            for _ in range(4):
                talk += [
                    {"role": "user", "content": sentence(rng, 12)},
                    {"role": "assistant", "content": sentence(rng, 40)},
                ]
            talk[0]["content"] = [{"type": "image"}, {"type": "text", "text": talk[0]["content"]}]
            add(tar, f"{row:06d}.jpg", jpegs[row % len(jpegs)])
            add(tar, f"{row:06d}.json", json.dumps(talk).encode())

    made = {}
    for title, name, options in (
        ("text", f"{__name__}:Words", {}),
        ("image", "coco", {"plausible": False}),
        ("instruction", f"{__name__}:Talks", {}),
        ("instruction, max_side=448", f"{__name__}:Talks", {"max_side": 448}),
    ):
        prepare(name, folder, folder / title, processor=processor, options=options)
        made[title] = tars[title.partition(",")[0]], Prepared(folder / title, "train")
    return made


def person(rng: np.random.Generator) -> dict[str, Any]:
    """An entry of 4D-Humans' annotations: a person of 300 pixels in a photograph."""
    points = np.column_stack([rng.uniform(170, 470, 44), rng.uniform(90, 390, 44), rng.uniform(0.5, 1, 44)])
    return {
        "keypoints_2d": points.astype(np.float32),
        "keypoints_3d": np.column_stack([rng.normal(size=(44, 3)), np.ones(44)]).astype(np.float32),
        "center": np.array([320.0, 240.0]),
        "scale": np.array([1.0, 1.5]),
        "body_pose": (rng.normal(size=72) * 0.2).astype(np.float32),
        "betas": rng.normal(size=10).astype(np.float32) * 0.5,
        "has_body_pose": np.array(1.0),
        "has_betas": np.array(1.0),
    }


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# The same work by webdataset.


def by_webdataset(kind: str, tar: Path, processor: Processor) -> Iterator[Example]:
    import webdataset

    rng = np.random.default_rng(0)
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
        key = sample["__key__"]
        if kind == "text":
            pose = Pose(np.load(io.BytesIO(sample["pose.npy"])), "camera")
            yield Example(key, "text", json.loads(sample["json"]), pose)
        elif kind == "instruction":
            talk = json.loads(sample["json"])
            talk[0]["content"][0]["image"] = sample["jpg"]
            yield Example(key, "instruction", talk)
        else:
            image = images.load_image(sample["jpg"])
            for entry in pickle.loads(sample["data.pyd"]):  # made by this program
                side = float(np.max(entry["scale"]) * 200)
                left, top = entry["center"] - side / 2
                scale = side / 256
                square = image.transform(
                    (256, 256), Image.Transform.AFFINE, (scale, 0, left, 0, scale, top), Image.Resampling.BILINEAR
                )
                pose = Pose(to_matrices(entry["body_pose"].reshape(1, 24, 3)), "camera")
                question, answer = ask_for_pose(rng)
                asked = [{"type": "image", "image": square}, question["content"][1]]
                yield Example(key, "image", [{"role": "user", "content": asked}, answer], pose)


def batched(rows: Iterator[Example], processor: Processor, shape: batches.BatchShape, poses: int) -> Iterator[Any]:
    """Batches as the loader makes them, in the order of the tar."""
    while some := [encode_example(processor, row, 1024) for row, _ in zip(rows, range(BATCH))]:
        yield collate.collate(some, shape.length, max_images=shape.images, max_poses=poses, pad_id=0, image_size=336)


# Where the time goes.


class Stages:
    """Processor seconds of each stage, without those of stages inside it."""

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self._inner: list[float] = []

    @contextlib.contextmanager
    def timed(self, places: Sequence[tuple[str, Any, str]]) -> Iterator[None]:
        """Context manager that times the functions (stage, owner, name) within the block."""
        before = [(owner, name, getattr(owner, name)) for _, owner, name in places]
        for (stage, owner, name), (_, _, function) in zip(places, before):
            setattr(owner, name, self._wrapped(stage, function))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _wrapped(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **options)
            finally:
                taken = time.process_time() - start
                self.seconds[stage] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return call


STAGES = (
    ("order", BatchLoader, "rows_of"),
    ("read", Prepared, "record"),
    ("unpack", prepared, "from_bytes"),
    ("unpack", record.Record, "example"),
    ("decode", images, "load_image"),
    ("resize", images.ImageSettings, "square"),
    ("normalise", images.ImageSettings, "normalise"),
    ("tokenise", Processor, "_layout"),
    *(("poses", collate, name) for name in ("check", "to_frame", "to_family", "to_betas", "complete")),
    ("collate", batches, "collate"),
)


def rates(folder: Path, rows: int, passes: int) -> None:
    processor = llava_processor()
    sets = make_sets(folder, rows, processor)
    try:
        import webdataset  # noqa: F401

        peer = True
    except ImportError:
        peer = False
    print(f"rows/s of a core, {rows} rows of each kind, batches of {BATCH}, 336 pixels, photographs of 640 × 480")
    print(f"{'':26s}{'shards':>10s}{'webdataset':>12s}{'ratio':>8s}")
    profiles = {}
    for title, (tar, data) in sets.items():
        kind = title.partition(",")[0]
        loader = BatchLoader(data, processor, BATCH, buckets=1, epochs=passes + 1)

        def ours(step: int, loader: BatchLoader = loader) -> None:
            for index in range(len(loader)):
                loader.batch(step * len(loader) + index)

        def theirs(step: int, kind: str = kind, tar: Path = tar, loader: BatchLoader = loader) -> None:
            for _ in batched(by_webdataset(kind, tar, processor), processor, loader.shapes[0], loader.max_poses):
                pass

        seconds: dict[str, list[float]] = {"shards": [], "webdataset": []}
        for number in range(passes + 1):  # by turns; the first opens files and fills caches
            for name, run in (("shards", ours), ("webdataset", theirs)):
                if name == "shards" or peer:
                    start = time.process_time()
                    run(number)
                    seconds[name].append(time.process_time() - start)
        found = {name: rows / np.median(some[1:]) for name, some in seconds.items() if some}
        other = found.get("webdataset")
        print(
            f"{title:26s}{found['shards']:10.1f}"
            + (f"{other:12.1f}{found['shards'] / other:8.2f}" if other else f"{'-':>12s}{'-':>8s}"),
            flush=True,
        )
        stages = Stages()
        with stages.timed(STAGES):
            start = time.process_time()
            ours(0)
            total = time.process_time() - start
        stages.seconds["rest"] = total - sum(stages.seconds.values())
        profiles[title] = stages.seconds
    names = [*dict.fromkeys(stage for stage, _, _ in STAGES), "rest"]
    print(f"\n{'ms a row':26s}{''.join(f'{name:>10s}' for name in names)}")
    for title, found in profiles.items():
        print(f"{title:26s}{''.join(f'{1000 * found[name] / rows:10.3f}' for name in names)}")


# The start of a run.


def make_index(folder: Path, rows: int, processor: Processor) -> None:
    """A prepared folder whose index has ``rows`` rows, of a thousand records."""
    folder.mkdir()
    (folder / "rows").write_text("1000")
    prepare(f"{__name__}:Words", folder, folder / "set", processor=processor)
    file = folder / "set" / "train" / store.INDEX
    index = np.load(file)
    np.save(file, np.resize(index, rows))
    about = store.read_description(folder / "set")
    about["splits"]["train"] |= {"rows": rows}
    about["splits"]["train"]["index"]["bytes"] = file.stat().st_size
    storage.write_bytes(folder / "set" / store.DESCRIPTION, store.to_json(about))


def start_one(folder: Path, way: str) -> None:
    """Prints seconds to the first batch, to the first of the next epoch, and KiB of memory, in this process."""
    processor = llava_processor()
    Prepared(folder / "set", "train")[0]  # what is loaded once
    before = memory()
    began, used = time.perf_counter(), time.process_time()
    data: Sequence[Example] = Prepared(folder / "set", "train")
    if way == "mixture":
        data = Mixture([data, Prepared(folder / "set", "train")], [1, 3])
    loader = BatchLoader(data, processor, BATCH, packing=way == "packed")
    loader.batch(0)
    first, taken = time.perf_counter() - began, time.process_time() - used
    after = memory()
    began = time.perf_counter()
    loader.batch(len(loader))
    print(json.dumps([first, taken, time.perf_counter() - began, *(after[n] - before[n] for n in before)]))


def memory() -> dict[str, int]:
    """KiB: what this process holds itself, pages of files that it has mapped, and the most that it ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) for name in ("RssAnon", "RssFile", "VmHWM")}


def starts(folder: Path) -> None:
    processor = llava_processor()
    sizes = (10_000, 100_000, 1_000_000)
    print(
        f"{'':9s}{'rows':>9s}{'first batch s':>15s}{'of the CPU':>12s}{'next epoch s':>14s}"
        f"{'own MiB':>10s}{'mapped MiB':>12s}{'peak MiB':>10s}{'own bytes a row':>17s}"
    )
    for rows in sizes:
        make_index(folder / str(rows), rows, processor)
    for way in ("padded", "packed", "mixture"):
        base = None
        for rows in sizes:
            command = [sys.executable, __file__, "--start", str(folder / str(rows)), way]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            first, taken, following, own, mapped, peak = json.loads(out)
            base = base or (rows, own)
            each = (own - base[1]) * 1024 / (rows - base[0]) if rows > base[0] else float("nan")
            print(
                f"{way:9s}{rows:9d}{first:15.2f}{taken:12.2f}{following:14.3f}"
                f"{own / 1024:10.1f}{mapped / 1024:12.1f}{peak / 1024:10.1f}{each:17.1f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("rates", "start"))
    parser.add_argument("--rows", type=int, default=256, help="of each kind, whose rate is measured")
    parser.add_argument("--passes", type=int, default=5, help="over these rows; the median counts")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start_one(Path(arguments.start[0]), arguments.start[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "start":
            (Path(folder) / "rates").mkdir()
            rates(Path(folder) / "rates", arguments.rows, arguments.passes)
        if arguments.only != "rates":
            starts(Path(folder))


if __name__ == "__main__":
    main()

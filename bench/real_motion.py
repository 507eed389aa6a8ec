"""Text → pose on motion capture: what does ``tiny`` learn from a few clips? The table of docs/prepared-data.md.

    JAX_PLATFORMS=cpu python bench/real_motion.py --clips FOLDER [--out out/real-motion] [--figure real-motion.png]

FOLDER is what ``chatpose data prepare cmu`` takes as --source. The reader cuts its clips into ``FOLDS`` parts. Each part is tested by models that
were trained on the other parts, from nothing, with ``SEEDS`` seeds: no model is tested on a clip that it was trained on. Nothing was chosen by test
rows: rate, loss, batch and steps are those of docs/heads.md.

Answers are generated as ``chatpose chat`` does. Beside them stand models that learn from the same rows in closed form
(``evaluation.systems.simple``); they see the captions without the words of the questions around them.

Each model is a file of --out, and what stands there is not trained again; a run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import subprocess
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw

from chatpose_jax.chat import load
from chatpose_jax.cli.compiled import keep_compiled
from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.example import Example
from chatpose_jax.data.readers.mocap import Cmu
from chatpose_jax.data.record import Record
from chatpose_jax.evaluation.poses import answer_poses
from chatpose_jax.evaluation.system import first_question
from chatpose_jax.evaluation.systems.simple import MODELS
from chatpose_jax.train.allocator import keep_freed_memory
from chatpose_jax.train.run import run_training
from chatpose_jax.train.run_config import RunConfig, load_config
from smpl_jax import io, metrics, render
from smpl_jax.pose import Pose, stack, to_frame

FOLDS, SEEDS, STEPS, VARIANTS = 3, 3, 400, 4
MODEL = "ChatPose, `tiny`"
NAMES = {
    "mean": "the mean pose of the training rows",
    "nearest": "the training pose whose caption shares most word n-grams",
    "ridge": "ridge regression on word n-grams",
    MODEL: MODEL,
}
MEASURES = {"pa_mpjpe": "PA-MPJPE, mm", "mpjpe": "MPJPE, mm"}
DRAWN = 10_000
"""Resamplings of the clips for an interval."""


class Rows(NamedTuple):
    """Rows with one detailed caption each, and the clip of each."""

    examples: list[Example]
    clips: list[str]


def rows(folder: Path, fold: int, splits: Sequence[Split], *, seed: int, variants: int) -> Rows:
    reader = Cmu(folder, folds=FOLDS, fold=fold, seed=seed, variants=variants, tasks={"detailed": 1.0})
    found = [
        (record.example(variant), record.group)
        for split in splits
        for part in reader.parts(split)
        for record in reader.read(split, part)
        if isinstance(record, Record)
        for variant in range(len(record.conversations))
    ]
    return Rows([example for example, _ in found], [clip for _, clip in found])


def caption(example: Example) -> str:
    """The words of a question that describe the pose."""
    return questions.caption_in(str(example.messages[0]["content"]))


def poses(data: Rows) -> Pose:
    return stack([to_frame(example.poses[0], "camera") for example in data.examples])


def settings(seed: int, steps: int) -> RunConfig:
    return load_config(
        "tiny",
        [
            f"train.seed={seed}",
            f"train.steps={steps}",
            f"train.warmup_steps={steps // 15}",
            "train.learning_rate=0.005",
            "train.pose_loss=(('matrices', 1.0), ('joints', 1.0))",
            "train.eval_every=0",
        ],
    )


def study(args: argparse.Namespace) -> None:
    """Trains and asks all models that are not there yet."""
    todo = list(itertools.product(range(SEEDS), range(FOLDS)))
    for number, (seed, fold) in enumerate(todo, 1):
        file = args.out / f"seed{seed}-fold{fold}.npz"
        if file.exists():
            continue
        start = time.perf_counter()
        # The test rows are the same for all seeds, so their captions are those of one seed.
        train = rows(args.clips, fold, ("train", "val"), seed=seed, variants=VARIANTS)
        test = rows(args.clips, fold, ("test",), seed=0, variants=1)
        print(
            f"model {number} of {len(todo)}: seed {seed}, fold {fold}; {len(train.examples)} rows of {len(set(train.clips))} clips, "
            f"{len(test.examples)} of {len(set(test.clips))} to test",
            flush=True,
        )
        folder = run_training(settings(seed, args.steps), args.out / f"seed{seed}-fold{fold}", data=train.examples)
        replies, rate = answer_poses(load(folder), [first_question(e) for e in test.examples], label="answers")
        texts, rotations = [caption(e) for e in train.examples], np.asarray(poses(train).rotations)
        found = {
            name: make(texts, rotations).answer([caption(e) for e in test.examples]) for name, make in MODELS.items()
        }
        found[MODEL] = np.asarray(stack([reply.poses[0].pose for reply in replies]).rotations)
        values = {f"{name} {m}": v for name, answers in found.items() for m, v in errors(answers, test).items()}
        partial = file.with_suffix(".part")
        with partial.open("wb") as out:
            np.savez(
                out,
                clips=test.clips,
                rate=rate,
                answers=found[MODEL],
                nearest=found["nearest"].astype(np.float32),
                **values,
            )
        os.replace(partial, file)
        means = ", ".join(f"{name} {values[f'{name} pa_mpjpe'].mean():.0f}" for name in found)
        print(f"  {time.perf_counter() - start:.0f} s; PA-MPJPE in mm: {means}; {rate:.0%} offer a pose", flush=True)


def errors(rotations: np.ndarray, test: Rows) -> dict[str, np.ndarray]:
    """Of answers (N, 24, 3, 3) in the camera frame, by measure (N,) in mm."""
    given = Pose(rotations.astype(np.float32), "camera")
    found = jax.jit(metrics.pose_metrics)(given, poses(test), io.load_body())
    return {name: np.asarray(found[name], np.float64) for name in MEASURES}


class Tested(NamedTuple):
    """values: (seeds, N) of all test rows, fold by fold. clips: (N,)."""

    values: np.ndarray
    clips: np.ndarray


def tested(out: Path, name: str, measure: str) -> Tested:
    files = [[np.load(out / f"seed{seed}-fold{fold}.npz") for fold in range(FOLDS)] for seed in range(SEEDS)]
    return Tested(
        np.stack([np.concatenate([file[f"{name} {measure}"] for file in row]) for row in files]),
        np.concatenate([file["clips"] for file in files[0]]),
    )


def interval(values: np.ndarray, clips: np.ndarray) -> tuple[float, float]:
    """95 % of the mean over rows (N,), by a bootstrap of whole clips."""
    _, place = np.unique(clips, return_inverse=True)
    totals, sizes = np.bincount(place, values), np.bincount(place)
    drawn = np.random.default_rng(0).integers(len(sizes), size=(DRAWN, len(sizes)))
    low, high = np.quantile(totals[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


def table(args: argparse.Namespace) -> Iterator[str]:
    yield f"| | {' | '.join(MEASURES.values())} | PA-MPJPE by seed | PA-MPJPE, less the nearest's |"
    yield "|---|---|---|---|---|"
    nearest = tested(args.out, "nearest", "pa_mpjpe")
    for name, words in NAMES.items():
        cells = []
        for measure in MEASURES:
            found = tested(args.out, name, measure)
            low, high = interval(found.values.mean(0), found.clips)
            cells.append(f"{found.values.mean():.1f} [{low:.1f}, {high:.1f}]")
        found = tested(args.out, name, "pa_mpjpe")
        cells.append(", ".join(f"{value:.1f}" for value in found.values.mean(1)))
        apart = found.values.mean(0) - nearest.values.mean(0)
        low, high = interval(apart, found.clips)
        cells.append("" if name == "nearest" else f"{apart.mean():+.1f} [{low:+.1f}, {high:+.1f}]")
        yield f"| {words} | {' | '.join(cells)} |"
    rates = [float(np.load(file)["rate"]) for file in sorted(args.out.glob("seed*.npz"))]
    yield f"\n{len(nearest.clips)} test rows of {len(set(nearest.clips))} clips; {min(rates):.0%} or more of the answers offer a pose unasked."
    found = tested(args.out, MODEL, "pa_mpjpe").values.mean(0)
    apart = found - tested(args.out, "ridge", "pa_mpjpe").values.mean(0)
    low, high = interval(apart, nearest.clips)
    yield f"PA-MPJPE of {MODEL}, less the ridge's: {apart.mean():+.1f} [{low:+.1f}, {high:+.1f}]."
    by_clip = [
        f"{clip} {found[nearest.clips == clip].mean():.0f} ({nearest.values.mean(0)[nearest.clips == clip].mean():.0f})"
        for clip in np.unique(nearest.clips)
    ]
    yield f"PA-MPJPE by clip, and the nearest's in brackets: {', '.join(by_clip)}."


def draw(args: argparse.Namespace, size: int = 170) -> None:
    """A few test rows of the first seed: caption, truth, answer, nearest. They are spread evenly over the errors, best to worst."""
    cases: list[tuple[float, Any, Example, np.ndarray, np.ndarray]] = []
    for fold in range(FOLDS):
        file, test = np.load(args.out / f"seed0-fold{fold}.npz"), rows(args.clips, fold, ("test",), seed=0, variants=1)
        cases += zip(
            file[f"{MODEL} pa_mpjpe"], file["nearest pa_mpjpe"], test.examples, file["answers"], file["nearest"]
        )
    cases.sort(key=lambda case: case[0])
    panels, body = [], io.load_body()
    for share in np.linspace(0.05, 0.95, 6):
        error, other, example, answer, nearest = cases[int(share * len(cases))]
        truth = np.asarray(to_frame(example.poses[0], "camera").rotations)
        bodies = [render.render_body(body, r, size=size, frame="camera") for r in (truth, answer, nearest)]
        panel = Image.new("RGB", (3 * size, size + 92), "white")
        panel.paste(Image.fromarray(np.concatenate(bodies, 1)), (0, 14))
        pen = ImageDraw.Draw(panel)
        for place, words in enumerate((f"true, {example.id}", f"answer, {error:.0f} mm", f"nearest, {other:.0f} mm")):
            pen.text((place * size + 4, 1), words, fill="black")
        pen.text((4, size + 16), textwrap.fill(caption(example), 84), fill="black")
        panels.append(np.asarray(panel))
    render.save_png(args.figure, render.contact_sheet(panels, 2))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder of .amc with .asf, or .bvh")
    parser.add_argument("--out", type=Path, default=Path("out/real-motion"), help="folder of the models")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--figure", type=Path, help="PNG of a few answers to write")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    keep_compiled()
    study(args)
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        f"\n{args.steps} steps; {platform.machine()}, {os.cpu_count()} cores; commit {run.stdout.strip() or 'unknown'}\n"
    )
    print("\n".join(table(args)))
    if args.figure:
        draw(args)


if __name__ == "__main__":
    main()

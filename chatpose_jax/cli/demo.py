"""``chatpose demo``: trains a small ChatPose on generated data, evaluates it on held-out rows, and asks it questions."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax import __version__
from chatpose_jax.chat import ChatPose, Reply, load
from chatpose_jax.cli import chat as chat_command
from chatpose_jax.cli.compiled import keep_compiled
from chatpose_jax.cli.flags import add_config, head_flag
from chatpose_jax.cli.train import ending
from chatpose_jax.data.config import Split
from chatpose_jax.data.example import Example
from chatpose_jax.data.sources import check_sources, examples
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.poses import evaluate_chat, evaluate_follow_ups, mean_pose
from chatpose_jax.train import hosts
from chatpose_jax.train.allocator import cpu_only, keep_freed_memory
from chatpose_jax.train.log import read_metrics
from chatpose_jax.train.run import demand_table, only_run, run_training
from chatpose_jax.train.run_config import RunConfig, load_config
from chatpose_jax.train.trainer import Interrupted, demand_same_run
from smpl_jax import render
from smpl_jax.pose import stack

TEST_ROWS = 192
BASELINE_ROWS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose demo``."""
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for the model, answers, images and report.json"
    )
    add_config(parser, "tiny")
    parser.add_argument("--rows", type=int, default=TEST_ROWS, help="held-out rows of each kind to evaluate")


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, answer, report."""
    if args.rows < 1:
        raise UserError(f"--rows {args.rows}: expected at least 1")
    if cpu_only():
        keep_freed_memory()
    clock = Clock()
    config = load_config(args.config, args.overrides)
    demand_table(config)
    keep_compiled()
    with hosts.announced(ending), only_run(args.out):
        return _run(config, args.out, args.rows, clock)


def _run(config: RunConfig, out: Path, count: int, clock: Clock) -> int:
    size = config.model.image_size

    print(f"1/4  Generating descriptions and images of people ({size} × {size}) ...", flush=True)
    data = config.data
    if [row.name for row in data.sources] != ["synthetic"]:
        raise UserError(
            "the demo generates its data: data.sources must be one row, of the source 'synthetic' (chatpose train and chatpose eval take any)"
        )
    check_sources(data)
    demand_same_run(out / "run", config.model, config.train, out / "model")  # fails before minutes of work
    rows: Any = examples(data, "train", size)
    rows.precompute(cpu_workers())
    clock.lap("data")

    print(
        f"2/4  Training: {config.train.steps} steps (you may interrupt it; the same command resumes it) ...",
        flush=True,
    )
    try:
        folder = run_training(config, out / "run", data=rows, folder=out / "model")
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 143
    clock.lap("training")

    print("3/4  Evaluating on held-out rows ...", flush=True)
    model = load(folder, head=config.model.head.name)
    results = evaluate(model, config, count)
    clock.lap("evaluation")

    print("4/4  Three conversations ...", flush=True)
    answers = ask_questions(model, config, out)
    clock.lap("answers")

    log = read_metrics(out / "run")
    report = {
        "chatpose_jax": __version__,
        "machine": f"{platform.machine()}, {cpu_workers()} cores, Python {platform.python_version()}",
        "config": {
            "model": config.model.to_json(),
            "data": dataclasses.asdict(data),
            "train": dataclasses.asdict(config.train),
        },
        "body": model.body.name,
        "seconds": clock.laps,
        "evaluation": results,
        "learning_curve": learning_curve(log),
        "answers": answers,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    if plot := draw_curve(log, results, out / "learning-curve.png"):
        answers.append({"files": [str(plot)]})
    print_results(results, clock)
    print(f"\nEverything is in {out}: report.json, the answers with PNG, GLB, OBJ and npz, and the model in {folder}.")
    print(f"Ask it yourself: {sys.argv[0]} chat {out}{head_flag(config.model.head.name)}")
    return 0


class Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        self.laps[name] = round(time.perf_counter() - self.start - sum(self.laps.values()), 1)


def evaluate(model: ChatPose, config: RunConfig, count: int) -> dict[str, Any]:
    """Evaluates answers on the test split: rows of text and rows of images separately, each with the mean pose of training rows of that kind
    as the baseline; and edits of a described pose, asked for in a second turn.
    """
    results = {}
    splits: tuple[tuple[Split, int], ...] = (("test", count), ("train", BASELINE_ROWS))
    for kind in ("text", "image"):
        test, train = (generated(config, split, {kind: 1.0}, rows).precompute(cpu_workers()) for split, rows in splits)
        mean = mean_pose(stack([row.poses[0] for row in train]))
        results[kind] = evaluate_chat(model, test[:count], mean, label=kind)
        if kind == "text":
            turns = generated(config, "test", {"text_turns": 1.0})
            changes = list(itertools.islice((row for row in turns if len(row.poses) == 2), count))
            results["follow-up"] = evaluate_follow_ups(model, changes, mean, label="follow-up")
    return results


def generated(
    config: RunConfig, split: Split, tasks: Mapping[str, float], size: int | None = None, seed: int = 0
) -> SyntheticDataset:
    """Generated rows like those of the configured source, but of these tasks. ``seed`` is added to the source's."""
    options = {"image_size": config.model.image_size, "seed": config.data.seed, **config.data.sources[0].options}
    options["seed"] += seed
    same = {name: options[name] for name in ("image_size", "seed", "max_yaw") if name in options}
    return SyntheticDataset(split, size, tasks=tasks, **same)


def ask_questions(model: ChatPose, config: RunConfig, out: Path) -> list[dict[str, Any]]:
    """Three conversations: a detailed description, a held-out image, and a description with a follow-up turn. Writes the files of each to ``out``."""
    texts, images, turns = (
        generated(config, "test", {task: 1.0}, 400, seed=1) for task in ("text", "image", "text_turns")
    )
    text, image = texts[7], images[11]
    follow = next(row for row in (turns[i] for i in range(len(turns))) if len(row.poses) == 2)
    answers = []
    for name, row in (("description", text), ("image", image), ("follow-up", follow)):
        folder, messages, replies = out / name, [], []
        files: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)
        for message in row.messages:
            if message["role"] != "user":
                continue
            messages.append(message)
            files += _save_images(message, folder)
            reply = model.chat(messages, max_new_tokens=48)
            messages.append(reply.message)
            replies.append((_words(message), reply))
        files += chat_command.save_replies(replies, folder)
        files.append(_panel(model, row, replies, folder / "answer.png"))
        for question, reply in replies:
            print(f"\n  you>      {question}\n  chatpose> {reply.text}")
        turns_json = [
            {"question": question, "answer": reply.text, "poses": len(reply.poses)} for question, reply in replies
        ]
        answers.append({"name": name, "turns": turns_json, "files": [str(file) for file in files]})
    return answers


def _save_images(message: Mapping[str, Any], folder: Path) -> list[Path]:
    """Saves the images of a question as files, so that the user can ask about them again."""
    parts = [] if isinstance(message["content"], str) else message["content"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    return [render.save_png(folder / f"question{i or ''}.png", np.asarray(image)) for i, image in enumerate(images)]


def _words(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] if part["type"] == "text" else "[image]" for part in content)


def _panel(model: ChatPose, row: Example, replies: list[tuple[str, Reply]], path: Path) -> Path:
    """Saves the input image, if any, and for each turn the true body and the predicted one."""
    from PIL import Image

    panels, labels = [], []
    first = row.messages[0]["content"]
    if not isinstance(first, str):
        image = np.asarray(next(part["image"] for part in first if part["type"] == "image"))
        panels.append(np.asarray(Image.fromarray(image).resize((384, 384), Image.Resampling.NEAREST)))
        labels.append("image")
    for number, ((_, reply), truth) in enumerate(zip(replies, row.poses), 1):
        turn = f" {number}" if len(row.poses) > 1 else ""
        panels.append(render.render_body(model.body, truth.rotations, size=384, frame=truth.frame))
        labels.append(f"true{turn}")
        for pose in reply.poses[:1]:
            panels.append(pose.render(384))
            labels.append(f"answer{turn}")
    render.save_png(path, render.contact_sheet(panels, len(panels), labels))
    return path


def learning_curve(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """The validation lines of a run's ``metrics.jsonl``."""
    return [line for line in log if any(name.startswith("val_") for name in line)]


def draw_curve(log: list[dict[str, float]], results: Mapping[str, Any], path: Path) -> Path | None:
    """Plots a run's ``metrics.jsonl``: training losses, each the mean of 50 steps, and PA-MPJPE of validation rows with the baselines. Without
    matplotlib it prints a hint and returns None.
    """
    try:
        import matplotlib
    except ImportError:
        print('(pip install ".[eval]" in the checkout to plot the learning curve)')
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, axes) = pyplot.subplots(1, 2, figsize=(10, 3.6), dpi=150)
    steps = [line for line in log if "loss" in line]
    size = min(50, len(steps))
    middle = [line["step"] for line in steps[size // 2 :]][: len(steps) - size + 1]
    for name, unit in (("text", "nats"), ("pose_root", "mean |ΔR|"), ("pose_body", "mean |ΔR|")):
        if name not in steps[0]:  # a head may have a loss of its own
            continue
        values = np.convolve([line[name] for line in steps], np.full(size, 1 / size), "valid")
        losses.plot(middle, values, linewidth=1, label=f"{name}, {unit}")
    losses.set(xlabel="step", ylabel="training loss", yscale="log")
    curve = learning_curve(log)
    for number, (kind, colour) in enumerate((("text", "tab:blue"), ("image", "tab:orange"))):
        points = [(line["step"], line[f"val_{kind}_pa_mpjpe"]) for line in curve if f"val_{kind}_pa_mpjpe" in line]
        if points:
            axes.plot(*zip(*points), color=colour, marker="o", markersize=3, label=f"{kind} → pose")
        dashes = (3 * number, (3, 3))  # alternating dashes, because the two lines nearly coincide
        axes.axhline(results[kind]["baseline_pa_mpjpe"], color=colour, linestyle=dashes, label=f"mean pose, {kind}")
    axes.set(xlabel="step", ylabel="PA-MPJPE, mm (validation)", xlim=(0, None), ylim=(0, None))
    for each in (losses, axes):
        each.legend(frameon=False, fontsize=8)
        each.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def print_results(results: Mapping[str, Any], clock: Clock) -> None:
    """Prints the errors of the answers, and of the mean pose as the answer to all."""
    print(
        f"\n{'held-out answers':18} {'MPJPE':>9} {'PA-MPJPE':>9} {'MPJRE':>7}   {'PA-MPJPE / mean pose':>20}   offers a pose"
    )
    for kind, r in results.items():
        print(
            f"{kind + ' → pose':18} {r['mpjpe']:6.0f} mm {r['pa_mpjpe']:6.0f} mm {r['mpjre']:7.1f}   "
            f"{r['ratio_pa_mpjpe']:20.2f}   {r['pose_rate']:.0%}"
        )
        print(
            f"{'  mean pose':18} {r['baseline_mpjpe']:6.0f} mm {r['baseline_pa_mpjpe']:6.0f} mm {r['baseline_mpjre']:7.1f}"
        )
        if "kept_mpjpe" in r:
            print(
                f"{'  first answer':18} {r['kept_mpjpe']:6.0f} mm {r['kept_pa_mpjpe']:6.0f} mm {r['kept_mpjre']:7.1f}"
            )
    print("\n" + ", ".join(f"{name} {math.ceil(seconds)} s" for name, seconds in clock.laps.items()))


def cpu_workers() -> int:
    """Number of processes worth starting for work in pure Python."""
    return min(os.cpu_count() or 1, 8)

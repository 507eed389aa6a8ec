"""``chatpose evaluate``: a model's answers to held-out rows of any data set, drawn, with their errors beside those of the mean pose."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from chatpose_jax import __version__
from chatpose_jax.chat import ChatPose, Reply, load
from chatpose_jax.cli.compiled import keep_compiled
from chatpose_jax.cli.flags import add_config
from chatpose_jax.data.config import Split
from chatpose_jax.data.example import Example
from chatpose_jax.data.sources import examples
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.poses import (
    answer_poses,
    compare_poses,
    first_poses,
    first_question,
    mean_pose,
    true_poses,
)
from chatpose_jax.processing.images import load_image
from chatpose_jax.train.allocator import cpu_only, keep_freed_memory
from chatpose_jax.train.held_out import held_out_rows
from chatpose_jax.train.run_config import load_config
from smpl_jax import render
from smpl_jax.pose import known

ROWS, BASELINE_ROWS = 192, 1000
PANEL, LINES, LINE = 192, 8, 16
"""Pixels of a body in the drawings; lines of text below, and pixels of each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose evaluate``."""
    parser.add_argument("model", type=Path, help="model folder, or the run folder that holds it")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for report.json and a PNG of answers for each kind of row"
    )
    add_config(parser, "tiny", "data.sources=cmu")
    parser.add_argument("--head", help="package.module:Class of a pose head of your own")
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of each kind, spread evenly over the split")
    parser.add_argument("--drawings", type=int, default=8, help="rows of each kind that are drawn; 0: none")


def run(args: argparse.Namespace) -> int:
    """Evaluates a model and writes the report. Of the configuration, only its data settings are used. Raises UserError."""
    if args.rows < 1 or args.drawings < 0:
        raise UserError(
            f"expected --rows of at least 1 and --drawings of at least 0, found {args.rows} and {args.drawings}"
        )
    if cpu_only():
        keep_freed_memory()
    data = load_config(args.config, args.overrides).data
    keep_compiled()
    model = load(args.model, head=args.head)
    size = model.config.vision.image_size
    asked, train = examples(data, args.split, size), examples(data, "train", size)
    held_out, _ = held_out_rows(asked, args.rows)
    for kind, rows in held_out.items():
        if not known(true_poses(rows)).any():
            raise UserError(
                f"none of the {len(rows)} {kind} rows of the split {args.split!r} has a measured joint, so their poses cannot be compared"
            )
    baseline = "train" if len(train) else args.split
    seen, _ = held_out_rows(train if len(train) else asked, BASELINE_ROWS)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for kind, rows in held_out.items():
        mean = mean_pose(true_poses(seen.get(kind) or next(iter(seen.values()))))
        replies, rate = answer_poses(model, [first_question(row) for row in rows], label=kind)
        found = compare_poses(first_poses(replies), true_poses(rows), mean, model.body)
        results[kind] = {**found, "pose_rate": rate, "count": len(rows)}
        if args.drawings:
            shown = np.unique(np.linspace(0, len(rows) - 1, args.drawings).astype(int))
            panels = [draw_answer(model, rows[i], replies[i]) for i in shown]
            render.save_png(args.out / f"{kind}.png", render.contact_sheet(panels, 2))
    report = {
        "chatpose_jax": __version__,
        "model": str(args.model),
        "body": model.body.name,
        "sources": [row._asdict() for row in data.sources],
        "split": args.split,
        "mean_pose_of": baseline,
        "evaluation": results,
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print_table(results)
    if baseline != "train":
        print(f"there are no training rows: the mean pose is that of the split {baseline!r} itself")
    print(f"\nwrote {args.out}: report.json" + "".join(f", {kind}.png" for kind in results if args.drawings))
    return 0


def draw_answer(model: ChatPose, row: Example, reply: Reply) -> np.ndarray:
    """The question, its image if there is one, the true body and the answer, (H, W, 3) uint8."""
    content = first_question(row)[-1]["content"]
    parts: Sequence[Mapping[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    images = [load_image(part["image"]) for part in parts if part["type"] == "image"]
    panels = [np.asarray(ImageOps.pad(image, (PANEL, PANEL), color="white")) for image in images]
    truth = true_poses([row])[0]
    panels.append(render.render_body(model.body, truth.rotations, size=PANEL, frame=truth.frame))
    panels.append(reply.poses[0].render(PANEL))
    sheet = render.contact_sheet(panels, len(panels), [*["image"] * len(images), "true", "answer"])
    words = " ".join(part["text"] for part in parts if part["type"] == "text")
    panel = Image.new("RGB", (sheet.shape[1], sheet.shape[0] + LINE * LINES), "white")
    panel.paste(Image.fromarray(sheet), (0, 0))
    lines = textwrap.fill(words, sheet.shape[1] // 6, max_lines=LINES, placeholder=" …")
    font = ImageFont.load_default(12)  # smaller, Pillow's font loses its spaces
    for number, line in enumerate(lines.splitlines()):
        ImageDraw.Draw(panel).text((4, sheet.shape[0] + LINE * number), line, "black", font)
    return np.asarray(panel)


def print_table(results: Mapping[str, Any]) -> None:
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

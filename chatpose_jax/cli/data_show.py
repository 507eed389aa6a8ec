"""``chatpose data show``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np

from chatpose_jax import storage
from chatpose_jax.cli.data_prepare import add_options, options_of
from chatpose_jax.data.check import joint_name
from chatpose_jax.data.config import DataConfig, SourceRow, Split
from chatpose_jax.data.example import Example
from chatpose_jax.data.prepared import Prepared
from chatpose_jax.data.scan import AXES, UP, head_directions
from chatpose_jax.data.sources import examples
from chatpose_jax.errors import UserError
from chatpose_jax.processing.conversation import ImageSource, parse_messages
from chatpose_jax.processing.images import load_image
from smpl_jax.pose import HANDS, Pose, known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose data show``."""
    parser.add_argument(
        "folder", nargs="?", type=storage.location, metavar="FOLDER", help="folder that 'data prepare' wrote"
    )
    parser.add_argument(
        "--source", metavar="NAME", help="instead of FOLDER, a source of data.sources: synthetic, module:function …"
    )
    add_options(parser, "--source")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="number of the row, from 0 (default)")
    parser.add_argument("--split", choices=get_args(Split), default="train", help="default: train")
    parser.add_argument("--out", type=storage.location, metavar="PNG", help="draw the row: images, body and text")


def run(args: argparse.Namespace) -> int:
    """Prints one row, and draws it. Raises UserError."""
    if (args.folder is None) == (args.source is None):
        raise UserError("expected a FOLDER of a prepared data set, or --source NAME: one of the two")
    if args.options and args.source is None:
        raise UserError("--set gives options of a --source; a prepared FOLDER has none")
    if args.out is not None and args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: expected a file that ends in .png")
    name, rows = _rows(args)
    if not 0 <= args.row < len(rows):
        there = f"rows 0 to {len(rows) - 1}" if len(rows) else "no rows"
        raise UserError(f"--row {args.row}: {name} has {there} in the split {args.split!r}; --split chooses another")
    example = rows[args.row]
    print(f"{name}, {args.split}, row {args.row} of {len(rows):,}: {example.kind}")
    if isinstance(rows, Prepared):
        place, record = rows.entries[args.row], rows.record(args.row)
        shard = rows.shard(int(place["shard"])).name
        print(
            f"record {place['record']} of {shard}, conversation {place['conversation'] + 1} of {len(record.conversations)}"
        )
        print(f"key: {record.key}\ngroup: {record.group or 'none'}")
    else:
        print(f"id: {example.id}")
    print("\n".join(describe_row(example)))
    if args.out is not None:
        from chatpose_jax.data import sheet  # loads the body

        sheet.write_png(args.out, sheet.draw(example, f"row {args.row} · {example.id}", whole=True))
        print(f"wrote {args.out}")
    return 0


def _rows(args: argparse.Namespace) -> tuple[str, Sequence[Example]]:
    if args.folder is not None:
        return str(args.folder), Prepared(args.folder, args.split)
    config = DataConfig(sources=(SourceRow(args.source, 1.0, options_of(args.options)),))
    return args.source, examples(config, args.split, image_size=336)


def describe_row(example: Example) -> Iterator[str]:
    """The lines that say what a row holds: messages, images, poses, extras. For an image that cannot be read, its error."""
    images: list[ImageSource] = []
    for turn in parse_messages(example.messages).turns:
        images += [part for part in turn.parts if isinstance(part, ImageSource)]
        yield f"{turn.role}: {' '.join(part if isinstance(part, str) else '[image]' for part in turn.parts)}"
    for number, source in enumerate(images, 1):
        size = f", {len(source.value):,} bytes" if isinstance(source.value, bytes) else ""
        try:
            image = load_image(source.value)
            yield f"image {number}: {image.width} × {image.height}{size}"
        except UserError as error:
            yield f"image {number}: {error}"
    for number in range(len(example.poses)):
        yield f"pose {number + 1}: {describe_pose(example.poses[number])}"
    for name, value in example.extras.items():
        yield f"extras {name}: {_value(value)}"


def describe_pose(pose: Pose) -> str:
    """One line about a single pose."""
    measured = known(pose)
    if not measured.any():
        return f"{pose.family} ({pose.num_joints} joints); nothing was measured"
    absent = [joint_name(pose.num_joints, joint) for joint in np.flatnonzero(~measured).tolist()]
    fingers = [joint for joint in absent if joint[-1].isdigit()]
    if len(fingers) == HANDS:
        absent = [joint for joint in absent if joint not in fingers] + ["all fingers"]
    head = head_directions(np.asarray(pose.rotations, np.float32)[None])[0]
    up = AXES.index(UP[pose.frame])
    height = (1 - 2 * (up % 2)) * head[up // 2]
    words = [
        f"frame {pose.frame}, {pose.family} ({pose.num_joints} joints)",
        f"head {'above' if height > 0 else 'below'} the pelvis, {np.degrees(np.arccos(height.clip(-1, 1))):.0f}° from straight up",
        f"measured {measured.sum()}" + (f", not {', '.join(absent)}" if absent else ""),
    ]
    for name, unit in (("betas", f" of {pose.shape_space or 'an unknown shape space'}"), ("translation", " m")):
        value, has = getattr(pose, name), getattr(pose, f"has_{name}")
        there = value is not None and (has is None or bool(has))
        words.append(f"{name} {_value(np.asarray(value))}{unit}" if there else f"no {name}")
    return "; ".join(words)


def _value(value: Any) -> str:
    array = np.asarray(value)
    if array.dtype.kind in "biuf" and array.size > 10:
        return f"{array.dtype} {array.shape}, from {array.min():.4g} to {array.max():.4g}"
    if array.dtype.kind == "f":
        return np.array2string(array, precision=3, suppress_small=True, max_line_width=10_000).replace("\n", "")
    text = str(array.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 300 else f"{text[:300]} …"

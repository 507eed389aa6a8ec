"""``chatpose data check``."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from chatpose_jax import storage
from chatpose_jax.data import check as checks
from chatpose_jax.data import store
from chatpose_jax.data.pool import cpus
from chatpose_jax.errors import UserError
from chatpose_jax.locks import only_writer
from chatpose_jax.settings import whole
from smpl_jax.pose import HANDS

REPORT, SHEET = "check.json", "sheet.png"
_BAR = 40  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose data check``."""
    parser.add_argument(
        "folders", nargs="+", type=storage.location, metavar="FOLDER", help="folders that 'data prepare' wrote"
    )
    parser.add_argument(
        "--out",
        type=storage.location,
        metavar="FOLDER",
        help=f"folder for {REPORT} and {SHEET}; default: the first FOLDER",
    )
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help=f"rows of each kind and split in {SHEET}; 0: no sheet"
    )
    parser.add_argument(
        "--decode",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the images to decode completely (default 1)",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=checks.KINDS,
        help="a kind of finding that is no failure; may be repeated",
    )
    parser.add_argument(
        "--workers", type=int, default=cpus(), metavar="N", help="processes; default: one for each processor"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar; print only the findings")


def run(args: argparse.Namespace) -> int:
    """Checks, reports, and draws the sheet. Exit status: 0 nothing was found, 1 something was. Raises UserError, OSError."""
    whole("--samples", args.samples, 0, 20)
    out = args.out or args.folders[0]
    for folder in args.folders:
        store.read_description(folder)
    try:  # an error now is better than one after an hour
        with only_writer(out, out / ".check"):
            pass
    except UserError as error:
        raise UserError(f"{error}; --out chooses another folder") from None
    report = checks.check_folders(args.folders, workers=args.workers, decode=args.decode, progress=not args.quiet)
    storage.write_bytes(out / REPORT, store.to_json(report))
    findings = [checks.Finding(**found) for found in report["findings"]]
    bad = [finding for finding in findings if finding.kind not in args.allow]
    if not args.quiet:
        for folder, found in report["folders"].items():
            print("\n".join(describe_checked(folder, found)))
    print("\n".join(f"{'!' if finding in bad else 'allowed'} {finding}" for finding in findings) or "nothing was found")
    print(f"wrote {out / REPORT}")
    if args.samples:
        from chatpose_jax.data import sheet

        print(f"wrote {sheet.save_sheet(out / SHEET, args.folders, args.samples)}")
    sys.stdout.flush()
    return 1 if bad else 0


def describe_checked(folder: str, found: Mapping[str, Any]) -> list[str]:
    """The lines that say what a folder holds; ``found`` is its part of the report."""
    lines = [f"{folder}: {found['about']['title']} (licence: {found['about']['licence']})"]
    for split, about in found["splits"].items():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in about["kinds"].items())
        lines.append(
            f"  {split}: {about['rows']:,} rows ({kinds or 'none'}) of {about['records']:,} records in {about['groups']:,} groups; "
            f"{about['shards']:,} files, {about['bytes'] / 1e6:,.1f} MB"
        )
        lines += [f"    {line}" for line in _lines(about)]
    return lines


def _lines(about: Mapping[str, Any]) -> Iterator[str]:
    for reason, count in about["skipped"].items():
        yield f"left out: {count:,} × {reason}"
    images, poses = about["images"], about["poses"]
    if images["count"]:
        sizes = ", ".join(f"{width} × {height} ({count:,})" for width, height, count in images["sizes"][:3])
        yield (
            f"images: {images['count']:,}, {images['decoded']:,} decoded, {images['unreadable']:,} unreadable, "
            f"{images['repeated']:,} equal to an earlier one; {sizes}; from {_size(images['smallest'])} to {_size(images['largest'])}"
        )
    if poses["count"]:
        yield f"poses: {poses['count']:,}, {poses['repeated']:,} with the body of an earlier one"
    for frame, found in poses["frames"].items():
        few = "" if found["poses"] >= checks.ENOUGH else " (too few to judge)"
        facing = ", ".join(f"{value:+.2f}" for value in found["facing"])
        axes = sorted((axis for axis in found["heads"].items() if axis[1] >= 0.005), key=lambda axis: -axis[1])
        yield (
            f"frame {frame!r}: heads above the pelvis in {found['above']:.1%}{few}; they point to "
            f"{', '.join(f'{axis} {share:.0%}' for axis, share in axes)}; mean direction of the front ({facing})"
        )
    for family, found in poses["families"].items():
        absent = ", ".join(_joined(found["unmeasured"]))
        yield (
            f"{family}: {found['betas']:.0%} with betas, {found['translation']:.0%} with translation; "
            f"not measured: {absent or 'none'}"
        )
    yield f"rows equal to an earlier one: {about['repeated_rows']:,}"
    yield from _histogram(about["tokens"])


def _joined(shares: Mapping[str, float]) -> Iterator[str]:
    """Shares by joint. The fingers are one entry if they have one share."""
    fingers = {joint: share for joint, share in shares.items() if joint[-1].isdigit()}
    if len(fingers) == HANDS and len(set(fingers.values())) == 1:
        shares = {
            **{joint: share for joint, share in shares.items() if joint not in fingers},
            "all fingers": min(fingers.values()),
        }
    yield from (f"{joint} {share:.0%}" for joint, share in shares.items())


def _size(size: list[int] | None) -> str:
    return f"{size[0]} × {size[1]}" if size else "none"


def _histogram(tokens: Mapping[str, Any]) -> Iterator[str]:
    if not tokens["bins"]:
        return
    yield f"tokens of a row, without those of images: median {tokens['median']:,}, at most {tokens['most']:,}"
    most = max(count for *_, count in tokens["bins"])
    empty = itertools.takewhile(lambda found: not found[2], tokens["bins"])
    for low, high, count in tokens["bins"][len(list(empty)) :]:
        name = f"{low}–{high - 1}" if high else f"{low}–"
        yield f"  {name:>11}  {'█' * round(_BAR * count / max(most, 1)):<{_BAR}} {count:,}"

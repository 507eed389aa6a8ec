"""``chatpose verify``."""

from __future__ import annotations

import argparse

from chatpose_jax.cli.source_options import add_source_options, source_of
from chatpose_jax.verify import verify

TOLERANCE = 2e-5
"""Relative tolerance; see ``Difference.within``."""
INCOMPLETE = 3
"""Exit status if parts of the model could not be compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose verify``."""
    parser.add_argument("path", metavar="source", help="the PyTorch weights, as given to chatpose convert")
    parser.add_argument("converted", help="the model folder that chatpose convert wrote")
    add_source_options(parser, planned=False)
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="run N decoder layers, spread from the first to the last, each on torch's hidden states (default: all; 3 of a large model)",
    )
    parser.add_argument("--prompt", action="append", default=[], help="text to ask; may be repeated")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image to ask about; may be repeated"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="limit of the largest difference, relative to the stage's largest value if that exceeds 1; ten times as much for "
        f"poses (default {TOLERANCE:g}; cast weights need more)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``chatpose verify``. Returns 0 if everything was compared and is within the tolerance, 1 if a stage is not, and 3 if parts could not be
    compared. Raises UserError.
    """
    comparison = verify(source_of(args), args.converted, layers=args.layers, prompts=args.prompt, images=args.image)
    failed, worst = 0, 0.0
    for number, stage in enumerate(comparison.stages):
        if not number:
            print(f"{'prompt':<9} {'stage':<15} {'largest':>10} {'max diff':>10} {'mean diff':>10} {'relative':>10}")
        good = stage.within(args.tolerance)
        failed += not good
        worst = max(worst, stage.relative / stage.slack)
        print(
            f"{stage.prompt:<9} {stage.stage:<15} {stage.largest:>10.4g} {stage.maximum:>10.2e} {stage.mean:>10.2e} "
            f"{stage.relative:>10.2e}{'' if good else '  above tolerance'}",
            flush=True,
        )
    if comparison.quantize != "none":
        print(
            f"the folder holds its decoder's projections in {comparison.quantize}, and those of the source were rounded alike: what that costs in "
            "answers is not in these figures"
        )
    if failed:
        print(f"differs: {failed} stages above {args.tolerance:g}")
        if comparison.quantize != "none":
            print(
                "if the source is an export of this folder, it is rounded already: convert it without --quantize, and compare with that"
            )
        return 1
    if comparison.left_out:
        print(
            f"incomplete: the compared parts are equal (largest relative difference {worst:.2e}); not compared: "
            f"{', '.join(comparison.left_out)} of {args.converted}, because no source has these weights, or torch cannot run this pose head; "
            "give every source that chatpose convert read (--vision, --projector, --adapter)"
        )
        return INCOMPLETE
    print(
        f"equal: the largest relative difference between torch and JAX is {worst:.2e}, the tolerance {args.tolerance:g}"
    )
    return 0

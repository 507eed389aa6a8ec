"""``chatpose data build``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from chatpose_jax import named
from chatpose_jax.cli.data_prepare import add_options, options_of
from chatpose_jax.data import build
from chatpose_jax.endpoint import Endpoint
from chatpose_jax.errors import UserError
from chatpose_jax.settings import did_you_mean

GENERATED = "generated"
BUILDERS: dict[tuple[str, bool], str] = {
    ("spg", False): "chatpose_jax.data.builders.spg:SpgBuilder",
    ("spg", True): "chatpose_jax.data.builders.generated:GeneratedSpg",
    ("rpe", False): "chatpose_jax.data.builders.rpe:RpeBuilder",
    ("rpe", True): "chatpose_jax.data.builders.generated:GeneratedRpe",
}
"""(what, whether of the generated set) -> ``package.module:Class`` of the ``Builder``."""
CACHE = "answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose data build``."""
    parser.add_argument("what", help="spg: questions that imply a pose; rpe: descriptions of people in images")
    parser.add_argument(
        "--source",
        required=True,
        metavar="FOLDER",
        help=f"spg: the folder of PoseScript; rpe: a folder that `chatpose data prepare` wrote; or the word {GENERATED}",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write")
    add_options(parser, "the builder")
    parser.add_argument(
        "--model", metavar="NAME", help="language model at the endpoint of OPENAI_BASE_URL, with the key OPENAI_API_KEY"
    )
    parser.add_argument(
        "--offline", action="store_true", help=f"write the texts by rules instead; for --source {GENERATED}"
    )
    parser.add_argument("--accept", action="store_true", help=f"write the rows that are accepted in {build.REVIEW}")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument(
        "--parallel", type=int, default=4, metavar="N", help="questions that are sent at a time (default 4)"
    )
    parser.add_argument(
        "--price",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="prices of a million tokens read and written, for the estimate",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation of the costs")


def run(args: argparse.Namespace) -> int:
    """Writes texts for review, or the accepted rows. Exit status 1: some items have no text; the same command tries them again. Raises UserError."""
    builder = _builder(args)
    if args.accept:
        yes, no, open_ = build.accept(builder, args.out)
        print(f"{args.out}: {yes} rows accepted, {no} refused, {open_} not decided")
        return 0
    if bool(args.model) == args.offline:
        raise UserError("name the language model, --model NAME, or write the texts by rules, --offline")
    for name in ("limit", "parallel"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}")
    items = build.pending(builder, args.out, args.limit)
    endpoint = Endpoint.from_environment(args.model, cache=args.out / CACHE) if args.model else None
    if (
        endpoint is not None
        and items
        and not _agreed(build.estimate(builder, items, endpoint, args.price), endpoint, args)
    ):
        print("no question was sent", file=sys.stderr)
        return 1
    try:
        found = build.write_texts(builder, items, args.out, endpoint, parallel=args.parallel)
    except KeyboardInterrupt:
        print("\nwhat is written is kept: the same command continues", file=sys.stderr)
        raise
    for name, why in found.failed[:5]:
        print(f"no text for {name}: {why}", file=sys.stderr)
    if len(found.failed) > 5:
        print(f"and {len(found.failed) - 5} more", file=sys.stderr)
    print(
        f'{args.out / build.REVIEW}: {found.rows} rows written, {found.before} were there. Read it and set "accept" to true or false in each '
        "line, then run this with --accept"
    )
    return 1 if found.failed else 0


def _builder(args: argparse.Namespace) -> build.Builder:
    names = sorted({what for what, _ in BUILDERS})
    if args.what not in names:
        raise UserError(
            f"no builder {args.what!r}{did_you_mean(args.what, names) or '; expected ' + ' or '.join(names)}"
        )
    where = f"chatpose data build {args.what}"
    make = named.find(where, BUILDERS[args.what, args.source == GENERATED], {})
    options = options_of(args.options)
    named.check_options(where, named.signature(where, make), options)
    return make(Path(args.source).expanduser(), **options)


def _agreed(costs: build.Estimate, endpoint: Endpoint, args: argparse.Namespace) -> bool:
    """Says what the run would cost, and asks whether to continue."""
    money = " (--price IN OUT gives the cost)" if costs.cost is None else f", which costs about {costs.cost:.2f}"
    print(
        f"{costs.items} items, {costs.asked} of them without an answer so far. To ask {endpoint.model!r} at {endpoint.url}: about "
        f"{costs.tokens_in:,} tokens in and {costs.tokens_out:,} out{money}",
        file=sys.stderr,
    )
    if args.yes or not costs.asked:
        return True
    if not sys.stdin.isatty():
        raise UserError(
            "standard input is not a terminal, so nobody can agree to these costs; to agree beforehand, add --yes"
        )
    print("Continue? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")

"""``chatpose data prepare``."""

from __future__ import annotations

import argparse
import sys

from chatpose_jax import storage
from chatpose_jax.data import store
from chatpose_jax.data.datasets import DATA_SETS
from chatpose_jax.data.pool import cpus
from chatpose_jax.data.prepare import MAX_BROKEN, prepare
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import Processor, tiny_processor
from chatpose_jax.settings import parse_value
from chatpose_jax.storage import Location


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose data prepare``."""
    parser.add_argument("name", help=f"{', '.join(sorted(DATA_SETS))}; or package.module:Class of a reader of your own")
    parser.add_argument(
        "--source", required=True, type=storage.location, metavar="FOLDER", help="folder of the original files"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=storage.location,
        metavar="FOLDER",
        help="folder to write, on a disk or gs://… or s3://…; data/NAME is where training looks",
    )
    add_options(parser, "the data set")
    parser.add_argument(
        "--workers", type=int, default=cpus(), metavar="N", help="processes; default: one for each processor"
    )
    parser.add_argument(
        "--model",
        type=storage.location,
        metavar="FOLDER",
        help="folder of the model that will be trained: rows are counted in its tokens, so training need not do it",
    )
    parser.add_argument(
        "--max-broken",
        type=int,
        default=MAX_BROKEN,
        metavar="N",
        help=f"leave out up to N broken items; one more stops the command (default {MAX_BROKEN})",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report")


def run(args: argparse.Namespace) -> int:
    """Prepares a data set and reports what it holds. After an interrupt or an error the same command continues. Raises UserError."""
    with storage.reachable(args.out):
        complete = (args.out / store.DESCRIPTION).exists()
    try:
        found = prepare(
            args.name,
            args.source,
            args.out,
            processor=_processor(args.model),
            options=options_of(args.options),
            workers=args.workers,
            max_broken=args.max_broken,
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        print("\nwhat is finished is kept: the same command continues", file=sys.stderr)
        raise
    if not args.quiet:
        print("\n".join(describe_data_set(found)))
        print(f"{args.out} was complete before" if complete else f"wrote {args.out}")
    return 0


def describe_data_set(description: dict) -> list[str]:
    """Lines that say what a prepared data set holds."""
    lines = [f"{description['about']['title']} (licence: {description['about']['licence']})"]
    for split, about in description["splits"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in about["kinds"].items())
        size = sum(shard["bytes"] for shard in about["shards"])
        lines.append(
            f"{split}: {about['rows']} rows{f' ({kinds})' if kinds else ''} of {about['records']} records, {size / 1e9:.3g} GB"
        )
        lines += [f"  left out: {count} × {reason}" for reason, count in about["skipped"].items()]
        lines += [f"  broken: {item['key']}: {item['detail'] or item['reason']}" for item in about["broken"][:5]]
        if more := len(about["broken"]) - 5:
            lines += [f"  and {more} more in dataset.json"] if more > 0 else []
    return lines


def add_options(parser: argparse.ArgumentParser, owner: str) -> None:
    """Adds ``--set OPTION=VALUE`` for the options of something; ``options_of`` reads it."""
    words = f"an option of {owner}; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", dest="options", help=words)


def options_of(given: list[str]) -> dict[str, object]:
    """The options of ``--set OPTION=VALUE``. Raises UserError."""
    options = {}
    for word in given:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"--set {word}: expected OPTION=VALUE")
        try:
            options[name] = parse_value(text)
        except UserError as error:
            raise UserError(f"--set {word}: {error}") from None
    return options


def _processor(model: Location | None) -> Processor:
    if model is None:
        return tiny_processor(preset("tiny"))
    from chatpose_jax.weights import folder as model_folder  # takes seconds

    return Processor.load(model / model_folder.TOKENIZER, model_folder.read_config(model))

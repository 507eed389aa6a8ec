"""``chatpose train``: a configuration, its data, and the trainer; leaves a model folder."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from chatpose_jax.cli.config import RunConfig, load_config
from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.config import examples
from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import Params, abstract_params, create
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import Processor, tiny_processor
from chatpose_jax.train.trainable import flatten, unflatten
from chatpose_jax.train.trainer import Interrupted, train
from chatpose_jax.train.validate import make_validation
from chatpose_jax.weights import folder as model_folder
from smpl_jax import io

VALIDATION_ROWS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose train``."""
    parser.add_argument(
        "--config",
        default="tiny",
        help="a name in configs/ (tiny, chatpose_7b, chatpose_13b) or a Python file with get_config()",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="run folder: checkpoints/, tensorboard/, metrics.jsonl, model/"
    )
    parser.add_argument(
        "--init",
        type=Path,
        help="model folder to start from (chatpose convert makes one); its architecture wins over the configuration's",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a setting: --set train.steps=100",
    )


def run(args: argparse.Namespace) -> int:
    """Train; exit status 0 when complete, 143 when stopped by a signal (the same command goes on)."""
    config = load_config(args.config, args.overrides)
    try:
        out = run_training(config, args.out, init=args.init)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 143
    print(f'model folder: {out}\nask it: chatpose chat {out} --prompt "Someone kneels. Can you give the SMPL pose?"')
    return 0


def run_training(
    config: RunConfig,
    out: Path,
    *,
    init: Path | None = None,
    data: Sequence[Example] | None = None,
    folder: Path | None = None,
) -> Path:
    """Data, weights, training, model folder; returns the latter. ``data`` replaces the training split that the
    configuration names, ``folder`` is where the model goes (``out/model``)."""
    if init is not None:
        config = adopt(config, init)
    model, settings = config.model, config.train
    if not model.scan_layers:
        raise UserError(
            "model.scan_layers must stay true in training: model folders hold stacked layers (chat unrolls them)"
        )
    processor = make_processor(config, init)
    size = model.vision.image_size
    rows = examples(config.data, "train", size) if data is None else data
    print("reading data ...", flush=True)
    loader = BatchLoader(
        rows,
        processor,
        settings.batch_size * settings.accumulate,
        max_length=settings.max_length,
        seed=settings.seed,
        buckets=config.data.buckets,
        cache=len(rows) <= 50_000,
        prefetch=2,
    )
    print(
        f"{len(rows)} rows; batches of {', '.join(f'{s.length} tokens × {s.images} images' for s in loader.shapes)}",
        flush=True,
    )
    validate = None
    if settings.eval_every:
        held_out = examples(config.data, "val", size)
        validate = make_validation(model, settings, validation_batches(held_out, processor, config), io.load_body())
    params = initial_params(config, init)
    params = train(model, settings, params, loader, out, evaluate=validate)
    folder = model_folder.save_folder(
        folder or out / "model",
        model,
        params,
        processor=processor,
        provenance={
            "trained": {"steps": settings.steps, "from": str(init) if init else "scratch", "data": config.data.source}
        },
        overwrite=True,
    )
    return folder


def validation_batches(rows: Sequence[Example], processor: Processor, config: RunConfig) -> dict[str, list[Any]]:
    """Finite batches of held-out rows with a pose, by kind."""
    groups: dict[str, list[Example]] = {}
    for index in range(len(rows)):
        row = rows[index]
        if len(row.poses) and len(groups.setdefault(row.kind, [])) < VALIDATION_ROWS:
            groups[row.kind].append(row)
        if len(groups) >= 2 and all(len(group) == VALIDATION_ROWS for group in groups.values()):
            break
    length = config.train.max_length
    return {
        kind: list(
            BatchLoader(group, processor, min(32, len(group)), max_length=length, shuffle=False, epochs=1, buckets=1)
        )
        for kind, group in groups.items()
    }


def adopt(config: RunConfig, init: Path) -> RunConfig:
    """The configuration with the towers and token ids of the model that it starts from."""
    import dataclasses

    base = model_folder.load_config(init)
    keep = config.model
    changes = {name: getattr(keep, name) for name in ("lora", "head", "dtype", "param_dtype", "scan_layers")}
    return dataclasses.replace(config, model=base.replace(**changes))


def make_processor(config: RunConfig, init: Path | None) -> Processor:
    """The processor of the model started from, or the embedded one of ``tiny``."""
    if init is not None:
        return Processor.load(init / model_folder.TOKENIZER, config.model)
    if config.model.text.vocab_size != preset("tiny").text.vocab_size:
        raise UserError(
            "this configuration needs weights to start from: give --init FOLDER, made by 'chatpose convert' from LLaVA-1.5; "
            "only the preset tiny trains from nothing"
        )
    return tiny_processor(config.model, config.data.template)


def initial_params(config: RunConfig, init: Path | None) -> Params:
    """Fresh parameters, or those of ``init`` with fresh adapters and head where it has none.

    Raises UserError when the folder holds adapters that this configuration has no place for, or parts do not fit.
    """
    key = jax.random.key(config.train.seed)
    if init is None:
        return create(config.model, key)
    base = model_folder.load_config(init)
    wanted, held = flatten(abstract_params(config.model)), flatten(abstract_params(base))
    if lost := sorted(path for path in set(held) - set(wanted) if not path.startswith("pose_head/")):
        raise UserError(
            f"{init} holds {lost[0]} ({len(lost)} such arrays), which this configuration would drop: "
            "set model.lora as the folder has it"
        )
    other_head = config.model.head != base.head
    fresh = sorted(path for path in wanted if path not in held or (other_head and path.startswith("pose_head/")))
    if wrong := [path for path in wanted if path not in fresh and held[path].shape != wanted[path].shape]:
        raise UserError(
            f"{init}: {wrong[0]} is {held[wrong[0]].shape}, this configuration needs {wanted[wrong[0]].shape}"
        )
    kept = {path: leaf for path, leaf in wanted.items() if path not in fresh}
    loaded = flatten(model_folder.load_params(init, unflatten({**held, **kept})))

    def make(key: jax.Array) -> dict[str, jax.Array]:
        everything = flatten(create(config.model, key))
        return {path: everything[path] for path in fresh}

    made = jax.jit(make)(key) if fresh else {}
    if fresh:
        print(f"starting from {init}; new: {', '.join(fresh)}", flush=True)
    return unflatten({path: made[path] if path in made else loaded[path] for path in wanted})


def cpu_workers() -> int:
    """Processes worth starting for work in pure Python."""
    return min(os.cpu_count() or 1, 8)

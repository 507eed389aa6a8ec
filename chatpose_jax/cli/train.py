"""``chatpose train``: a configuration, its data, and the trainer; leaves a model folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from chatpose_jax.cli.compiled import keep_compiled
from chatpose_jax.cli.config import RunConfig, load_config
from chatpose_jax.data.batches import BatchLoader, measure
from chatpose_jax.data.config import examples
from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.locks import Locked, only_writer
from chatpose_jax.models.chatpose import Params, abstract_params, attend_evenly, create
from chatpose_jax.models.config import ModelConfig, preset
from chatpose_jax.models.quantize import quantize_int8
from chatpose_jax.models.sharding import make_mesh, place, shardings
from chatpose_jax.planning.flops import train_cost
from chatpose_jax.planning.targets import CHIPS
from chatpose_jax.processing.processor import Processor, tiny_processor
from chatpose_jax.train import feed, hosts
from chatpose_jax.train.allocator import cpu_only, keep_freed_memory
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.trainable import Flat, assign, flatten, unflatten
from chatpose_jax.train.trainer import Interrupted, train
from chatpose_jax.train.validate import make_validation
from chatpose_jax.weights import folder as model_folder
from chatpose_jax.weights.processes import together
from smpl_jax import io

DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
}
"""How a ``device_kind`` begins -> a chip of ``planning.targets``; the first that fits counts."""
VALIDATION_ROWS = 128
VALIDATION_READ = 1024
"""Rows that are read to find those of each kind: a set may hold one kind alone, or one after the other."""
VALIDATION_BATCH = 32
VALIDATION_PICTURES = 4
"""Rows of each kind whose bodies are drawn at every validation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose train``."""
    parser.add_argument(
        "--config",
        default="tiny",
        help="a name in configs/ (tiny, the default; chatpose_7b, chatpose_13b) or a Python file with get_config()",
    )
    parser.add_argument(
        "--out", required=True, type=_folder, help="run folder: checkpoints/, tensorboard/, metrics.jsonl, model/"
    )
    parser.add_argument(
        "--init",
        type=Path,
        help="model folder to start from (chatpose convert makes one): its towers win over the configuration's; "
        "adapters and pose head are as model.lora and model.head say",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a setting: --set train.steps=100",
    )
    parser.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="trace this many steps into OUT/profile"
    )
    several = parser.add_argument_group(
        "several processes", "found by themselves on Cloud TPU, GKE and SLURM; anywhere else give all three to each"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")


def _folder(text: str) -> Path:
    if not text or "://" in text:
        raise argparse.ArgumentTypeError(
            f"expected a folder of a file system, found {text!r}; a bucket must be mounted (gcsfuse), where all processes see it"
        )
    return Path(text)


def run(args: argparse.Namespace) -> int:
    """Train; exit status 0 when complete, ``hosts.STOPPED`` (143) when stopped by a signal and ``hosts.LOST`` (75) when
    another process is gone (the same command goes on from either). Raises ``hosts.Fault`` (1) when the file system fails under it.
    """
    if cpu_only():
        keep_freed_memory()
    config = load_config(args.config, args.overrides)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: expected a folder, which is made where there is none")
    others = hosts.find(args.coordinator, args.num_processes, args.process_id)
    if others is None:
        keep_compiled()
    hosts.connect(others)
    try:
        with hosts.announced(ending), hosts.restartable(args.out, starting=True), hosts.together(args.out):
            out = run_training(config, args.out, init=args.init, profile=args.profile)
    except Interrupted as stop:
        if hosts.primary():
            print(f"\n{stop}", file=sys.stderr)
        return hosts.STOPPED
    hosts.say(
        f'model folder: {out}\nask it: chatpose chat {out} --prompt "Someone kneels. Can you give the SMPL pose?"'
    )
    return 0


def ending() -> str:
    """What a Ctrl-C is answered with where nothing is to be saved."""
    return "ending, as soon as what is being computed is done"


def run_training(
    config: RunConfig,
    out: Path,
    *,
    init: Path | None = None,
    data: Sequence[Example] | None = None,
    folder: Path | None = None,
    profile: int = 0,
) -> Path:
    """Data, weights, training, model folder; returns the latter. ``data`` replaces the training split that the
    configuration names, ``folder`` is where the model goes (``out/model``), ``profile`` counts steps to trace."""
    if init is not None:
        config = adopt(config, init)
    model = config.model
    if not model.scan_layers:
        raise UserError(
            "model.scan_layers must stay true in training: model folders hold stacked layers (chat unrolls them)"
        )
    demand_table(config)  # before anything is read
    with only_run(out):
        return _run(config, out, init, data, folder or out / "model", profile)


def _run(
    config: RunConfig, out: Path, init: Path | None, data: Sequence[Example] | None, folder: Path, profile: int
) -> Path:
    model, settings = config.model, config.train
    mesh = training_mesh(settings)
    rows = feed.local_rows(mesh, settings.batch_size, settings.accumulate)
    processor = make_processor(config, init)
    size = model.vision.image_size
    source = examples(config.data, "train", size) if data is None else data
    held_out = None
    if settings.eval_every:  # behind the training source: what is wrong with both is no matter of validation
        with validating(settings):
            held_out = validation_rows(examples(config.data, "val", size))
    hosts.say(f"reading the text of {len(source)} rows ...")
    loader = BatchLoader(
        source,
        processor,
        settings.batch_size * settings.accumulate,
        max_length=settings.max_length,
        seed=settings.seed,
        buckets=config.data.buckets,
        packing=config.data.packing,
        cache=0 if config.data.workers else config.data.cache_mib << 20,
        sizes=row_sizes(source, processor, settings.max_length),
        prefetch=2,
        threads=config.data.threads,
        workers=config.data.workers,
        rows=rows,
    )
    hosts.say(
        f"batches of {', '.join(f'{s.length} tokens × {s.images} images' for s in loader.shapes)}: "
        "the first step of each shape waits for its compilation"
    )
    validate = None
    if held_out is not None:
        whole = feed.row_shards(mesh) * -(-VALIDATION_BATCH // feed.row_shards(mesh))
        with validating(settings):
            batches = validation_batches(held_out, processor, config, whole, mesh)
        validate = make_validation(
            model, settings, batches, io.load_body(), mesh=mesh, rows=whole, pictures=VALIDATION_PICTURES
        )
    params = initial_params(config, init, mesh)
    params = train(
        model,
        settings,
        params,
        loader,
        out,
        mesh=mesh,
        evaluate=validate,
        flops=functools.partial(utilisation, model, settings),
        peak=peak_flops(jax.devices()[0].device_kind),
        profile=profile,
        result=folder,
    )
    with hosts.restartable(out):
        return model_folder.save_folder(
            folder,
            model,
            params,
            processor=processor,
            provenance={
                "trained": {
                    "steps": settings.steps,
                    "from": str(init) if init else "scratch",
                    "data": config.data.source,
                }
            },
            passengers=init,
            overwrite=True,
        )


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """While the block runs no other run may write ``out``: process 0 holds a lock, ``out/.lock``.

    Raises hosts.Fault where another run is there, which may end; UserError where nothing can be written.
    """
    with contextlib.ExitStack() as holding:
        held = ""
        with together():
            if hosts.primary():
                try:
                    holding.enter_context(only_writer(out, out / ".lock"))
                except Locked as other:
                    held = str(other)
        if hosts.gather(np.array([bool(held)])).any():
            raise hosts.Fault(held or f"{out}: another run is writing it, as process 0 says")
        yield


def demand_table(config: RunConfig) -> None:
    """Raises UserError where the model cannot be built, as by an unknown head, or the table of what trains does not fit it. Nothing is allocated."""
    assign(abstract_params(config.model), config.train.trainable)


def training_mesh(settings: TrainConfig) -> Mesh | None:
    """The mesh of the settings over the devices of all processes; None where that is one device."""
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    return mesh if mesh.size > 1 else None


def utilisation(model: ModelConfig, settings: TrainConfig, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Operations of a step on these rows: ``mfu`` counts what this run's gradient needs (with LoRA about 4 for each parameter
    and token), ``mfu_6n`` what it would need if everything trained.
    """
    pixels = batch.get("pixel_values")
    cost = _cost(model, settings, *batch["input_ids"].shape, 0 if pixels is None else pixels.shape[1])
    return {"mfu": cost.useful, "mfu_6n": cost.six_n}


_cost = functools.lru_cache(maxsize=64)(train_cost)


def peak_flops(device_kind: str) -> float | None:
    """Operations per second that the maker promises for a device as JAX names it; None for one that is not known, as any CPU."""
    name = next((chip for kind, chip in DEVICE_KINDS.items() if device_kind.startswith(kind)), None)
    return None if name is None else CHIPS[name].flops


def row_sizes(source: Sequence[Example], processor: Processor, max_length: int) -> np.ndarray:
    """(N, 3) tokens, pictures and poses of all rows, of which each process reads its share.

    Raises UserError for a malformed row, and where the processes see different data.
    """
    rank, count = jax.process_index(), jax.process_count()
    mine = range(rank, len(source), count)
    with together():  # one alone stumbles over a row of its own
        sizes = measure(source, processor, min(max_length, processor.ids.context), mine)
    if count == 1:
        return sizes
    totals = hosts.gather(np.array([len(source)]))
    if totals.min() != totals.max():
        raise UserError(
            f"the processes read different data: {totals.min()} rows and {totals.max()}; all must see the same"
        )
    share = hosts.gather(np.pad(sizes, [(0, -(-len(source) // count) - len(sizes)), (0, 0)]))
    return share.swapaxes(0, 1).reshape(-1, 3)[: len(source)]


@contextlib.contextmanager
def validating(settings: TrainConfig) -> Iterator[None]:
    """Around what reads held-out rows: errors say why these are read, and how to do without."""
    why = f"held-out rows are read for train.eval_every={settings.eval_every}; --set train.eval_every=0 trains without"
    try:
        yield
    except (UserError, OSError) as error:
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        raise UserError(f"{what}; {why}") from error
    except Exception as error:
        error.add_note(why)
        raise


def validation_rows(rows: Sequence[Example]) -> dict[str, list[Example]]:
    """Up to ``VALIDATION_ROWS`` held-out rows with a pose of each kind, among ``VALIDATION_READ`` from all over the set.

    Raises UserError where there is none.
    """
    groups: dict[str, list[Example]] = {}
    for index in np.unique(np.linspace(0, max(len(rows) - 1, 0), min(len(rows), VALIDATION_READ)).astype(int)):
        row = rows[int(index)]
        if len(row.poses) and len(groups.setdefault(row.kind, [])) < VALIDATION_ROWS:
            groups[row.kind].append(row)
    if not groups:
        raise UserError(f"no row with a pose among {min(len(rows), VALIDATION_READ)} of {len(rows)} held-out ones")
    return groups


def validation_batches(
    groups: Mapping[str, Sequence[Example]],
    processor: Processor,
    config: RunConfig,
    size: int = VALIDATION_BATCH,
    mesh: Mesh | None = None,
) -> dict[str, list[Any]]:
    """Finite batches of ``size`` held-out rows, by kind; on a mesh, this process's part of each."""
    length, mine = config.train.max_length, feed.local_rows(mesh, size)
    return {
        kind: list(
            BatchLoader(
                group,
                processor,
                min(size, len(group)) if mesh is None else size,
                max_length=length,
                shuffle=False,
                epochs=1,
                buckets=1,
                rows=mine,
            )
        )
        for kind, group in groups.items()
    }


def adopt(config: RunConfig, init: Path) -> RunConfig:
    """The configuration with the towers and token ids of the model that it starts from; in int8 where either is."""
    base = model_folder.load_config(init)
    keep = config.model
    changes = {
        name: getattr(keep, name) for name in ("lora", "head", "dtype", "param_dtype", "scan_layers", "attention")
    }
    if keep.quantize != "none":
        changes["quantize"] = keep.quantize
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


def initial_params(config: RunConfig, init: Path | None, mesh: Mesh | None = None) -> Params:
    """Fresh parameters, or those of ``init`` with fresh adapters and head where it has none; made or read onto the mesh, and then
    quantised where the configuration asks for it and ``init`` is not.

    Raises UserError when the folder holds adapters that this configuration has no place for, or parts do not fit.
    """
    key = jax.random.key(config.train.seed)
    if init is None:
        return attend_evenly(create(config.model, key, mesh))
    base = model_folder.load_config(init)
    model = config.model.replace(quantize=base.quantize)
    wanted, held = flatten(abstract_params(model)), flatten(abstract_params(base))
    if lost := sorted(path for path in set(held) - set(wanted) if not path.startswith("pose_head/")):
        raise UserError(
            f"{init} holds {lost[0]} ({len(lost)} such arrays), which this configuration would drop: "
            "set model.lora as the folder has it"
        )
    other_head = model.head != base.head
    fresh = sorted(path for path in wanted if path not in held or (other_head and path.startswith("pose_head/")))
    if wrong := [path for path in wanted if path not in fresh and held[path].shape != wanted[path].shape]:
        raise UserError(
            f"{init}: {wrong[0]} is {held[wrong[0]].shape}, this configuration needs {wanted[wrong[0]].shape}"
        )
    kept = {path: leaf for path, leaf in wanted.items() if path not in fresh}
    target = unflatten({**held, **kept})
    loaded = flatten(model_folder.load_params(init, target if mesh is None else place(target, mesh)))

    def make(key: jax.Array) -> dict[str, jax.Array]:
        everything = flatten(create(model, key))
        return {path: everything[path] for path in fresh}

    places = None if mesh is None else shardings({path: wanted[path] for path in fresh}, mesh)
    made = jax.jit(make, out_shardings=places)(key) if fresh else {}
    hosts.say(f"starting from {init}" + (f"; new: {', '.join(fresh)}" if fresh else ""))
    if other_head and any(path.startswith("pose_head/") for path in held):
        hosts.say(
            f"its pose head, {base.head}, is left behind for {model.head}: set model.head as the folder has it to go on from it"
        )
    whole = {path: made[path] if path in made else loaded.pop(path) for path in wanted}
    return unflatten(whole if config.model == model else to_int8(whole, config.model, mesh))


def to_int8(flat: Flat, model: ModelConfig, mesh: Mesh | None) -> Flat:
    """Arrays by path with the kernels that ``model`` keeps in int8 quantised where they lie, one after the other; empties ``flat``."""
    wanted = flatten(abstract_params(model))
    for path in [path for path, leaf in wanted.items() if leaf.dtype == np.int8]:
        pair = {name: wanted[name] for name in (path, f"{path}_scale")}
        places = None if mesh is None else tuple(shardings(pair, mesh).values())
        flat |= zip(pair, jax.jit(quantize_int8, out_shardings=places)(flat.pop(path)))
    return {path: flat.pop(path) for path in wanted}


def cpu_workers() -> int:
    """Processes worth starting for work in pure Python."""
    return min(os.cpu_count() or 1, 8)

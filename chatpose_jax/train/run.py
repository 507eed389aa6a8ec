"""A complete training run, from a configuration to a model folder. ``chatpose train`` is its command line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.config import Split
from chatpose_jax.data.example import Example
from chatpose_jax.data.sizes import known_sizes, measure_rows
from chatpose_jax.data.sources import NamedRows, check_sources, examples
from chatpose_jax.errors import UserError
from chatpose_jax.locks import Locked, only_writer
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.heads import head_family
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.processes import all_or_none
from chatpose_jax.processing.processor import Processor
from chatpose_jax.storage import Location, location
from chatpose_jax.train import feed, hosts
from chatpose_jax.train.chips import peak_flops
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.evaluators import Context, check_evaluators, make_evaluators
from chatpose_jax.train.flops import utilisation
from chatpose_jax.train.kept import not_kept
from chatpose_jax.train.layout import at_run_time
from chatpose_jax.train.pose_loss import demand_fields
from chatpose_jax.train.run_config import RunConfig
from chatpose_jax.train.start import adopt, initial_params, make_processor
from chatpose_jax.train.trainable import assign
from chatpose_jax.train.trainer import Callback, demand_best, train
from chatpose_jax.weights.save import save_folder


def run_training(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    init: str | os.PathLike[str] | None = None,
    data: Sequence[Example] | Mapping[Split, Sequence[Example]] | None = None,
    folder: str | os.PathLike[str] | None = None,
    profile: int = 0,
    progress: bool = True,
    callback: Callback | None = None,
    say: Callable[[str], None] = hosts.say,
) -> Location:
    """Train until ``train.steps`` and write the model. If ``out`` contains a run, it is resumed.

    The caller does what concerns the whole process: several processes call ``hosts.connect`` first, and on CPU
    ``allocator.keep_freed_memory()`` makes a run faster.

    Args:
        config: the configuration, from ``run_config.load_config``.
        out: run folder on a disk or a bucket ("gs://…", "s3://…"): ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``. Only one run at a time may
            write it.
        init: model folder to start from; None trains from scratch, which only the preset ``tiny`` can.
        data: rows to train on instead of the configured ones; or a table of such rows by split: "train", "val", "test".
        folder: the model folder to write, ``out/model`` by default.
        profile: number of steps to trace into ``out/profile``.
        progress: show a progress bar.
        callback: called in every process with (step, values) for each line of ``metrics.jsonl``. If it returns True, the run stops as after
            an interrupt.
        say: receives the lines that the run reports; by default they are printed.

    Returns:
        The model folder, for ``chatpose_jax.load``.

    Raises:
        Interrupted (``trainer``) after Ctrl-C, SIGTERM or a callback that returns True. Everything is saved, and the same call resumes.
        UserError for invalid settings, data or weights. hosts.Fault if another run is writing ``out``, or the file system fails.
    """
    out, init = location(out), None if init is None else location(init)
    if init is not None:
        config = adopt(config, init)
    if not config.model.scan_layers:
        raise UserError(
            "model.scan_layers must be true: it says how layers lie in model folders, where they are stacked; "
            "train.layers=unrolled lays them out one after another while the run trains"
        )
    demand_table(config)  # before anything is read
    check_sources(config.data)
    if config.train.eval_every:
        check_evaluators(config.train)
    given: Any = data if isinstance(data, Mapping) else {} if data is None else {"train": data}
    with only_run(out) as check:
        return _run(
            config, out, init, given, location(folder or out / "model"), profile, progress, callback, say, check
        )


def _run(
    config: RunConfig,
    out: Location,
    init: Location | None,
    given: Mapping[Split, Sequence[Example]],
    folder: Location,
    profile: int,
    progress: bool,
    callback: Callback | None,
    say: Callable[[str], None],
    check: Callable[[], None],
) -> Location:
    settings = config.train
    mesh = training_mesh(settings)
    model = at_run_time(config.model, settings, mesh)
    if model.dtype != config.model.dtype:
        say(f"computing in {model.dtype} instead of {config.model.dtype} (train.dtype={settings.dtype})")
    rows = feed.local_rows(mesh, settings.batch_size, settings.accumulate)
    processor = make_processor(config, init)
    size = model.image_size

    in_python = {
        split: rows if isinstance(rows, NamedRows) else NamedRows(rows, f"data[{split!r}]")
        for split, rows in given.items()
    }

    def rows_of(split: Split) -> Sequence[Example]:
        return in_python[split] if split in in_python else examples(config.data, split, size)

    source = rows_of("train")
    if not len(source):
        raise UserError(f"{source.where if isinstance(source, NamedRows) else 'data.sources'}: no training rows")
    evaluate = None
    if settings.eval_every:  # after the training source, so that an error of both sources does not blame validation
        with validating(settings):
            evaluate = make_evaluators(Context(dataclasses.replace(config, model=model), processor, mesh, rows_of, say))
        if evaluate.names is not None:
            demand_best(evaluate.names, settings.best)
    say(f"measuring {len(source)} rows ...")
    sizes = row_sizes(source, processor, settings.max_length)
    loader = BatchLoader(
        source,
        processor,
        settings.batch_size * settings.accumulate,
        max_length=settings.max_length,
        family=head_family(model.head),
        seed=settings.seed,
        buckets=config.data.buckets,
        packing=config.data.packing,
        cache=0 if config.data.workers else config.data.cache_mib << 20,
        sizes=sizes,
        prefetch=2,
        threads=config.data.threads,
        workers=config.data.workers,
        rows=rows,
    )
    say(
        f"batches of {', '.join(f'{s.length} tokens × {s.images} images' for s in loader.shapes)}: "
        "the first step of each shape includes its compilation"
    )
    params = initial_params(config, init, mesh, say)
    keep_states = False
    if model.leading_layers and settings.keep_states_mib:
        why = not_kept(model, settings, params, len(loader), int(sizes[:, 0].sum()))
        keep_states = why is None
        before = f"the states after the first {model.leading_layers} layers"
        say(f"{before} are kept for later epochs" if why is None else f"{before} are not kept: {why}")
    params = train(
        model,
        settings,
        params,
        loader,
        out,
        mesh=mesh,
        evaluate=evaluate,
        flops=utilisation(model, settings),
        peak=peak_flops(jax.devices()[0].device_kind),
        profile=profile,
        progress=progress,
        callback=callback,
        say=say,
        result=folder,
        keep_states=keep_states,
        check=check,
    )
    with hosts.restartable(out):
        return save_folder(
            folder,
            config.model,
            params,
            processor=processor,
            provenance={
                "trained": {
                    "steps": settings.steps,
                    "from": str(init) if init else "scratch",
                    "data": config.data.sources
                    if "train" not in in_python
                    else f"{len(source)} rows given in Python: {in_python['train'].where}",
                }
            },
            passengers=init,
            overwrite=True,
        )


@contextlib.contextmanager
def only_run(out: Location) -> Iterator[Callable[[], None]]:
    """Context manager: no other run may write ``out`` during the block. Process 0 holds the lock ``out/.lock``. Yields a function that raises
    hosts.Fault if another run has taken it over, as may happen on a bucket.

    Raises hosts.Fault if another run holds the lock (it may end), UserError if the folder cannot be written.
    """
    with contextlib.ExitStack() as holding:
        taken, lock = "", None
        with all_or_none():
            if hosts.primary():
                try:
                    lock = holding.enter_context(only_writer(out, out / ".lock"))
                except Locked as other:
                    taken = str(other)
        if hosts.all_gather(np.array([bool(taken)])).any():
            raise hosts.Fault(taken or f"{out}: another run is writing it, as process 0 says")

        def check() -> None:
            try:
                if lock is not None:
                    lock.check()
            except Locked as other:
                raise hosts.Fault(str(other)) from None

        yield check


def demand_table(config: RunConfig) -> None:
    """Raises UserError if the model cannot be built (as with an unknown head), or the table of what trains does not fit it. Allocates nothing."""
    assign(abstract_params(config.model), config.train.trainable)
    demand_fields(config.train.pose_loss, config.model.head)


def training_mesh(settings: TrainConfig) -> Mesh | None:
    """The configured mesh over the devices of all processes; None for a single device."""
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    return mesh if mesh.size > 1 else None


def row_sizes(source: Sequence[Example], processor: Processor, max_length: int) -> np.ndarray:
    """(N, 3) numbers of tokens, images and poses of all rows. Each process reads its share of the rows whose sizes the data set does not know.

    Raises UserError for a malformed row, or if the processes see different data.
    """
    rank, count = jax.process_index(), jax.process_count()
    max_length = min(max_length, processor.ids.context)
    with all_or_none():  # an error in one process must end all of them
        sizes = known_sizes(source, processor, max_length)
        unknown = np.flatnonzero(sizes[:, 0] < 0)
        found = measure_rows(source, processor, max_length, unknown[rank::count])
    if count > 1:
        words = zlib.crc32(sizes.tobytes()) & 0x7FFFFFFF  # JAX gathers 32 bits
        totals, contents = hosts.all_gather(np.array([len(source), words])).T
        if totals.min() != totals.max():
            raise UserError(f"the processes read different data: {totals.min()} rows and {totals.max()} rows")
        if contents.min() != contents.max():
            raise UserError("the processes read different data: their rows have different sizes")
        share = hosts.all_gather(np.pad(found, [(0, -(-len(unknown) // count) - len(found)), (0, 0)]))
        found = share.swapaxes(0, 1).reshape(-1, 3)[: len(unknown)]
    if unknown.size:
        sizes[unknown] = found
    return sizes


@contextlib.contextmanager
def validating(settings: TrainConfig) -> Iterator[None]:
    """Context manager around code that reads held-out rows: errors say why these rows are read, and when training without them helps."""
    why = (
        f"held-out rows are read for train.eval_every={settings.eval_every}; "
        "if the training rows are without this error, --set train.eval_every=0 trains on them"
    )
    try:
        yield
    except (UserError, OSError) as error:
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        raise UserError(f"{what}; {why}") from error
    except Exception as error:
        error.add_note(why)
        raise

"""The training loop: resume, step, log, save, stop cleanly; in one process or several."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, get_args

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from chatpose_jax.data.example import Kind
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.heads import RESERVED
from chatpose_jax.settings import did_you_mean
from chatpose_jax.storage import Location, copy_tree, is_bucket
from chatpose_jax.train import feed, hosts
from chatpose_jax.train import trainable as table
from chatpose_jax.train.checkpoints import Checkpoints
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.fingerprint import fingerprint
from chatpose_jax.train.head_start import head_start
from chatpose_jax.train.kept import KeptStates
from chatpose_jax.train.layout import lay_out, stacked
from chatpose_jax.train.log import Log
from chatpose_jax.train.step import TrainState, init_state, make_step
from chatpose_jax.train.telemetry import Meter

IGNORED_SETTINGS = (
    "steps", "log_every", "save_every", "eval_every", "evaluators", "keep", "best", "result", "wandb", "mesh", "layers", "keep_states_mib",
    "remat", "max_skipped", "attention", "dtype",
)  # fmt: skip
"""Settings that may change when a run resumes: the number of steps, intervals, devices and how they compute. A change of any other setting would make
it another run."""

AHEAD = 2
"""Steps that may be dispatched while the next one is prepared: enough to keep a device busy, few enough to time each step."""

PROFILE_AFTER = 3
"""Steps before a profile begins, so that it does not contain compilation."""


class Batches(Protocol):
    """An endless, resumable stream of batches of ``batch_size * accumulate`` rows (this process's rows of them)."""

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


Flops = Callable[[Mapping[str, np.ndarray]], Mapping[str, float]]
"""A batch -> floating-point operations of a step, by the name under which their fraction of the peak is logged."""

Evaluation = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Parameters, in the layout of the run -> scalars, and images as (H, W, 3) uint8 arrays, by name."""

Callback = Callable[[int, Mapping[str, Any]], bool | None]
"""(step, values of a line of the log) -> True to stop after the next step, as after an interrupt. Every process must return the same."""


class Interrupted(Exception):
    """Training was stopped; everything up to ``step`` is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; the same command or call resumes from there")
        self.step = step


def identity(model_config: ModelConfig, config: TrainConfig) -> dict[str, Any]:
    """The settings that must be the same when a run resumes, as JSON values."""
    model = model_config.replace(scan_layers=True)  # as in checkpoints, whatever the run does
    settings = {"model": model.to_json(), "train": dataclasses.asdict(config)}
    kept = {table: {k: v for k, v in values.items() if k not in IGNORED_SETTINGS} for table, values in settings.items()}
    return json.loads(json.dumps(kept))  # type: ignore[no-any-return]


def demand_same_run(out: Location, model_config: ModelConfig, config: TrainConfig, result: Location) -> None:
    """Raises UserError if ``out`` contains a run with other settings. ``train`` does the same, but only after it has read the data."""
    if (folder := out / "checkpoints").is_dir():
        settings = identity(model_config, config)
        with contextlib.closing(
            Checkpoints(folder, keep=config.keep, identity=settings, frozen={}, result=result)
        ) as held:
            if (step := held.latest()) is not None:
                held.demand_settings(step)


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    params: Mapping[str, Any],
    batches: Batches,
    out: Location,
    *,
    mesh: Mesh | None = None,
    evaluate: Evaluation | None = None,
    flops: Flops | None = None,
    peak: float | None = None,
    profile: int = 0,
    progress: bool = True,
    callback: Callback | None = None,
    say: Callable[[str], None] = hosts.say,
    result: Location | None = None,
    keep_states: bool = False,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train until ``config.steps`` and return the parameters, layers stacked.

    ``out`` contains ``checkpoints/``, ``metrics.jsonl`` (in parts on a store, see ``log``) and ``tensorboard/``.

    If ``out`` contains a checkpoint, the run resumes from it instead of ``params``, on any mesh and with any number of processes. The first
    interrupt or SIGTERM saves and raises ``Interrupted``.

    Args:
        model_config: ``scan_layers`` says how layers lie while the run trains.
        params: initial parameters, placed on the mesh, layers stacked. Trainable arrays are donated to the first step. Frozen ones are used as they
            are, or freed one after the other as their layers are unrolled.
        batches: gives the rows ``feed.local_rows(mesh, …)`` of each global batch.
        mesh: the devices of all processes; None is the first device of this process.
        evaluate: called with the parameters every ``eval_every`` steps; its scalars and images are logged.
        flops: counts the operations of a step. Their fraction of ``peak``, the operations per second of a device, is logged.
        profile: number of steps to trace into ``out/profile``.
        progress: show a progress bar, in process 0.
        callback: called with every line of the log as soon as it exists, a step or two after the step that it describes.
        say: receives the lines that the run reports.
        result: the folder where the caller writes the model, for error messages; ``out/model`` by default.
        keep_states: compute the states of the leading layers once for each conversation, see ``kept.not_kept``.
        check: called before each save; raises if ``out`` belongs to another run meanwhile.

    Raises:
        Interrupted; ``hosts.Fault`` if the file system fails; UserError if loss or gradient were not finite for more than
        ``config.max_skipped`` steps in a row.
    """
    if not is_bucket(out):  # where there are no folders
        out.mkdir(parents=True, exist_ok=True)
    hosts.meet("train")
    say(table.describe_trainable(params, config.trainable))
    if config.result == "best" and not config.eval_every:
        say("train.result=best needs validation, but train.eval_every=0: the result will be the last step")
    state, frozen = init_state(config, params, mesh)
    settings = identity(model_config, config)
    checkpoints = Checkpoints(
        out / "checkpoints",
        keep=config.keep,
        identity=settings,
        frozen=fingerprint(frozen),
        result=result or out / "model",
    )
    if checkpoints.latest() is not None:
        state, position = checkpoints.restore(state)
        if int(state.step) > config.steps:
            raise UserError(
                f"{out} contains a run at step {int(state.step)}, beyond train.steps={config.steps}: choose another folder, or raise train.steps"
            )
        batches.restore(position)
        say(f"resuming from step {int(state.step)} in {out}")
    first, begun = int(state.step), checkpoints.latest() is not None
    frozen = lay_out(frozen, model_config, consume=True)
    if config.head_start.steps and not begun:
        position = batches.state()
        start = head_start(model_config, config, state.trainable, frozen, batches, mesh, progress=progress)
        state = dataclasses.replace(state, trainable=start)
        batches.restore(position)
    log = Log(out, first, config.wandb, settings, say, check)
    bar = tqdm(
        total=config.steps,
        initial=first,
        unit="step",
        disable=not (progress and hosts.primary()),
        dynamic_ncols=True,
        mininterval=1.0 if sys.stderr.isatty() else 30.0,
    )
    kept = KeptStates(model_config, config, frozen, mesh) if keep_states else None
    step_fn = make_step(model_config, config, params, mesh)
    loop = _Loop(
        model_config, config, mesh, kept, frozen, step_fn, batches, checkpoints, log, bar,
        evaluate, flops, peak, profile, out, callback, say,
    )  # fmt: skip
    with hosts.restartable(out), contextlib.ExitStack() as closing:
        for thing in (checkpoints, log, bar):
            closing.callback(thing.close)
        with hosts.together(out), hosts.Stop().listen() as stop:
            state = loop.run(state, stop)
        bar.close()  # before more is said
        complete = int(state.step) == config.steps
        if complete and config.result == "best" and config.eval_every:
            if (best := checkpoints.best()) is None:
                say(
                    f"train.result=best, but no validation of this run gave val_…_{config.best} (train.best, train.eval_every={config.eval_every}): "
                    "the result is the last step"
                )
            else:
                state, _ = checkpoints.restore(state, best)
                say(f"the result is the checkpoint of step {best}, the best by {config.best}")
    if not complete:
        raise Interrupted(int(state.step))
    return table.merge(state.trainable, stacked(frozen, model_config, consume=True))


@dataclasses.dataclass
class _Loop:
    """What does not change from step to step."""

    model_config: ModelConfig
    config: TrainConfig
    mesh: Mesh | None
    kept: KeptStates | None
    frozen: table.Flat
    step_fn: Any
    batches: Batches
    checkpoints: Checkpoints
    log: Log
    bar: tqdm
    evaluate: Evaluation | None
    flops: Flops | None
    peak: float | None
    profile: int
    out: Location
    callback: Callback | None
    say: Callable[[str], None]
    traces: str = ""

    @functools.cached_property
    def rates(self) -> dict[str, float]:
        return table.rates(self.config.trainable)

    def run(self, state: TrainState, stop: hosts.Stop) -> TrainState:
        config, meter = self.config, Meter(self.peak)
        under_way: collections.deque[tuple[int, Mapping[str, jax.Array], tuple[Any, ...]]] = collections.deque()
        stream = iter(self.batches)
        first = int(state.step)
        for step in range(first + 1, config.steps + 1):
            with meter.waiting():
                batch = next(stream)
            self._trace(step - first, state)
            if self.kept is not None:
                batch = self.kept(batch)
            placed = feed.put(batch, self.mesh, config.batch_size, config.accumulate)
            state, metrics = self.step_fn(state, self.frozen, placed)
            under_way.append((step, metrics, self._sizes(batch)))
            self.bar.update()
            last = stop.after(step) or step == config.steps
            logs, saves = (step % every == 0 or last for every in (config.log_every, config.save_every))
            evaluates = config.eval_every and (step % config.eval_every == 0 or step == config.steps)
            while len(under_way) > (0 if logs or saves or evaluates else AHEAD):
                self._arrived(*under_way.popleft(), meter, stop, chart=logs and not under_way)
            metric, values = None, dict[str, float]()
            if self.evaluate is not None and evaluates:
                found = self.evaluate(table.merge(lay_out(state.trainable, self.model_config), self.frozen))
                self._tell(step, found, stop)
                values = {name: value for name, value in found.items() if not isinstance(value, np.ndarray)}
                metric = best_metric(values, config.best)
            lost = values and config.best and metric is None
            if saves or lost:
                self.log.flush()
                self.checkpoints.save(state, self.batches.state(), metric)
            if lost:
                self.checkpoints.wait()
                demand_best(values, config.best)
            if saves or evaluates:
                meter.restart()
            if last:
                self._trace(step - first + 1, state, over=True)
                break
        self.checkpoints.wait()
        return state

    def _arrived(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        sizes: tuple[Any, ...],
        meter: Meter,
        stop: hosts.Stop,
        *,
        chart: bool,
    ) -> None:
        """Waits for a step and logs it. Raises UserError if too many updates in a row were dropped."""
        scalars = {name: shortest(value) for name, value in jax.device_get(metrics).items()}
        base = np.float32(scalars["learning_rate"])
        scalars |= {f"learning_rate_{row}": shortest(base * np.float32(lr)) for row, lr in self.rates.items()}
        meter.done(*sizes)
        speed = meter.report() if chart else {}
        self._tell(step, {**scalars, **speed}, stop, chart=chart)
        check_skipped(scalars, step, self.config.max_skipped, self.checkpoints.latest())
        if chart:
            parts = [name for name in metrics if name not in RESERVED]  # of the pose head's loss
            shown = {name: f"{scalars[name]:.3f}" for name in ("text", *parts)}
            shown |= {name: f"{speed[name]:.1%}" for name in ("mfu", "mfu_6n") if name in speed}
            if scalars["skipped"]:
                shown["skipped"] = f"{scalars['skipped']}"
            self.bar.set_postfix(shown, refresh=False)

    def _tell(self, step: int, values: Mapping[str, Any], stop: hosts.Stop, *, chart: bool = True) -> None:
        self.log(step, values, chart=chart)
        if self.callback is not None and self.callback(step, values):
            stop.asked = True

    def _sizes(self, batch: Mapping[str, Any]) -> tuple[int, int, Mapping[str, float]]:
        """Rows, tokens and operations of the global batch, estimated from this process's share."""
        config = self.config
        rows = config.batch_size * config.accumulate
        share = rows / len(batch["input_ids"])
        tokens = int(np.count_nonzero(batch["attention_mask"]) * share)
        flops = self.flops(batch) if self.flops is not None and self.peak is not None else {}
        return rows, tokens, {name: share * value for name, value in flops.items()}

    def _trace(self, number: int, state: TrainState, *, over: bool = False) -> None:
        """Begins and ends the profile. number: the number of this process's next step. over: there is no next step."""
        traced, profile = number - PROFILE_AFTER, self.out / "profile"
        if self.profile and traced == 0 and not over:
            self.traces = tempfile.mkdtemp() if is_bucket(profile) else str(profile)  # JAX writes to a disk only
            jax.profiler.start_trace(self.traces)
        if traced == self.profile > 0 or (over and 0 < traced < self.profile):
            jax.block_until_ready(state.step)
            jax.profiler.stop_trace()
            if is_bucket(profile):
                copy_tree(Path(self.traces), profile)
                shutil.rmtree(self.traces)
            self.say(f"a profile of {traced} steps is in {profile}: open it with xprof or Perfetto")
        elif over and self.profile and traced <= 0:
            self.say(
                f"no profile: it begins with step {PROFILE_AFTER}, after compilation, and this run took {number - 1}"
            )


def shortest(value: Any) -> float | int:
    """A float32 as the shortest decimal that reads back as the same float32; an integer as it is."""
    return int(value) if np.issubdtype(value.dtype, np.integer) else float(str(np.float32(value)))


def best_metric(values: Mapping[str, Any], name: str) -> float | None:
    """The value ``val_{name}``; or the mean of ``val_{kind}_{name}`` over the kinds of held-out rows; or None if there is neither."""
    keys = best_keys(values, name)
    return float(np.mean([values[key] for key in keys])) if keys else None


def best_keys(names: Collection[str], best: str) -> list[str]:
    """The names that ``train.best`` refers to."""
    if (key := f"val_{best}") in names:
        return [key]
    return [key for kind in get_args(Kind) if (key := f"val_{kind}_{best}") in names]


def demand_best(names: Collection[str], best: str) -> None:
    """Raises UserError if no evaluator gives the value ``train.best``."""
    if best and names and not best_keys(names, best):
        known = sorted({re.sub(rf"^val_(({'|'.join(get_args(Kind))})_)?", "", name) for name in names})
        raise UserError(
            f"train.best={best!r}: no evaluator gives it{did_you_mean(best, known)}; they give {', '.join(known)}; '' keeps no best checkpoint"
        )


def check_skipped(scalars: Mapping[str, float], step: int, limit: int, latest: int | None) -> None:
    """Raises UserError if more than ``limit`` updates in a row were dropped because loss or gradient was not finite."""
    if (row := scalars["skipped_in_a_row"]) <= limit:
        return
    name = "loss" if not math.isfinite(scalars["loss"]) else "grad_norm"
    kept = "nothing is saved yet" if latest is None else f"the last checkpoint is step {latest}"
    raise UserError(
        f"the {name} is {scalars[name]} at step {step}, and {row} updates in a row were dropped because loss or gradient was not finite "
        f"(train.max_skipped={limit}); {kept}: lower train.learning_rate or look at the data"
    )

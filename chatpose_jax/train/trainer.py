"""The training loop: resume, step, log, save, stop cleanly."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.train import trainable as table
from chatpose_jax.train.checkpoints import Checkpoints
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.step import TrainState, init_state, make_step

CADENCE = ("steps", "log_every", "save_every", "eval_every", "keep", "mesh", "max_skipped")
"""Settings that a resumed run may change: how long, how often, on which devices. Any other would make another run of it."""


class Batches(Protocol):
    """An endless, resumable stream of batches of ``batch_size * accumulate`` rows."""

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Interrupted(Exception):
    """Training was asked to stop; everything up to ``step`` is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.step = step


class Log:
    """Scalars to ``metrics.jsonl`` and TensorBoard. After a resume the lines of lost steps are dropped."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept))
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def __call__(self, step: int, scalars: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the run was killed while it wrote this line
        return math.inf


def _micro_batches(batch: Mapping[str, np.ndarray], accumulate: int) -> dict[str, np.ndarray]:
    if accumulate == 1:
        return dict(batch)
    return {name: x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:]) for name, x in batch.items()}


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    params: Mapping[str, Any],
    batches: Batches,
    out: Path,
    *,
    evaluate: Callable[[dict[str, Any]], Mapping[str, float]] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train until ``config.steps`` and return the parameters. ``out`` holds ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``.

    A checkpoint in ``out`` wins over ``params``: the same command resumes. The first interrupt or SIGTERM saves and raises ``Interrupted``.

    Args:
        params: where to start. Trainable arrays are consumed (donated to the first step), frozen ones used as they are.
        evaluate: called with the parameters every ``eval_every`` steps; its scalars are logged.

    Raises:
        Interrupted, or UserError when the loss is not finite.
    """
    out.mkdir(parents=True, exist_ok=True)
    print(table.describe(params, config.trainable), flush=True)
    state, frozen = init_state(config, params)
    identity = {
        "model": model_config.to_json(),
        "train": {k: v for k, v in dataclasses.asdict(config).items() if k not in CADENCE},
    }
    checkpoints = Checkpoints(out / "checkpoints", keep=config.keep, identity=json.loads(json.dumps(identity)))
    if checkpoints.latest() is not None:
        state, position = checkpoints.restore(state)
        if int(state.step) > config.steps:
            raise UserError(
                f"{out} holds a run at step {int(state.step)}, beyond train.steps={config.steps}: choose another folder, or raise it"
            )
        batches.restore(position)
        print(f"resuming from step {int(state.step)} in {out}", flush=True)
    step_fn = make_step(model_config, config, params)
    first = int(state.step)
    log = Log(out, first)
    stopping: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        if stopping:
            raise KeyboardInterrupt
        stopping.append(signum)

    main = _set_handlers(stop)
    bar = tqdm(
        total=config.steps, initial=first, unit="step", disable=not progress, dynamic_ncols=True, mininterval=1.0
    )
    try:
        stream = iter(batches)
        state = _loop(config, state, frozen, step_fn, stream, batches, checkpoints, log, bar, stopping, evaluate)
    finally:
        bar.close()
        log.close()
        checkpoints.close()
        for signum, handler in main.items():
            signal.signal(signum, handler)
    if stopping and int(state.step) < config.steps:
        raise Interrupted(int(state.step))
    return table.merge(state.trainable, frozen)


def _check_finite(scalars: Mapping[str, float], step: int, latest: int | None) -> None:
    """Raises UserError before a spoilt state is saved: a gradient may be spoilt while the loss still looks well."""
    if spoilt := [name for name in ("loss", "grad_norm") if not math.isfinite(scalars[name])]:
        kept = "nothing is saved yet" if latest is None else f"the last checkpoint is step {latest}"
        raise UserError(
            f"the {spoilt[0]} is {scalars[spoilt[0]]} at step {step}; {kept}: lower train.learning_rate or look at the data"
        )


def _set_handlers(stop: Callable[[int, Any], None]) -> dict[int, Any]:
    try:
        return {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever owns it handles signals
        return {}


def _loop(
    config: TrainConfig,
    state: TrainState,
    frozen: table.Flat,
    step_fn: Any,
    stream: Iterator[Mapping[str, np.ndarray]],
    batches: Batches,
    checkpoints: Checkpoints,
    log: Log,
    bar: tqdm,
    stopping: list[int],
    evaluate: Callable[[dict[str, Any]], Mapping[str, float]] | None,
) -> TrainState:
    rows, since = 0, time.perf_counter()
    for step in range(int(state.step) + 1, config.steps + 1):
        batch = next(stream)
        rows += len(batch["input_ids"])
        state, metrics = step_fn(state, frozen, _micro_batches(batch, config.accumulate))
        bar.update()
        last = step == config.steps or bool(stopping)
        logs, saves = (step % every == 0 or last for every in (config.log_every, config.save_every))
        if logs or saves:
            scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
            _check_finite(scalars, step, checkpoints.latest())
        if logs:
            now = time.perf_counter()
            scalars["samples_per_second"], rows, since = rows / (now - since), 0, now
            log(step, scalars)
            bar.set_postfix(
                {name: f"{scalars[name]:.3f}" for name in ("text", "pose_body", "pose_root")}, refresh=False
            )
        if evaluate is not None and config.eval_every and (step % config.eval_every == 0 or step == config.steps):
            log(step, dict(evaluate(table.merge(state.trainable, frozen))))
            since = time.perf_counter()
        if saves:
            checkpoints.save(state, batches.state())
        if last:
            break
    checkpoints.wait()
    return state

"""The log of a run: a line for each step, and charts for TensorBoard and Weights & Biases.

On a disk the lines are appended to ``metrics.jsonl``. An object of a store cannot grow, so there each save writes the lines since the last one as an
object of their own, ``metrics-<first step>.jsonl``. A folder that was copied between the two may hold both; ``read_metrics`` reads either.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.storage import Location, is_bucket, write_bytes
from chatpose_jax.train import hosts

METRICS = "metrics.jsonl"
_PART = re.compile(r"metrics-(\d+)\.jsonl")


def read_metrics(folder: Location) -> list[dict[str, Any]]:
    """The lines of a run's log, in the order of their steps: values by name, with ``step``. A last line that a kill cut off is left out."""
    lines = [line for file in _files(folder) for line in file.read_bytes().splitlines(keepends=True)]
    return sorted((json.loads(line) for line in lines if line.endswith(b"\n")), key=lambda values: values["step"])


class Log:
    """One line for each step, with its losses to the last bit; and, less often, TensorBoard and Weights & Biases (if configured). When a run resumes,
    the lines of lost steps are removed. Only process 0 writes.
    """

    def __init__(
        self,
        folder: Location,
        step: int,
        wandb: str = "",
        settings: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = hosts.say,
        check: Callable[[], None] = lambda: None,
    ):
        """step: that of the checkpoint from which the run goes on, or 0. check: called before a store is written; raises if the folder belongs to
        another run meanwhile.
        """
        self.folder, self.first, self.check = folder, step, check
        self.lines: _File | _Parts | None = None
        self.charts: Charts | None = None
        self.run: Any = None
        if not hosts.primary():
            return
        _forget(folder, step, say)
        self.lines = _Parts(folder) if is_bucket(folder) else _File(Path(folder) / METRICS)
        if wandb:
            self.run = _wandb_run(wandb, folder, settings or {})

    def __call__(self, step: int, values: Mapping[str, Any], *, chart: bool = True) -> None:
        """Logs scalars, and images (arrays). chart: also to TensorBoard, which does not get every step."""
        if self.lines is None:
            return
        scalars = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
        self.lines.write(step, json.dumps({"step": step, **scalars}) + "\n")
        if not chart:
            return
        if self.charts is None:  # the import takes seconds if PyTorch is installed
            self.charts = Charts(self.folder / "tensorboard", self.first)
        self.charts.write(step, values)
        if self.run is not None:
            from wandb import Image

            self.run.log({n: Image(v) if isinstance(v, np.ndarray) else v for n, v in values.items()}, step=step)

    def flush(self) -> None:
        """Writes all lines to the disk or the store, so that a checkpoint never has a step that the log lacks."""
        self.check()
        for part in (self.lines, self.charts):
            if part is not None:
                part.flush()

    def close(self) -> None:
        self.check()
        for part in (self.lines, self.charts):
            if part is not None:
                part.close()
        if self.run is not None:
            self.run.finish()


class _File:
    """Lines appended to a file. Each is there as soon as it is written."""

    def __init__(self, path: Path):
        self._file = path.open("a", buffering=1)

    def write(self, step: int, line: str) -> None:
        self._file.write(line)

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Parts:
    """Lines kept in memory until they are written as one object, named after the step of the first."""

    def __init__(self, folder: Location):
        self._folder, self._lines, self._first = folder, list[str](), 0

    def write(self, step: int, line: str) -> None:
        if not self._lines:
            self._first = step
        self._lines.append(line)

    def flush(self) -> None:
        if self._lines:
            write_bytes(self._folder / f"metrics-{self._first:08d}.jsonl", "".join(self._lines))
            self._lines.clear()

    close = flush


class Charts:
    """Files of TensorBoard's events. Of earlier files TensorBoard hides the steps after ``first``, which were lost. On a store each ``flush`` ends a
    file and uploads it as a whole.

    tensorboardX's SummaryWriter writes in a thread of its own. On a full disk that thread ends, and then the run would wait for it without end.
    """

    def __init__(self, folder: Location, first: int):
        from tensorboardX import event_file_writer, proto, summary

        self._event, self._summary, self._open = proto.event_pb2.Event, summary, event_file_writer.EventsWriter
        self._folder = folder
        self._local = tempfile.TemporaryDirectory() if is_bucket(folder) else None
        self._parts = itertools.count(1)
        self._file: Any = None
        if first:
            begins = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
            self._write(self._event(wall_time=time.time(), step=first + 1, session_log=begins))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Scalars, and images as (H, W, 3) uint8 arrays. Raises OSError if the file system fails."""
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                drawn = self._summary.image(name, value, dataformats="HWC")
            else:
                drawn = self._summary.scalar(name, value)
            self._write(self._event(wall_time=time.time(), step=step, summary=drawn))
        self._file.flush()

    def _write(self, event: Any) -> None:
        if self._file is None:
            folder = Path(self._folder if self._local is None else self._local.name)
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open(str(folder / "events"))
        self._file.write_event(event)

    def flush(self) -> None:
        if self._local is None or self._file is None:
            return
        self._file.close()
        self._file = None
        (written,) = Path(self._local.name).iterdir()
        write_bytes(self._folder / f"{written.name}.{next(self._parts):06d}", written.read_bytes())
        written.unlink()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._local is not None:
            self._local.cleanup()


def _files(folder: Location) -> list[Location]:
    """``metrics.jsonl``, if there is one, and the parts of a log on a store by their first steps."""
    parts = sorted(
        (int(found[1]), file) for file in folder.glob("metrics-*.jsonl") if (found := _PART.fullmatch(file.name))
    )
    whole = folder / METRICS
    return [whole] * whole.exists() + [file for _, file in parts]


def _forget(folder: Location, step: int, say: Callable[[str], None]) -> None:
    """Removes the lines of lost steps: those after ``step``."""
    files = _files(folder)
    while files and (found := _PART.fullmatch(files[-1].name)) and int(found[1]) > step:
        files.pop().unlink()
    for path in (
        {files[0], files[-1]} if files else ()
    ):  # parts are written at saves: none before the last holds lost steps
        length, garbage = _length_up_to(path, step)
        if garbage:
            say(
                f"{path}: line {garbage} is not a valid line; a copy is kept as {_set_aside(path)}, and the log goes on from there"
            )
        if is_bucket(path):
            if len(held := path.read_bytes()) > length:
                write_bytes(path, held[:length])
        else:
            os.truncate(path, length)  # atomic: a kill loses none of the lines to keep


def _length_up_to(path: Location, step: int) -> tuple[int, int]:
    """The length in bytes of the lines up to a step. After these there may be lines of lost steps, and a line that a kill cut off. Also returns
    the number of the first line that is invalid in any other way, or 0.
    """
    length = lost = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                at = json.loads(line)["step"]
                lost += at > step
            except (ValueError, TypeError, KeyError):
                return length, number
            length += 0 if lost else len(line)
    return length, 0


def _set_aside(path: Location) -> Location:
    """Copies the file to an unused name."""
    copy = next(name for n in itertools.count(1) if not (name := path.with_name(f"{path.name}.damaged-{n}")).exists())
    write_bytes(copy, path.read_bytes())
    return copy


def _wandb_run(project: str, folder: Location, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("train.wandb is set, but wandb is not installed: pip install wandb") from None
    local = None if is_bucket(folder) else str(folder)  # wandb's own choice: ./wandb
    return wandb.init(
        project=project, name=folder.name, id=folder.name, dir=local, config=dict(settings), resume="allow"
    )

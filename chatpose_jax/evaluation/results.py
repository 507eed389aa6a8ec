"""The files of an evaluation: what was scored, what is drawn, and what was not run. The report is made from these alone.

``OUT/TASK/DATA/SYSTEM`` holds ``scores.json`` and, where answers are drawn, ``gallery.json`` and its images. ``OUT/not_run.json`` lists what was
left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from chatpose_jax.data.readers.untrusted import read_json
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.scores import Scores
from chatpose_jax.settings import check_types, one_line
from smpl_jax._files import write_whole

SCORES, GALLERY, NOT_RUN = "scores.json", "gallery.json", "not_run.json"


@dataclasses.dataclass(frozen=True)
class DrawnAnswer:
    """An answer that is drawn.

    table: of ``Scores``. place: "best", "median" or "worst". key: id of the row. measure, value, unit: by which it was chosen. question, answer:
    words, "" if there are none. image: file in the system's folder, "" for none.
    """

    table: str
    place: str
    key: str
    measure: str
    value: float
    unit: str
    question: str
    answer: str
    image: str

    __repr__ = one_line


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What one system reached on one data set in one task.

    folder: of its files. command: makes the row again. scores: one for each table. shown: its answers that are drawn.
    note: what a reader should know of the system, in words.
    """

    task: str
    data: str
    system: str
    folder: Path
    command: str
    scores: tuple[Scores, ...]
    shown: tuple[DrawnAnswer, ...] = ()
    note: str = ""

    __repr__ = one_line


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A task that was requested and could not run. why: the reason, in words. command: makes it run; "" if there is none."""

    task: str
    data: str
    why: str
    command: str = ""

    __repr__ = one_line


def write_drawn(folder: Path, shown: Sequence[DrawnAnswer]) -> Path:
    """Writes ``gallery.json`` of a system's folder."""
    return write_json(folder / GALLERY, [dataclasses.asdict(each) for each in shown])


def write_not_run(out: Path, tasks: Sequence[NotRun]) -> Path:
    """Writes ``not_run.json``. An empty list says that nothing was left out."""
    return write_json(out / NOT_RUN, [dataclasses.asdict(each) for each in tasks])


def read_results(out: Path) -> list[Result]:
    """All results below a folder, by task, data set and system. Raises UserError for a file that is damaged."""
    found = [_read(path) for path in sorted(out.glob(f"*/*/*/{SCORES}"))]
    return sorted(found, key=lambda each: (each.task, each.data, each.system))


def read_not_run(out: Path) -> list[NotRun]:
    """What ``write_not_run`` wrote, none if there is no such file. Raises UserError for a damaged file."""
    path = out / NOT_RUN
    try:
        return [_typed(NotRun(**each)) for each in read_json(path)] if path.is_file() else []
    except (TypeError, UserError) as error:
        raise _damaged(path, error) from None


def _read(path: Path) -> Result:
    found, drawn = read_json(path), path.with_name(GALLERY)
    places = dict(zip(("task", "data", "system"), path.parent.parts[-3:]))
    try:
        scores = tuple(Scores.from_json(each) for each in found["scores"])
        task, data, system = (str(found.get(name, place)) for name, place in places.items())
        command, note = (str(found.get(name, "")) for name in ("command", "note"))
    except (KeyError, TypeError, AttributeError, ValueError, UserError) as error:
        raise _damaged(path, error) from None
    return Result(task, data, system, path.parent, command, scores, _shown(drawn), note)


def _shown(path: Path) -> tuple[DrawnAnswer, ...]:
    """The drawn answers of a system. An image elsewhere than beside them is refused: the page would hold a file that is not of the evaluation."""
    try:
        shown = tuple(_typed(DrawnAnswer(**each)) for each in read_json(path)) if path.is_file() else ()
    except (TypeError, UserError) as error:
        raise _damaged(path, error) from None
    for each in shown:
        if PurePosixPath(each.image).is_absolute() or ".." in PurePosixPath(each.image).parts:
            raise UserError(f"{path}: the image {each.image!r:.200} does not lie in the folder of the system")
    return shown


def _typed(found: Any) -> Any:
    check_types(found, type(found).__name__)
    return found


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: expected what chatpose eval writes ({type(error).__name__}: {error}); delete it and run the command again"
    )


def write_json(path: Path, value: Any) -> Path:
    """Writes plain values, always as the same bytes."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return write_whole(path, lambda file: file.write(text.encode()))

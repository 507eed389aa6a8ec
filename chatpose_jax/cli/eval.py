"""``chatpose eval``: systems answer the questions of a task; writes tables with the conditions of each figure, and the command that made it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from chatpose_jax import named
from chatpose_jax.cli.compiled import keep_compiled
from chatpose_jax.cli.data_prepare import options_of
from chatpose_jax.data.config import Split
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import ask, subset
from chatpose_jax.evaluation.gallery import write_gallery
from chatpose_jax.evaluation.report import write_report
from chatpose_jax.evaluation.results import GALLERY, NotRun, write_not_run
from chatpose_jax.evaluation.scores import Scores, Value
from chatpose_jax.evaluation.spec import Spec, data_name, demand_unique, make_system, open_rows
from chatpose_jax.evaluation.suite import ANY_ROWS, SUITE, folder_of
from chatpose_jax.evaluation.system import SYSTEMS, Question, System
from chatpose_jax.evaluation.systems.predictions import MISSING
from chatpose_jax.evaluation.task import TASKS, Task
from chatpose_jax.processes import all_or_none
from chatpose_jax.settings import one_line, whole
from chatpose_jax.train import hosts
from chatpose_jax.train.allocator import cpu_only, keep_freed_memory
from smpl_jax import load_body
from smpl_jax._files import write_whole
from smpl_jax.errors import BodyFileError, PoseFileError

ALL, REPORT = "all", "report"
SUBSET = "subset.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose eval``."""
    parser.add_argument(
        "task",
        metavar="TASK",
        help=f"{', '.join(TASKS)}; package.module:Class of your own; {ALL}: the tables of the paper; {REPORT}: write the report of a folder again",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="model folder, or the run folder that holds it: the same as --system chatpose,model=MODEL",
    )
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="SPEC",
        help=f"NAME,option=value,…: {', '.join(SYSTEMS)}, or package.module:Class; may be repeated",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SPEC",
        help="NAME,option=value,…: a source of data.sources; may be repeated; by default that of the paper",
    )
    parser.add_argument("--out", type=Path, help="folder for answers, scores and the report")
    parser.add_argument(
        "--split", choices=(*get_args(Split), ALL), default="test", help="default: test; all: the rows of all splits"
    )
    parser.add_argument(
        "--subset",
        metavar="N|FILE",
        help="N rows, chosen by the hashes of their ids; or the rows whose ids a file lists, one per line",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        dest="options",
        help=f"an option of the task; with {ALL!r}: TASK.OPTION=VALUE; may be repeated",
    )
    parser.add_argument(
        "--body", help="SMPL, SMPL-H or SMPL-X file (.npz or .pkl) for tasks and models; default: that of the package"
    )
    parser.add_argument(
        "--drawings",
        type=int,
        default=2,
        metavar="N",
        help="draw the N best, N median and N worst answers of a table; default: 2",
    )
    parser.add_argument("--root", default="data", help="folder of the prepared data sets; default: data")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no tables")
    several = parser.add_argument_group("several machines or processes")
    several.add_argument(
        "--part",
        metavar="I/N",
        help="ask only the I-th of N shares; run all parts, in any order or at once, with one --out",
    )
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, for processes that find each other as in chatpose train",
    )
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")


class _Questions(Sequence[Question]):
    """The questions of a task, made when they are taken."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self) -> int:
        return len(self.task.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.task.question(self.task.rows[index])


class Cell(NamedTuple):
    """One task on one data set."""

    task: str
    options: Mapping[str, Any]
    data: Spec
    name: str

    def __repr__(self) -> str:
        return one_line(self)


def run(args: argparse.Namespace) -> int:
    """Evaluates, and writes tables and a report. Exit status 1 where nothing could be run. Raises UserError."""
    if args.task == REPORT:
        return _report(args)
    if args.out is None:
        raise UserError("expected --out FOLDER: answers, scores and the report are written there")
    whole("--drawings", args.drawings, 0)
    part, size = _part(args.part), _subset_size(args.subset)
    specs = [Spec.parse(text) for text in args.system]
    if args.model is not None:
        options = {"model": args.model} | ({"body": args.body} if args.body else {})
        specs.insert(0, Spec("chatpose", options, args.model))
    if not specs:
        raise UserError(f"expected a MODEL folder, or --system SPEC: {', '.join(SYSTEMS)}, or package.module:Class")
    demand_unique("systems", [str(spec.options.get("name") or spec.text) for spec in specs])
    cells = _cells(args, size)
    _make_out(args.out)
    if cpu_only():
        keep_freed_memory()
    others = hosts.find_processes(args.coordinator, args.num_processes, args.process_id)
    if others is None:
        keep_compiled()
    elif args.part is not None:
        raise UserError("--part is for separate processes; connected processes share the work automatically")
    hosts.connect(others)
    if others is not None:
        part = (jax.process_index(), jax.process_count())
    with hosts.announced(lambda: "stopping: answers that are written are kept; run the same command again to resume"):
        return Evaluation(args, cells, size, part).run(specs)


class Evaluation:
    """All systems on all cells."""

    def __init__(
        self, args: argparse.Namespace, cells: Sequence[Cell], size: int | Path | None, part: tuple[int, int]
    ) -> None:
        self.args, self.cells, self.size, self.part = args, cells, size, part
        self.tasks: dict[int, tuple[Task, str]] = {}
        self.names: list[str] = []
        self.found: list[tuple[str, Scores]] = []
        self.not_run: dict[tuple[str, str, str], str] = {}
        self.waiting = False
        self.body = load_body(args.body)

    def run(self, specs: Sequence[Spec]) -> int:
        """Asks and scores. A system goes out of memory before the next one is made."""
        for spec in specs:
            self._run(spec)
        if not hosts.primary():
            return 0
        if not self.args.quiet:
            print("\n".join(table_lines(self.found)))
        not_run = [NotRun(*where, command) for where, command in self.not_run.items()]
        for row in not_run:
            print(f"\nnot run: {row.task}, {row.data}: {row.why}\n  {row.command}")
        if self.args.task == ALL:
            write_not_run(self.args.out, not_run)
        if self.found or not_run:
            _print_written(write_report(self.args.out))
        return 0 if self.found or self.waiting else 1

    def _run(self, spec: Spec) -> None:
        system: System | None = None
        with self._tolerated() as absent, all_or_none():
            system = make_system(spec)
        if absent or system is None:
            system = None  # it may have been made here, and not in another process
        else:
            self.names.append(system.name)  # its own name, unless name= was given
            demand_unique("systems", self.names)
        for number, cell in enumerate(self.cells):
            failed = absent
            if system is not None:
                with self._tolerated() as failed, all_or_none():
                    self._evaluate(number, spec, system)
            if failed:
                self.not_run.setdefault((cell.task, cell.name, str(failed[0])), self._command(cell, spec))

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[list[Exception]]:
        """Gives a list. Under ``all``, an error that the user can mend goes there, and from there into the report."""
        caught: list[Exception] = []
        try:
            yield caught
        except (UserError, BodyFileError, PoseFileError) as error:
            if self.args.task != ALL:
                raise
            caught.append(error)

    def _evaluate(self, number: int, spec: Spec, system: System) -> None:
        cell = self.cells[number]
        if number not in self.tasks:
            self.tasks[number] = self._task(cell)
        task, contents = self.tasks[number]
        folder = self.args.out / folder_of(cell.task, cell.name, system.name)
        size = whole(f"system {system.name!r}: batch_size", system.batch_size, 1)
        source = {"source": cell.data.name, "options": cell.data.options}
        settings = {
            "task": {"name": cell.task, **task.settings},
            "data": {**source, "split": self.args.split, "rows": len(task.rows), "contents": contents},
            "system": {"name": system.name, "source": spec.name, "batch_size": size, **system.settings},
        }
        if check := getattr(task, "check", None):
            check(system.name, system.settings)
        if fits := getattr(system, "check_questions", None):
            fits(_Questions(task))
        ask.claim(folder, settings)
        label = None if self.args.quiet else f"{cell.task} {cell.name} {system.name}"
        with all_or_none():
            ask.ask(system, task, folder, part=self.part, label=label)
        if not hosts.primary():
            return
        done, total = ask.join(system, task, folder)
        if done < total:
            self.waiting = True
            print(f"{folder}: {done} of {total} batches are answered; tables follow when all parts are run")
            return
        kept = ask.read_answers(task, folder)
        if 2 * (missing := sum(MISSING in answer.notes for answer in kept.answers)) > len(kept.answers):
            share = f"{missing:,} of the {len(kept.answers):,} rows of {cell.name} have no prediction"
            print(f"warning: {system.name}: {share}; the tables are of the others alone", file=sys.stderr)
        scores = task.score(kept.answers)
        about = {"task": cell.task, "data": cell.name, "system": system.name, "command": self._command(cell, spec)}
        if isinstance(note := getattr(system, "note", None), str):
            about["note"] = note
        if self.args.drawings or (folder / GALLERY).exists():  # with 0 drawings, those of an earlier call go
            write_gallery(folder, task.rows, _Questions(task), kept.answers, scores, self.body, self.args.drawings)
        ask.write_scores(folder, about, scores, kept)
        self.found += [(system.name, each) for each in scores]

    def _task(self, cell: Cell) -> tuple[Task, str]:
        """The task, and the fingerprint of its data, "" where the rows have none."""
        make, found = _maker(self.args, cell), open_rows(cell.data, self.args.split, self.args.root)
        contents = getattr(found, "fingerprint", "")
        contents = contents if isinstance(contents, str) else ""
        task = make(found)
        if self.size is None:
            return task, contents
        rows = (
            subset.draw_rows(task.rows, self.size)
            if isinstance(self.size, int)
            else subset.listed_rows(task.rows, self.size)
        )
        ids = "".join(f"{row.id}\n" for row in rows)
        write_whole(self.args.out / folder_of(cell.task, cell.name, SUBSET), lambda out: out.write(ids.encode()))
        return make(rows), contents

    def _command(self, cell: Cell, spec: Spec) -> str:
        """What makes a row again. The folder is left open: nothing written depends on where it is written."""
        args = self.args
        words = ["chatpose", "eval", cell.task, *([] if spec.text == args.model else ["--system"]), spec.text]
        words += ["--data", cell.data.text]
        for flag, value, default in (
            ("--split", args.split, "test"),
            ("--subset", args.subset, None),
            ("--body", args.body, None),
            ("--root", args.root, "data"),
        ):
            words += [flag, str(value)] if value != default else []
        for word in args.options:
            if args.task != ALL or word.startswith(f"{cell.task}."):
                words += ["--set", word.removeprefix(f"{cell.task}.") if args.task == ALL else word]
        return f"{shlex.join(words)} --out OUT"


def _make_out(out: Path) -> None:
    """Makes the folder of ``--out``. Raises UserError where it cannot be one."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--out {out}: {there} is a file; choose a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: the folder cannot be made ({error.strerror}); choose another") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: the folder cannot be written to; choose another")


def _report(args: argparse.Namespace) -> int:
    if args.model is None:
        raise UserError(f"expected chatpose eval {REPORT} FOLDER, the folder that --out named")
    _print_written(write_report(Path(args.model)))
    return 0


def _print_written(paths: Sequence[Path]) -> None:
    print(f"\nwrote {' and '.join(map(str, paths))}")


def _cells(args: argparse.Namespace, size: int | Path | None) -> list[Cell]:
    """What is evaluated. Names and options are checked before anything is loaded; under ``all`` they are when it is their turn."""
    given = [Spec.parse(text) for text in args.data]
    suite = {row.task: [Spec.parse(text) for text in row.data] for row in SUITE}
    if args.task == ALL:
        for word in args.options:
            if word.partition(".")[0] not in suite | dict.fromkeys(ANY_ROWS):
                raise UserError(
                    f"--set {word}: expected TASK.OPTION=VALUE, with a TASK of {', '.join(suite | dict.fromkeys(ANY_ROWS))}"
                )
        rows = [(task, spec) for task in dict.fromkeys([*suite, *ANY_ROWS]) for spec in suite.get(task, [])]
        rows += [(task, spec) for task in ANY_ROWS for spec in given if (task, spec) not in rows]
    else:
        rows = [(args.task, spec) for spec in given or suite.get(args.task, [])[:1]]
        if not rows:
            raise UserError(f"--data SPEC is needed: the rows for the task {args.task}, such as --data synthetic")
    words = "" if size is None else str(size) if isinstance(size, int) else size.stem
    cells = [Cell(task, _options(args, task), spec, data_name(spec, args.split, words)) for task, spec in rows]
    for task in {cell.task for cell in cells}:
        demand_unique(f"data sets of {task}", [cell.name for cell in cells if cell.task == task])
    if args.task != ALL:
        _maker(args, cells[0])
    return cells


def _options(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """The options that are typed for a task."""
    if args.task != ALL:
        return options_of(args.options)
    return options_of([word.removeprefix(f"{task}.") for word in args.options if word.startswith(f"{task}.")])


def _maker(args: argparse.Namespace, cell: Cell) -> Callable[..., Task]:
    """Makes the task of a cell from rows. Raises UserError for a task that is not found, and options that do not fit it."""
    where = f"task {cell.task!r}"
    make = named.find(where, cell.task, TASKS)
    signature = named.signature(where, make)
    options = {"body": args.body} if args.body is not None and "body" in signature.parameters else {}
    options |= cell.options
    named.check_options(where, signature, options)
    return lambda rows: make(rows, cell.name, **options)


def _part(text: str | None) -> tuple[int, int]:
    """``--part 2/3`` as (1, 3)."""
    if text is None:
        return 0, 1
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise UserError(f"--part {text}: expected I/N with I from 1 to N, such as 1/2")
    return int(first) - 1, int(second)


def _subset_size(text: str | None) -> int | Path | None:
    if text is None or not text.isdecimal():
        return None if text is None else Path(text)
    return whole("--subset", int(text), 1)


def table_lines(found: Sequence[tuple[str, Scores]]) -> list[str]:
    """Tables in plain text: for each name of ``Scores.table`` its rows, and what was counted."""
    lines: list[str] = []
    for table in dict.fromkeys(scores.table for _, scores in found):
        rows = [(name, scores) for name, scores in found if scores.table == table]
        first = rows[0][1]
        lines += ["", first.title, "; ".join(f"{name}: {value}" for name, value in first.facts.items())]
        columns = list(dict.fromkeys(name for _, scores in rows for name in scores.values))
        cells = [["", *columns]]
        systems = [(name, scores.values) for name, scores in rows]
        systems += {title: values for _, scores in rows for title, values in scores.references.items()}.items()
        cells += [[name, *(value_text(values.get(c)) for c in columns)] for name, values in systems]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
        for name, scores in rows:
            lines += [f"{name}: {count} × {reason}" for reason, count in scores.counts.items()]
    return lines


def value_text(value: Value | None) -> str:
    """A number with its interval and unit."""
    if value is None or not np.isfinite(value.value):
        return "–"
    text = f"{value.value:.{value.digits}f}"
    if np.isfinite(value.low):
        text += f" [{value.low:.{value.digits}f}, {value.high:.{value.digits}f}]"
    return f"{text} {value.unit}".rstrip()

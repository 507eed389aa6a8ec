"""The contents of a report: for each table its rows, what they depend on, published rows beside them, and what was left out."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import published
from chatpose_jax.evaluation.published import Published
from chatpose_jax.evaluation.results import SCORES, DrawnAnswer, NotRun, Result, read_not_run, read_results
from chatpose_jax.evaluation.scores import Better, Scores, Value
from chatpose_jax.settings import one_line

TASKS = {
    "generation": "Poses from descriptions (Table 1 of the paper)",
    "spg": "Speculative pose generation (Table 1 of the paper)",
    "rpe": "Reasoning about pose estimation (Table 2 of the paper)",
    "estimation": "Pose estimation from images (Table 3 of the paper)",
    "judge": "Answers in words, rated by a language model (Table 4 of the paper)",
    "describe": "Poses in words",
    "poses": "Poses on rows of any data set",
}
"""Headings of the tasks, in the order of the report, with the tables of the ChatPose paper that they make. Other tasks follow under their names."""
OVERALL = "mean"
"""Published figures of RPE are means over the attributes: they stand beside the table of this name."""
REFERENCE = "not a system: measured here for comparison"
SAME = "under the same conditions"


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """A row of a table. mark: letters that refer to ``Table.notes``. values: by column; a column may lack one. published: whether it was not
    measured here. reference: whether it belongs to no system (``Scores.references``).
    """

    system: str
    mark: str
    values: Mapping[str, Value]
    published: bool = False
    reference: bool = False

    __repr__ = one_line


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of the report.

    name: ``Scores.table``. facts: those that all measured rows share. columns: name -> a value that says its unit and direction. best: for each
    column the best measured value; none where only one row is measured, or the rows differ in what they depend on. notes: mark -> words. counts:
    what was left out, by system. others: published rows of other data or other measures, which must not stand in the table, with their conditions.
    commands, shown: by system.
    """

    name: str
    title: str
    facts: Mapping[str, str]
    columns: Mapping[str, Value]
    rows: Sequence[ReportRow]
    best: Mapping[str, float]
    notes: Mapping[str, str]
    counts: Mapping[str, str]
    others: Sequence[tuple[Published, str]]
    commands: Mapping[str, str]
    shown: Mapping[str, Sequence[tuple[DrawnAnswer, Path]]]

    __repr__ = one_line


@dataclasses.dataclass(frozen=True)
class Section:
    """The tables of a task."""

    task: str
    title: str
    tables: Sequence[Table]

    __repr__ = one_line


@dataclasses.dataclass(frozen=True)
class Report:
    """All tables, and what was not run."""

    sections: Sequence[Section]
    not_run: Sequence[NotRun]

    __repr__ = one_line


def gather(folder: Path) -> Report:
    """The contents of a report, from the files of an evaluation. Raises UserError where there are none, or a file is damaged."""
    results, not_run = read_results(folder), read_not_run(folder)
    if not results and not not_run:
        raise UserError(
            f"{folder}: there are no results (TASK/DATA/SYSTEM/{SCORES}); chatpose eval TASK --out {folder} makes them"
        )
    tasks = {**dict.fromkeys(TASKS), **dict.fromkeys(result.task for result in results)}
    sections = []
    for task in tasks:
        found = [result for result in results if result.task == task]
        names = dict.fromkeys(scores.table for result in found for scores in result.scores)
        if names:
            sections.append(Section(task, TASKS.get(task, task), [_table(name, found) for name in names]))
    return Report(sections, not_run)


def _table(name: str, results: Sequence[Result]) -> Table:
    """The table of a name, with a row for each result that has one."""
    measured = [(result, scores) for result in results for scores in result.scores if scores.table == name]
    first = measured[0][1]
    facts = {fact: words for fact, words in first.facts.items() if all(s.facts.get(fact) == words for _, s in measured)}
    notes: dict[str, str] = {}
    rows, differ = [], False
    for result, scores in measured:
        own = [f"{fact}: {words}" for fact, words in scores.facts.items() if fact not in facts]
        differ = differ or bool(own)
        words = "; ".join([*own, result.note] if result.note else own)
        rows.append(ReportRow(result.system, _mark(notes, words), scores.values))
    columns: dict[str, Value] = {}
    for _, scores in measured:
        for column, value in scores.values.items():
            columns.setdefault(column, value)
    for title, values in {
        title: values for _, scores in measured for title, values in scores.references.items()
    }.items():
        rows.append(ReportRow(title, _mark(notes, REFERENCE), values, reference=True))
    beside, others = _published(measured[0][0], name, facts, columns)
    for row, words in beside:
        values = {name: _bare(columns[name], value) for name, value in row.values.items() if name in columns}
        rows.append(ReportRow(row.system, _mark(notes, f"{row.source}; {words}"), values, True))
    shown = {
        result.system: [(each, result.folder) for each in result.shown if each.table == name] for result, _ in measured
    }
    return Table(
        name=name,
        title=first.title,
        facts=facts,
        columns=columns,
        rows=rows,
        best={} if differ else _best(rows, columns),
        notes=notes,
        counts={result.system: words for result, scores in measured if (words := _counted(scores))},
        others=others,
        commands={result.system: result.command for result, _ in measured if result.command},
        shown={system: found for system, found in shown.items() if found},
    )


def _published(
    result: Result, table: str, facts: Mapping[str, str], columns: Mapping[str, Value]
) -> tuple[list[tuple[Published, str]], list[tuple[Published, str]]]:
    """Published rows of the same data that share a column with a table, and all others of its task; each with its conditions in words."""
    beside, others = [], []
    for row in published.of_task(result.task):
        if result.task == "rpe" and not table.endswith(f"/{OVERALL}"):
            continue
        apart = published.differences(row, facts)
        same = published.is_of(row, result.data)
        if same and set(row.values) & set(columns):
            beside.append((row, "; ".join(apart) or SAME))
        else:
            data = [] if same else [f"data: {' or '.join(row.data)}, here {result.data}"]
            others.append((row, "; ".join(data + apart) or SAME))
    return beside, others


def _bare(about: Value, value: float) -> Value:
    """A value without interval, of the unit and digits of a column."""
    return dataclasses.replace(about, value=value, low=float("nan"), high=float("nan"))


def _mark(notes: dict[str, str], words: str) -> str:
    """The mark of a note, a new one unless these words have one. No words, no mark."""
    if not words:
        return ""
    for mark, note in notes.items():
        if note == words:
            return mark
    rounds, letter = divmod(len(notes), 26)
    mark = string.ascii_lowercase[letter] * (rounds + 1)
    notes[mark] = words
    return mark


def _best(rows: Sequence[ReportRow], columns: Mapping[str, Value]) -> dict[str, float]:
    """The best measured value of each column in which several rows have one."""
    found = {}
    for name, about in columns.items():
        given = [row.values[name].value for row in rows if name in row.values and is_system(row)]
        values = [value for value in given if _is_number(value)]
        if len(values) > 1 and about.better:
            found[name] = max(values) if about.better == "higher" else min(values)
    return found


def _counted(scores: Scores) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in scores.counts.items() if count)


def _is_number(value: float | None) -> bool:
    return value is not None and value == value


# Words -------------------------------------------------------------------------------------------------------------------------------------------

_ARROWS: dict[Better, str] = {"lower": "↓", "higher": "↑", "": ""}
INTRODUCTION = (
    "Brackets hold 95 % intervals. If an evaluation were repeated with other samples of the same kind, about 95 of 100 such intervals would contain "
    "the value for all samples of this kind. They do not show how much a value varies between training runs. ↓: lower is better. ↑: higher is "
    "better. The facts above a table hold for all measured rows. A letter behind a system refers to a note below the table; for a measured row it "
    "says which facts differ, and of a baseline from which rows it was computed. "
    "The best value of a column is bold only if no fact differs. Published rows were not measured here. Their notes say how "
    "their conditions differ from those of the table, and which conditions are not published."
)


def heading(name: str, about: Value) -> str:
    """The heading of a column."""
    return " ".join(part for part in (name, about.unit and f"({about.unit})", _ARROWS[about.better]) if part)


def figure(value: Value | None) -> tuple[str, str]:
    """A value and its interval as text, "–" and "" for none."""
    if value is None or not _is_number(value.value):
        return "–", ""
    interval = ""
    if _is_number(value.low) and _is_number(value.high):
        interval = f"[{value.low:.{value.digits}f}, {value.high:.{value.digits}f}]"
    return f"{value.value:.{value.digits}f}", interval


def is_system(row: ReportRow) -> bool:
    """Whether a row was reached here by a system."""
    return not row.published and not row.reference


def is_best(table: Table, row: ReportRow, column: str) -> bool:
    """Whether a measured value is the best of its column."""
    return (
        is_system(row)
        and column in table.best
        and column in row.values
        and row.values[column].value == table.best[column]
    )


def figures(row: Published) -> str:
    """Values of a published row as text."""
    return ", ".join(f"{name} {value:g}" for name, value in row.values.items())


def drawn_caption(shown: DrawnAnswer) -> str:
    """What stands with a drawn answer."""
    return f"{shown.place}, {shown.measure} {shown.value:.4g}{f' {shown.unit}' if shown.unit else ''}, {shown.key}"

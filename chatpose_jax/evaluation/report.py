"""The report of an evaluation, as Markdown and as a page of HTML.

``write_report`` reads the files of a folder (``evaluation.results``) and writes ``report.md`` and ``report.html`` into it. Equal files give equal
bytes: nothing in a report depends on the clock, the machine or the place of the folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from chatpose_jax.evaluation.page import html, link
from chatpose_jax.evaluation.tables import (
    INTRODUCTION,
    Report,
    Table,
    drawn_caption,
    figure,
    figures,
    gather,
    heading,
    is_best,
)
from smpl_jax._files import write_whole


def write_report(folder: Path) -> tuple[Path, Path]:
    """Writes ``report.md`` and ``report.html`` of the results in a folder, and returns their paths.

    Raises UserError where there are no results, or a file is damaged.
    """
    report = gather(folder)
    found = folder / "report.md", folder / "report.html"
    for path, text in zip(found, (markdown(report, folder), html(report, folder))):
        write_whole(path, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    return found


def markdown(report: Report, folder: Path) -> str:
    """The report as Markdown. Links of images are relative to the folder."""
    lines = ["# Evaluation", "", INTRODUCTION, ""]
    for section in report.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for table in section.tables:
            lines += _markdown_table(table, folder)
    if report.not_run:
        lines += ["## Not run", ""]
        for each in report.not_run:
            command = f" To run it: {_code(each.command)}" if each.command else ""
            lines.append(f"- **{_plain(each.task)}, {_plain(each.data)}**: {_plain(each.why)}{command}")
        lines.append("")
    return "\n".join(lines)


def _markdown_table(table: Table, folder: Path) -> list[str]:
    lines = [f"### {_plain(table.title)}", ""]
    if table.facts:
        lines += ["; ".join(f"{_plain(name)}: {_plain(words)}" for name, words in table.facts.items()) + ".", ""]
    heads = ["system", *(heading(name, about) for name, about in table.columns.items())]
    lines += [_line(map(_plain, heads)), _line(["---", *["---:"] * len(table.columns)])]
    for row in table.rows:
        system = f"{row.system}, published" if row.published else row.system
        cells = [f"{_plain(system)}{f' <sup>{row.mark}</sup>' if row.mark else ''}"]
        for name in table.columns:
            value, interval = figure(row.values.get(name))
            shown = (
                f"**{value}**"
                if is_best(table, row, name)
                else f"*{value}*"
                if row.published and value != "–"
                else value
            )
            cells.append(f"{shown} {interval}".strip())
        lines.append(_line(cells))
    lines.append("")
    lines += [f"<sup>{mark}</sup> {_plain(words)}  " for mark, words in table.notes.items()]
    lines += [f"Left out or failed, {_plain(system)}: {_plain(words)}.  " for system, words in table.counts.items()]
    if table.notes or table.counts:
        lines.append("")
    if table.others:
        lines += ["Published elsewhere, not comparable with this table:", ""]
        lines += [
            f"- {_plain(row.system)}: {figures(row)} ({_plain(row.source)}). {_plain(words)}"
            for row, words in table.others
        ]
        lines.append("")
    for system, answers in table.shown.items():
        lines += [f"**Best, median and worst answers: {_plain(system)}**", ""]
        for each, place in answers:
            lines += [f"- {_plain(drawn_caption(each))}  "]
            lines += [f"  asked: {_plain(each.question)}  "] if each.question else []
            lines += [f"  answered: {_plain(each.answer)}  "] if each.answer else []
            if each.image:
                lines.append(f"  ![{_plain(drawn_caption(each))}]({link(place / each.image, folder)})")
        lines.append("")
    if table.commands:
        lines += [
            "Commands:",
            "",
            *(f"- {_plain(system)}: {_code(command)}" for system, command in table.commands.items()),
            "",
        ]
    return lines


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that is nothing but text: no mark-up, on one line."""
    found = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in r"\`*_[]|!#" else letter for letter in found)


def _code(text: str) -> str:
    """Text as code on one line, with a fence that it does not hold."""
    text, fence = " ".join(text.split()), "`"
    while fence in text:
        fence += "`"
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"

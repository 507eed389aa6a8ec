"""The report as one page of HTML. It needs no network and runs no script."""

from __future__ import annotations

import base64
from html import escape
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from chatpose_jax.evaluation.results import DrawnAnswer
from chatpose_jax.evaluation.tables import (
    INTRODUCTION,
    Report,
    ReportRow,
    Section,
    Table,
    drawn_caption,
    figure,
    figures,
    heading,
    is_best,
)

INLINE = 2**23
"""Bytes of images up to which they are part of the page. Beyond, the page shows the files that lie beside it."""


def html(report: Report, folder: Path) -> str:
    """The page. Links of images are relative to the folder."""
    images = {
        place / each.image for section in report.sections for table in section.tables for place, each in _drawn(table)
    }
    inline = sum(path.stat().st_size for path in images if path.is_file()) <= INLINE
    style = (resources.files("chatpose_jax.evaluation") / "page.css").read_text(encoding="utf-8")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Evaluation</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>Evaluation</h1>",
        f'<p class="soft">{escape(INTRODUCTION)}</p>',
        _contents(report),
        *(_section(section, folder, inline) for section in report.sections),
        _not_run(report),
        "</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def link(path: Path, folder: Path) -> str:
    """A file below the folder, as a link from a page in it."""
    return quote(path.relative_to(folder).as_posix())


def _drawn(table: Table) -> list[tuple[Path, DrawnAnswer]]:
    return [(place, each) for shown in table.shown.values() for each, place in shown if each.image]


def _contents(report: Report) -> str:
    lines = ["<nav><ul>"]
    for section in report.sections:
        tables = "".join(
            f'<li><a href="#{_anchor(table.name)}">{escape(table.title)}</a></li>' for table in section.tables
        )
        lines.append(f"<li>{escape(section.title)}<ul>{tables}</ul></li>")
    if report.not_run:
        lines.append('<li><a href="#not-run">Not run</a></li>')
    return "\n".join([*lines, "</ul></nav>"])


def _section(section: Section, folder: Path, inline: bool) -> str:
    return "\n".join(
        [f"<h2>{escape(section.title)}</h2>", *(_table(table, folder, inline) for table in section.tables)]
    )


def _table(table: Table, folder: Path, inline: bool) -> str:
    parts = [f'<section id="{_anchor(table.name)}">\n<h3>{escape(table.title)}</h3>']
    if table.facts:
        facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in table.facts.items())
        parts.append(f'<dl class="facts">{facts}</dl>')
    heads = "".join(f"<th>{escape(heading(name, about))}</th>" for name, about in table.columns.items())
    rows = "\n".join(_row(table, row) for row in table.rows if not row.published)
    if published := [_row(table, row) for row in table.rows if row.published]:
        words = f'<th colspan="{1 + len(table.columns)}">Published, not measured here</th>'
        rows = "\n".join([rows, f'<tr class="published">{words}</tr>', *published])
    parts.append(
        f'<div class="wide"><table>\n<thead><tr><th>system</th>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )
    notes = [f"<li><b>{mark}</b>{escape(words)}</li>" for mark, words in table.notes.items()]
    notes += [
        f"<li>Left out or failed, {escape(system)}: {escape(words)}</li>" for system, words in table.counts.items()
    ]
    if notes:
        parts.append(f'<ol class="notes">{"".join(notes)}</ol>')
    if table.others:
        items = [
            f"<li>{escape(row.system)}: {escape(figures(row))} ({escape(row.source)}). {escape(words)}</li>"
            for row, words in table.others
        ]
        parts.append(
            _folded("Published elsewhere, not comparable with this table", f'<ul class="soft">{"".join(items)}</ul>')
        )
    for system, shown in table.shown.items():
        drawn = "\n".join(_figure(each, place, folder, inline) for each, place in shown)
        parts.append(
            _folded(f"Best, median and worst answers: {system}", f'<div class="gallery">{drawn}</div>', is_open=True)
        )
    if table.commands:
        items = [f"<p>{escape(system)}</p><pre>{escape(command)}</pre>" for system, command in table.commands.items()]
        parts.append(_folded("Commands", "".join(items)))
    return "\n".join([*parts, "</section>"])


def _row(table: Table, row: ReportRow) -> str:
    mark = f" <sup>{row.mark}</sup>" if row.mark else ""
    cells = []
    for name in table.columns:
        value, interval = figure(row.values.get(name))
        shown = f"<strong>{value}</strong>" if is_best(table, row, name) else value
        cells.append(f"<td>{shown}{f'<span>{interval}</span>' if interval else ''}</td>")
    kind = ' class="published"' if row.published else ' class="reference"' if row.reference else ""
    return f"<tr{kind}><th>{escape(row.system)}{mark}</th>{''.join(cells)}</tr>"


def _figure(shown: DrawnAnswer, place: Path, folder: Path, inline: bool) -> str:
    picture = (
        f'<img src="{_source(place / shown.image, folder, inline)}" alt="{escape(drawn_caption(shown))}">'
        if shown.image
        else ""
    )
    words = [f"<strong>{escape(drawn_caption(shown))}</strong>"]
    words += [f"<p>{escape(text)}</p>" for text in (shown.question, shown.answer and f"→ {shown.answer}") if text]
    return f"<figure>{picture}<figcaption>{''.join(words)}</figcaption></figure>"


def _source(path: Path, folder: Path, inline: bool) -> str:
    if not inline or not path.is_file():
        return link(path, folder)
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _folded(title: str, inner: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>\n{inner}\n</details>"


def _not_run(report: Report) -> str:
    items = []
    for each in report.not_run:
        command = f"<pre>{escape(each.command)}</pre>" if each.command else ""
        items.append(f"<li><strong>{escape(each.task)}, {escape(each.data)}</strong>: {escape(each.why)}{command}</li>")
    return f'<section id="not-run"><h2>Not run</h2><ul>{"".join(items)}</ul></section>' if items else ""


def _anchor(name: str) -> str:
    """An id for a table: its name without spaces, which an id must not have."""
    return escape("-".join(name.split()))

"""Asks a system the questions of a task, batch by batch, and keeps the answers. A run that was killed goes on where it was.

A folder holds, for one system on one data set:

==============  ==========================================================================================
settings.json   what the answers depend on
batches/        while answers are missing: a file for each batch, written whole
answers.jsonl   all answers, in the order of the rows
scores.json     the tables (``Scores.to_json``), and the command that made them
samples.jsonl   for each row, the values behind the tables
==============  ==========================================================================================

Batches always hold the same rows, so nothing depends on how often a run was killed, or on how many processes shared the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from chatpose_jax import named
from chatpose_jax.data.example import rows_at, rows_in_turn
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.results import SCORES, write_json
from chatpose_jax.evaluation.scores import Scores
from chatpose_jax.evaluation.system import Answer, Question, System
from chatpose_jax.evaluation.task import Task
from chatpose_jax.settings import one_line
from smpl_jax._files import write_whole
from smpl_jax.pose import Pose

SETTINGS, BATCHES, ANSWERS, SAMPLES = "settings.json", "batches", "answers.jsonl", "samples.jsonl"
NOT_FINITE = "pose with NaN or infinities, left out"

_CHUNK = 1024


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes ``settings.json``, or compares it with the one that is there. Raises UserError, which names what differs."""
    try:
        text = json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the settings of {folder} cannot be written as JSON ({error}); see System.settings") from None
    file = folder / SETTINGS
    if not file.exists():
        write_json(file, json.loads(text))
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); delete the folder to ask again") from None
    now, then = _flat(json.loads(text)), _flat(before)
    differing = [name for name in {**then, **now} if now.get(name) != then.get(name)]
    if differing:
        words = "; ".join(_change(name, then, now) for name in differing[:3])
        raise UserError(
            f"{folder} holds answers that were made with other settings: {words}. Choose another --out or name=…, or delete the folder to ask again"
        )


def _change(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How a setting changed. That of a function's code is a hash, which tells people nothing."""
    call = now.get("system.function")
    if name == "system.source" and call is not None and call == then.get("system.function"):
        return f"the code of {call} changed"
    return f"{name} was {then.get(name)!r:.80}, is {now.get(name)!r:.80}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {name: leaf for key, item in value.items() for name, leaf in _flat(item, f"{prefix}{key}.").items()}


def ask(system: System, task: Task, folder: Path, *, part: tuple[int, int] = (0, 1), label: str | None = None) -> None:
    """Asks for the answers that are missing, and writes them batch by batch.

    part: (i, n): of all batches, only number i, i + n, i + 2 n …, for the i-th of n processes or machines.
    label: of the progress bar; None shows no bar.

    Raises UserError from the system, and where it does not give an ``Answer`` to each question.
    """
    if (folder / ANSWERS).exists():
        return
    rows, size = task.rows, system.batch_size
    mine = list(_batches(len(rows), size))[part[0] :: part[1]]
    total = sum(len(numbers) for _, numbers in mine)
    bar = tqdm(total=total, desc=label, unit="answer", disable=label is None, leave=False, dynamic_ncols=True)
    with bar:
        for name, numbers in mine:
            if not _is_whole(folder / BATCHES / name, len(numbers)):
                questions = [task.question(row) for row in rows_at(rows, numbers)]
                lines = [_line(question, answer) for question, answer in zip(questions, _answers(system, questions))]
                write_whole(folder / BATCHES / name, lambda out, lines=lines: out.writelines(lines))  # type: ignore[misc]
            bar.update(len(numbers))


def _batches(count: int, size: int) -> Iterator[tuple[str, range]]:
    """The file of each batch, and the numbers of its rows."""
    for number, start in enumerate(range(0, count, size)):
        yield f"{number:06}.jsonl", range(start, min(start + size, count))


def _is_whole(file: Path, lines: int) -> bool:
    """Whether a batch is there; a file that a crash of the machine cut off is not."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return False
    return data.count(b"\n") == lines and data.endswith(b"\n")


def _answers(system: System, questions: Sequence[Question]) -> Sequence[Answer]:
    where = f"system {system.name!r}"
    try:
        answers = list(system.answer(questions))
    except (UserError, OSError):
        raise
    except Exception as error:
        if type(system).__module__.startswith("chatpose_jax."):
            raise
        where += f", questions {questions[0].key!r} to {questions[-1].key!r}{named.own_line(error)}"
        raise named.raised(where, error) from error
    if len(answers) != len(questions) or not all(isinstance(answer, Answer) for answer in answers):
        kinds = sorted({type(answer).__name__ for answer in answers})
        raise UserError(
            f"{where} gave {len(answers)} of {', '.join(kinds)} to {len(questions)} questions, expected an Answer to each"
        )
    return [_without_damage(answer) for answer in answers]


def _without_damage(answer: Answer) -> Answer:
    """An answer without a pose that has NaN or infinities, which its notes say: one bad answer does not end a run."""
    pose = answer.pose
    arrays = [] if not isinstance(pose, Pose) else [pose.rotations, pose.betas, pose.translation]
    if all(array is None or np.isfinite(np.asarray(array, np.float64)).all() for array in arrays):
        return answer
    return dataclasses.replace(answer, pose=None, boxes=None, notes={**answer.notes, NOT_FINITE: True})


def _line(question: Question, answer: Answer) -> bytes:
    try:
        answer.check()
        found = {"key": question.key, "question": _digest(question), **answer.to_json()}
        return (json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"the answer to {question.key!r} cannot be used: {error}") from None


def _digest(question: Question) -> str:
    """Tells whether a question was changed since it was asked. Only its words are looked at."""
    words = [
        [message["role"], content if isinstance(content, str) else [part.get("text", "") for part in content]]
        for message in question.messages
        for content in [message["content"]]
    ]
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=8).hexdigest()


def join(system: System, task: Task, folder: Path) -> tuple[int, int]:
    """Writes ``answers.jsonl`` once all batches are there, and removes them. Returns how many batches are done, and how many there are."""
    batches = list(_batches(len(task.rows), system.batch_size))
    answers = folder / ANSWERS
    if not answers.exists():
        done = sum(_is_whole(folder / BATCHES / name, len(numbers)) for name, numbers in batches)
        if done < len(batches) and not answers.exists():
            return done, len(batches)
        try:
            write_whole(answers, lambda out: [out.write((folder / BATCHES / name).read_bytes()) for name, _ in batches])
        except FileNotFoundError:  # another process has joined and removed them meanwhile
            if not answers.exists():
                raise
    shutil.rmtree(folder / BATCHES, ignore_errors=True)
    return len(batches), len(batches)


class Kept(NamedTuple):
    """What ``answers.jsonl`` holds, one for each row of the task; with the keys and groups of the rows."""

    answers: list[Answer]
    keys: list[str]
    groups: list[str]

    def __repr__(self) -> str:
        return one_line(self)


def read_answers(task: Task, folder: Path) -> Kept:
    """The answers of a task. Raises UserError where they are damaged, or answer other questions."""
    file, rows = folder / ANSWERS, task.rows
    answers, keys, groups = Kept([], [], [])
    with file.open(encoding="utf-8") as lines:
        while chunk := list(itertools.islice(lines, _CHUNK)):
            try:
                given, asked = _read_lines(chunk)
            except _DAMAGE:
                for number, line in enumerate(chunk, len(answers) + 1):  # which line it is
                    try:
                        _read_lines([line])
                    except _DAMAGE as error:
                        raise _damaged(file, number, error) from None
                raise
            answers += given
            first = len(answers) - len(chunk)
            wanted = range(first, min(first + len(asked), len(rows)))
            for number, row, (key, digest) in zip(wanted, rows_in_turn(rows, wanted), asked):
                question = task.question(row)
                keys.append(question.key)
                groups.append(question.group)
                if (key, digest) != (question.key, _digest(question)):
                    what = f"answers {key!r}, the row is {question.key!r}"
                    what = what if key != question.key else f"the question of {key!r} was changed"
                    raise UserError(
                        f"{file}, line {number + 1}: {what}. The data set is not the one whose questions were asked; delete the folder to ask again"
                    )
    if len(answers) != len(rows):
        raise UserError(f"{file} has {len(answers)} answers, expected {len(rows)}; delete the folder to ask again")
    return Kept(answers, keys, groups)


_DAMAGE = (UserError, ValueError, KeyError, TypeError, IndexError, AttributeError)


def _read_lines(lines: Sequence[str]) -> tuple[list[Answer], list[tuple[str, str]]]:
    """The answers in lines of a file, and what was asked. Raises one of ``_DAMAGE``."""
    found = [json.loads(line) for line in lines]
    return Answer.from_jsons(found), [(each["key"], each["question"]) for each in found]


def _damaged(file: Path, number: int, error: Exception) -> UserError:
    place = isinstance(error, json.JSONDecodeError)
    words = f"{error.msg}, column {error.colno}" if place else f"{type(error).__name__}: {error}"  # type: ignore[attr-defined]
    return UserError(f"{file} is damaged in line {number} ({words}); delete the folder to ask again")


def write_scores(folder: Path, about: Mapping[str, str], scores: Sequence[Scores], kept: Kept) -> None:
    """Writes ``scores.json``, an object with ``about`` and the list ``scores``, and ``samples.jsonl``.

    A line of ``samples.jsonl`` belongs to a row: ``{"key", "group", "samples": {table: {measure: value or text}}}``, without values that do not
    count.
    """
    columns = [
        (each.table, name, np.asarray(values, np.float64)) for each in scores for name, values in each.samples.items()
    ]
    columns += [(each.table, name, np.asarray(texts, object)) for each in scores for name, texts in each.texts.items()]
    for table, name, values in columns:
        if values.shape != (len(kept.keys),):
            raise ValueError(f"{table}: samples {name!r} have the shape {values.shape}, expected ({len(kept.keys)},)")

    def fill(out: Any) -> None:
        for number, (key, group) in enumerate(zip(kept.keys, kept.groups)):
            samples: dict[str, dict[str, float | str]] = {}
            for table, name, values in columns:
                value = values[number]
                if isinstance(value, str):
                    samples.setdefault(table, {})[name] = value
                elif np.isfinite(value):
                    samples.setdefault(table, {})[name] = round(float(value), 6)
            line = json.dumps({"key": key, "group": group, "samples": samples}, ensure_ascii=False)
            out.write(f"{line}\n".encode())

    write_whole(folder / SAMPLES, fill)
    write_json(folder / SCORES, {**about, "scores": [each.to_json() for each in scores]})

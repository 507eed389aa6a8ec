"""Builds a file of rows whose texts come from a language model or from rules. A person reviews the texts before they are used.

1. ``write_texts`` writes ``review.jsonl``: each line is a row with ``"accept": null``.
2. A person reads it, corrects texts, and sets ``accept`` to true or false.
3. ``accept`` writes the rows that are true to the file that a reader reads.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from chatpose_jax.data.readers.untrusted import parse_json, read_lines
from chatpose_jax.endpoint import Endpoint, Messages, NoAnswer, NoServer
from chatpose_jax.errors import UserError
from chatpose_jax.locks import only_writer
from chatpose_jax.settings import one_line
from smpl_jax._files import write_whole

REVIEW = "review.jsonl"
TURNS = 3
"""How often a model is asked for one item, if its answers are not JSON objects with the texts."""
REFUSALS = 4
"""So many items in a row that the endpoint refuses, or does not answer, end the work."""
TOKENS_AN_IMAGE = 1000
CHARACTERS_A_TOKEN = 3.5


class Item(NamedTuple):
    """Something to write texts for.

    id: as in the rows. place: what the builder needs to find the item.
    """

    id: str
    place: Any

    def __repr__(self) -> str:
        return one_line(self)


class Builder(Protocol):
    """What to write for which items."""

    def file(self, row: Mapping[str, Any]) -> str:
        """Name of the file that an accepted row belongs to. Raises UserError for a row that this builder cannot have written."""
        ...

    def items(self) -> Sequence[Item]:
        """All items, always in the same order. Raises UserError where the source is not there."""
        ...

    def names(self) -> Sequence[str]:
        """Names of the texts of an item."""
        ...

    def messages(self, item: Item) -> Messages:
        """The question to a language model. It asks for a JSON object with a text for each name."""
        ...

    def by_rule(self, item: Item) -> Mapping[str, str]:
        """The texts, without a language model. Raises UserError where the builder has no rules."""
        ...

    def row(self, item: Item, name: str, text: str, folder: Path) -> dict[str, Any]:
        """The row of one text, with whatever helps a reviewer. Files that it names are written into ``folder``."""
        ...


class Estimate(NamedTuple):
    """items: how many; ``asked`` of them have no answer in the cache, and need about ``tokens_in`` and ``tokens_out``. cost: in the unit of the
    prices; None without prices."""

    items: int
    asked: int
    tokens_in: int
    tokens_out: int
    cost: float | None


class Built(NamedTuple):
    """rows: how many were written now. before: how many were there. failed: (id, why) of items without texts."""

    rows: int
    before: int
    failed: list[tuple[str, str]]

    def __repr__(self) -> str:
        return one_line(self)


def pending(builder: Builder, out: Path, limit: int | None = None) -> list[Item]:
    """The first ``limit`` items of all, without those that are in the review file."""
    done = {str(row.get("id")) for _, row in _reviewed(out / REVIEW)}
    return [item for item in itertools.islice(builder.items(), limit) if item.id not in done]


def estimate(
    builder: Builder, items: Sequence[Item], endpoint: Endpoint, prices: tuple[float, float] | None
) -> Estimate:
    """What asking for the items would cost. prices: of a million tokens that the model reads, and of a million that it writes."""
    asked = characters = images = 0
    for item in items:
        messages = builder.messages(item)
        if endpoint.known(messages) is not None:
            continue
        asked += 1
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            characters += sum(len(part["text"]) for part in parts if part["type"] == "text")
            images += sum(part["type"] != "text" for part in parts)
    tokens_in = round(characters / CHARACTERS_A_TOKEN) + images * TOKENS_AN_IMAGE
    tokens_out = asked * 60 * len(builder.names())
    cost = None if prices is None else (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6
    return Estimate(len(items), asked, tokens_in, tokens_out, cost)


def write_texts(
    builder: Builder,
    items: Sequence[Item],
    out: Path,
    endpoint: Endpoint | None = None,
    *,
    parallel: int = 4,
    progress: bool = True,
) -> Built:
    """Appends the rows of the items to the review file, in their order.

    endpoint: asks a language model; None uses the builder's rules. What a person has written in the review file stays. If it is stopped,
    ``pending`` gives the items that are left, and answers that had come are in the endpoint's cache.

    Raises UserError where the endpoint refuses ``REFUSALS`` items in a row or answers none of them, or the folder cannot be written.
    """
    review = out / REVIEW
    failed: list[tuple[str, str]] = []
    rows = 0
    with only_writer(out, out / ".lock"):
        _end_last_line(review)
        before = sum(1 for _ in _reviewed(review))
        with (
            review.open("a", encoding="utf-8") as file,
            tqdm(total=len(items), unit="item", disable=not progress, dynamic_ncols=True) as bar,
        ):
            for item, found in _texts(builder, items, endpoint, parallel):
                bar.update()
                if isinstance(found, str):
                    failed.append((item.id, found))
                    continue
                lines = [{"accept": None, **builder.row(item, name, found[name], out)} for name in builder.names()]
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                file.flush()
                rows += len(lines)
    return Built(rows, before, failed)


def accept(builder: Builder, out: Path) -> tuple[int, int, int]:
    """Writes the accepted rows of the review file to the files of ``builder.file`` in ``out``. Returns how many were accepted, refused and not
    decided.

    Raises UserError, which names the line, for a line that is no row or whose ``accept`` is not true, false or null; and if no row is accepted.
    """
    review = out / REVIEW
    if not review.is_file():
        raise UserError(f"{review} is not there; the same command without --accept writes it")
    files: dict[str, list[str]] = {}
    counts = {True: 0, False: 0, None: 0}
    for where, row in _reviewed(review, strict=True):
        decision = row.pop("accept", None)
        if decision is not None and not isinstance(decision, bool):
            raise UserError(f'{where}: "accept" must be true, false or null, found {decision!r:.60}')
        counts[decision] += 1
        if decision:
            try:
                files.setdefault(builder.file(row), []).append(json.dumps(row, ensure_ascii=False) + "\n")
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    if not files:
        raise UserError(
            f'no row of {review} is accepted: read it, set "accept" to true where a row is right and to false where it is not, '
            "then run this again"
        )
    for name, lines in files.items():
        write_whole(out / name, lambda file, lines=lines: file.write("".join(lines).encode()))  # type: ignore[misc]
    return counts[True], counts[False], counts[None]


def texts_of(answer: str, names: Sequence[str]) -> dict[str, str]:
    """The texts of a model's answer: a JSON object, also inside a Markdown fence or among words. Raises ValueError for anything else."""
    start, end = answer.find("{"), answer.rfind("}")
    found = json.loads(answer[start : end + 1]) if 0 <= start < end else None
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object in {answer!r:.120}")
    texts = {name: " ".join(str(found[name]).split()) for name in names if isinstance(found.get(name), str)}
    if absent := [name for name in names if not texts.get(name)]:
        raise ValueError(f"no text for {', '.join(absent)} in {answer!r:.120}")
    return texts


def _texts(
    builder: Builder, items: Sequence[Item], endpoint: Endpoint | None, parallel: int
) -> Iterator[tuple[Item, Mapping[str, str] | str]]:
    """Each item with its texts, or with the reason why it has none. A few are asked for at a time."""
    if endpoint is None:
        for item in items:
            yield item, builder.by_rule(item)
        return
    waiting: list[tuple[Item, concurrent.futures.Future]] = []
    todo: Iterable[Item] = iter(items)
    refused = 0
    pool = concurrent.futures.ThreadPoolExecutor(parallel)
    try:
        while True:
            for item in itertools.islice(todo, 2 * parallel - len(waiting)):
                waiting.append((item, pool.submit(_ask, builder, item, endpoint)))
            if not waiting:
                return
            item, answer = waiting.pop(0)
            try:
                found, refused = answer.result(), 0
            except (UserError, NoServer) as error:
                found, refused = str(error), refused + 1
                if refused == REFUSALS:  # a wrong key or a dead server: the other items would fare alike
                    raise UserError(
                        f"{refused} items in a row got no answer, the last: {error}. What is written is kept: the same command continues"
                    ) from None
            yield item, found
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ask(builder: Builder, item: Item, endpoint: Endpoint) -> Mapping[str, str] | str:
    messages, reason, asked, turn = builder.messages(item), "", 0, -1
    while asked < TURNS:  # answers of an earlier run that were no good are in the cache, and count for nothing
        turn += 1
        asked += endpoint.known(messages, turn) is None
        try:
            return texts_of(endpoint.ask(messages, turn), builder.names())
        except UserError:  # the request itself is refused
            raise
        except ValueError as error:
            reason = str(error)
        except NoServer:
            raise
        except NoAnswer as error:
            return str(error)
    return f"{TURNS} answers without the texts, the last: {reason}"


def _reviewed(review: Path, strict: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of the review file, each with its place. A damaged line is an error if ``strict``, else it is passed over."""
    if not review.is_file():
        return
    for number, line in read_lines(review):
        where = f"{review}, line {number}"
        try:
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        except UserError:
            if strict:
                raise
            continue
        yield where, row


def _end_last_line(review: Path) -> None:
    """Removes a last line that was cut off by a kill. A whole row without a line end gets one."""
    data = review.read_bytes() if review.is_file() else b""
    start = data.rfind(b"\n") + 1
    if not data[start:]:
        return
    try:
        parse_json(data[start:], review)
        mended = data + b"\n"
    except UserError:
        mended = data[:start]
    write_whole(review, lambda file: file.write(mended))

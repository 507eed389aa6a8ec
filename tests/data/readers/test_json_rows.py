import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from chatpose_jax.data.readers import json_rows
from chatpose_jax.data.readers.json_rows import read_rows, split_rows
from chatpose_jax.errors import UserError

ROWS: list[Any] = [
    {"id": "a", "text": 'Zähne } ] , { " \\ \u2028 😀'},
    {"id": 2, "nested": [{"id": "x"}, [1, [2.5e-3]], {}]},
    {},
    *({"id": n, "text": "…" * n} for n in range(40)),
]


def found(folder: Path, file: str, count: int) -> list[tuple[int, Any]]:
    parts = split_rows(folder, file, count)
    rows = [list(read_rows(folder, part)) for part in parts]
    assert all(len(some) == count for some in rows[:-1])
    return [(number, json.loads(data)) for some in rows for number, data in some]


@pytest.mark.parametrize("form", [{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}])
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_rows_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any], chunk: int) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, **form), "utf-8")
    seen: list[Any] = []
    split_rows(tmp_path, "a.json", 5, seen.append)
    assert [row.get("id") for row in seen] == [row.get("id") for row in ROWS]
    for count in (1, 5, 100):
        assert found(tmp_path, "a.json", count) == list(enumerate(ROWS))


def test_a_mark_and_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf \n[ {} , {"a":1}\n]\n')
    assert found(tmp_path, "a.json", 5) == [(0, {}), (1, {"a": 1})]
    (tmp_path / "b.json").write_text(" [ ]")
    assert split_rows(tmp_path, "b.json") == []


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    lines = "\n".join(["", *(json.dumps(row, ensure_ascii=False) for row in ROWS[:3]), "", '{"id": 9', '{"id": 10}'])
    (tmp_path / "a.jsonl").write_text("{}\n" + lines, "utf-8")
    rows = [row for part in split_rows(tmp_path, "a.jsonl", 2) for row in read_rows(tmp_path, part)]
    assert [number for number, _ in rows] == [1, 3, 4, 5, 7, 8]
    assert json.loads(rows[1][1]) == ROWS[0] and rows[-2][1].strip() == b'{"id": 9'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}, {"a": ', "row 1 is damaged or cut off"),
        ('[{"a": 1} {"a": 2}]', "expected a comma or the end of the list after row 0"),
        ('[{"a": 1}, 7]', "expected an object for row 1; found '7]'"),
        ('[{"a": 1}', "found the end of the file"),
        ('"rows"', "expected a list of objects"),
        ("", "expected a list of objects"),
        ("[" + '{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_faults_name_the_row(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=words):
        split_rows(tmp_path, "a.json")


def test_a_row_of_no_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", 64)
    monkeypatch.setattr(json_rows, "MAX_MEMBER", 1000)
    (tmp_path / "a.json").write_text('[{"a": "' + "x" * 5000)
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        split_rows(tmp_path, "a.json")


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(gzip.compress(b"[{}]"))
    with pytest.raises(UserError, match="unpack it first"):
        split_rows(tmp_path, "a.json")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    part = split_rows(tmp_path, "b.json")[0]
    (tmp_path / "b.json").write_text(json.dumps(ROWS[:5]))
    with pytest.raises(UserError, match="has changed"):
        list(read_rows(tmp_path, part))

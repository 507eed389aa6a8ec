"""``chatpose data build``: texts by a stand-in model or by rules, review, and the rows that the readers then read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.data import build
from chatpose_jax.data.builders.generated import GeneratedRpe, GeneratedSpg, color_name
from chatpose_jax.data.builders.rpe import RpeBuilder, write_image
from chatpose_jax.data.builders.spg import SpgBuilder
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.readers.jsonlines import JsonLines
from chatpose_jax.data.readers.rpe import TYPES, Rpe
from chatpose_jax.data.readers.spg import Spg
from chatpose_jax.data.record import Record
from chatpose_jax.endpoint import Endpoint, NoAnswer, NoServer
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

from .readers.amass_files import motion, write_smplh, write_v1

RUB = "BioMotionLab_NTroje/rub055/0027_jump_poses.npz"


class Model(Endpoint):
    """A stand-in for a language model. answer: a function of the messages and the turn."""

    answer: Callable[[Sequence[Any], int], str]

    def ask(self, messages: Any, turn: int = 0) -> str:
        self.asked.append(messages)
        return self.answer(messages, turn)


def model(answer: Callable[[Sequence[Any], int], str]) -> Model:
    made = Model("http://localhost/v1", "m")
    object.__setattr__(made, "answer", answer)
    object.__setattr__(made, "asked", [])
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def review(out: Path, *decisions: bool | None) -> None:
    rows = lines(out / build.REVIEW)
    for row, decision in zip(rows, decisions):
        row["accept"] = decision
    (out / build.REVIEW).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def posescript(tmp_path: Path) -> Path:
    folder = tmp_path / "posescript_release"
    folder.mkdir()
    places = {str(n): ["AMASS", RUB, n] for n in range(4)}
    write_v1(folder, places, {"0": "a person's words"}, {"test": [0, 1, 2]})
    write_smplh(folder / "AMASS" / "BMLrub" / "rub055" / "0027_jump_poses.npz", motion(10))
    return folder


def test_captions_become_questions_that_the_reader_reads(posescript: Path, tmp_path: Path) -> None:
    builder, out = SpgBuilder(posescript), tmp_path / "out"
    asked = model(lambda messages, turn: f'```json\n{{"query": "Where is  {messages[1]["content"]}?"}}\n```')
    items = build.pending(builder, out)
    built = build.write_texts(builder, items, out, asked, progress=False)
    assert (built.rows, built.before, built.failed) == (3, 0, [])
    assert asked.asked[0][1]["content"] == "a person's words."
    assert not build.pending(builder, out)
    with pytest.raises(UserError, match=r"no row of .*review\.jsonl is accepted"):
        build.accept(builder, out)
    review(out, True, False, None)
    assert build.accept(builder, out) == (1, 1, 1)
    assert "accept" not in lines(out / "spg.jsonl")[0]
    reader = Spg(out, posescript=str(posescript), amass=str(posescript / "AMASS"))
    (record,) = [item for part in reader.parts("test") for item in reader.read("test", part)]
    assert isinstance(record, Record)
    assert record.conversations[0][0]["content"] == "Where is a person's words.?" and record.extras["pose_id"] == 0


def test_review_survives_faults_and_a_kill(posescript: Path, tmp_path: Path) -> None:
    builder, out = SpgBuilder(posescript), tmp_path / "out"

    def faulty(messages: Any, turn: int) -> str:
        caption = messages[1]["content"]
        if "of 1" in caption:
            return '{"query": "right"}' if turn else "no JSON at all"
        if "of 2" in caption:
            raise NoAnswer("the model refused")
        return '{"query": "first"}'

    built = build.write_texts(builder, build.pending(builder, out), out, model(faulty), parallel=2, progress=False)
    assert built.rows == 2 and built.failed == [("2", "the model refused")]
    review(out, True, False)
    text = (out / build.REVIEW).read_text()
    (out / build.REVIEW).write_text(text + '{"accept": null, "id": "2", "que')  # killed while it wrote
    (left,) = build.pending(builder, out)
    assert left.id == "2"
    build.write_texts(builder, [left], out, model(lambda *_: '{"query": "now"}'), progress=False)
    rows = (out / build.REVIEW).read_text().splitlines()
    assert "\n".join(rows[:2]) + "\n" == text and len(rows) == 3 and json.loads(rows[2])["query"] == "now"
    assert build.accept(builder, out) == (1, 1, 1)
    (out / build.REVIEW).write_text(rows[0] + "\n{")
    with pytest.raises(UserError, match=r"review\.jsonl, line 2"):
        build.accept(builder, out)
    (out / build.REVIEW).write_text(rows[0].replace("true", '"yes"'))
    with pytest.raises(UserError, match="line 1: \"accept\" must be true, false or null, found 'yes'"):
        build.accept(builder, out)


def test_a_model_that_never_gives_the_texts(posescript: Path, tmp_path: Path) -> None:
    builder, asked = SpgBuilder(posescript), model(lambda *_: '{"query": 3}')
    built = build.write_texts(builder, builder.items()[:1], tmp_path / "out", asked, progress=False)
    assert built.rows == 0 and f"{build.TURNS} answers without the texts" in built.failed[0][1]
    assert len(asked.asked) == build.TURNS


@pytest.mark.parametrize("error", [UserError("refuses the request for 'm': 401"), NoServer("6 attempts failed")])
def test_an_endpoint_that_answers_nobody_ends_the_work(tmp_path: Path, error: Exception) -> None:
    def faulty(messages: Any, turn: int) -> str:
        if len(asked.asked) in (1, 3):  # others are answered between
            return '{"query": "right"}'
        raise error

    builder, asked = GeneratedSpg(tmp_path, size=9), model(faulty)
    with pytest.raises(UserError, match=f"^{build.REFUSALS} items in a row got no answer, the last: {error}"):
        build.write_texts(builder, builder.items(), tmp_path / "out", asked, parallel=1, progress=False)
    assert len(lines(tmp_path / "out" / build.REVIEW)) == 2 and len(asked.asked) <= 9


def test_answers_without_the_texts_are_asked_for_again_by_the_next_run(
    posescript: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the cache, where they must not stand in the way for ever."""
    posted: list[Any] = []
    content = "no JSON"

    def post(self: Endpoint, body: Any) -> Any:
        posted.append(body)
        return {"choices": [{"message": {"content": content}}]}

    monkeypatch.setattr(Endpoint, "_post", post)
    builder, asked = SpgBuilder(posescript), Endpoint("http://localhost/v1", "m", cache=tmp_path / "answers")
    items, out = builder.items()[:1], tmp_path / "out"
    assert build.write_texts(builder, items, out, asked, progress=False).failed and len(posted) == build.TURNS
    content = '{"query": "now"}'
    assert build.write_texts(builder, items, out, asked, progress=False).rows == 1
    assert len(posted) == build.TURNS + 1 and lines(out / build.REVIEW)[0]["query"] == "now"


def test_the_estimate_leaves_out_what_is_known(posescript: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, asked = SpgBuilder(posescript), model(lambda *_: "")
    items = builder.items()
    whole = build.estimate(builder, items, asked, (1.0, 2.0))
    assert whole.items == whole.asked == 3 and whole.cost == pytest.approx(
        (whole.tokens_in + 2 * whole.tokens_out) / 1e6
    )
    monkeypatch.setattr(
        Model, "known", lambda self, messages, turn=0: "x" if "a person" in messages[1]["content"] else None
    )
    assert build.estimate(builder, items, asked, None)[:2] == (3, 2)


def test_generated_questions_without_a_model(tmp_path: Path) -> None:
    builder, out = GeneratedSpg(tmp_path, size=4, split="val"), tmp_path / "out"
    build.write_texts(builder, build.pending(builder, out, 3), out, progress=False)
    review(out, True, True, True)
    assert build.accept(builder, out) == (3, 0, 0)
    reader = JsonLines(out)
    records = [item for part in reader.parts("val") for item in reader.read("val", part)]
    assert len(records) == 3
    for index, record in enumerate(records):
        assert isinstance(record, Record)
        row = builder.rows[index]
        assert record.conversations[0][0]["content"] == row.messages[0]["content"]
        np.testing.assert_allclose(record.poses.rotations, row.poses.rotations, atol=1e-5)
    assert records[0].conversations[0][0]["content"] not in builder.messages(builder.items()[0])[1]["content"]
    other = GeneratedSpg(tmp_path, size=1, split="test")  # the same review file: its rows stay in their split
    build.write_texts(other, build.pending(other, out), out, progress=False)
    review(out, True, True, True, True)
    assert build.accept(builder, out) == (4, 0, 0)
    assert [len((out / f"{split}.jsonl").read_text().splitlines()) for split in ("val", "test")] == [3, 1]
    (out / build.REVIEW).write_text('{"accept": true, "id": "../x"}\n')
    with pytest.raises(UserError, match=r"line 1: expected an id that begins with a split"):
        build.accept(builder, out)


def test_generated_people_are_described(tmp_path: Path) -> None:
    builder, out = GeneratedRpe(tmp_path, size=2, image_size=64), tmp_path / "out"
    build.write_texts(builder, build.pending(builder, out), out, progress=False)
    rows = lines(out / build.REVIEW)
    assert [row["type"] for row in rows] == [*TYPES, *TYPES]
    left, top, width, height = rows[0]["box"]
    assert left >= 0 and top >= 0 and left + width <= 64 and top + height <= 64 and width * height > 200
    review(out, *[True] * 10)
    assert build.accept(builder, out) == (10, 0, 0)
    reader = Rpe(out)
    for kind in TYPES:
        first, _ = reader.read("test", kind)
        assert isinstance(first, Record)
        np.testing.assert_allclose(first.poses.rotations, builder.rows[0].poses.rotations, atol=1e-5)
        assert first.extras["description"] == next(row["description"] for row in rows if row["type"] == kind)


def test_a_prepared_folder_is_described_by_a_model(tmp_path: Path) -> None:
    """What comes out of one builder goes through ``prepare`` into the other."""
    builder, out = GeneratedRpe(tmp_path, size=2, image_size=64), tmp_path / "out"
    build.write_texts(builder, builder.items(), out, progress=False)
    review(out, True, *[False] * 4, True, *[False] * 4)
    build.accept(builder, out)
    prepare("rpe", out, tmp_path / "prepared", processor=tiny_processor(preset("tiny")), workers=1, progress=False)
    asked = model(lambda *_: json.dumps({kind: f"a {kind}" for kind in TYPES}))
    again, second = RpeBuilder(tmp_path / "prepared"), tmp_path / "second"
    built = build.write_texts(again, build.pending(again, second), second, asked, progress=False)
    assert built.rows == 10
    part = asked.asked[0][1]["content"][0]
    assert part["type"] == "image_url" and part["image_url"]["url"].startswith("data:image/png;base64,")
    row, before = lines(second / build.REVIEW)[0], lines(out / build.REVIEW)[0]
    assert row["description"] == "a behaviour" and (second / row["image"]).is_file()
    np.testing.assert_allclose(row["pose"], before["pose"], atol=1e-4)
    assert row["box"] == before["box"] and row["measured"] == before["measured"]


def test_images_of_names_alike_are_two_files(tmp_path: Path) -> None:
    paths = [
        write_image(tmp_path, name, data) for name, data in (("a/b#0", b"BM1"), ("a_b_0", b"BM2"), ("a/b#0", b"BM1"))
    ]
    assert paths[0] == paths[2] and [(tmp_path / path).read_bytes() for path in paths[:2]] == [b"BM1", b"BM2"]


def test_colours_have_names() -> None:
    assert color_name(np.array([0.1, 0.15, 0.5])) == "blue" and color_name(np.array([0.05, 0.05, 0.05])) == "black"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    command = ["data", "build", "spg", "--source", "generated", "--out", str(tmp_path / "out"), "--set", "size=2"]
    assert main([*command, "--offline"]) == 0
    assert "2 rows written, 0 were there" in capsys.readouterr().out
    assert main([*command, "--offline"]) == 0
    assert "0 rows written, 2 were there" in capsys.readouterr().out
    review(tmp_path / "out", True, True)
    assert main([*command, "--accept"]) == 0
    assert "2 rows accepted, 0 refused, 0 not decided" in capsys.readouterr().out
    for words, message in (
        ([], "name the language model"),
        (["--offline", "--model", "m"], "name the language model"),
        (["--model", "m"], "set OPENAI_API_KEY"),
        (["--offline", "--limit", "0"], "--limit must be at least 1"),
        (["--offline", "--set", "sizes=3"], "did you mean size?"),
        (["--offline", "--set", "split=dev"], "split"),
    ):
        assert main([*command, *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    more = ["--set", "size=3", "--model", "m", "--price", "1", "2"]
    assert main([*command, *more]) == 2  # nobody is at the terminal
    error = capsys.readouterr().err
    assert (
        "1 of them without an answer so far. To ask 'm' at https://api.openai.com/v1: " in error
        and "add --yes" in error
    )
    assert main(["data", "build", "spq", "--source", "generated", "--out", "x", "--offline"]) == 2
    assert "did you mean spg?" in capsys.readouterr().err
    assert main(["data", "build", "rpe", "--source", str(tmp_path / "no"), "--out", "x", "--offline"]) == 2
    assert str(tmp_path / "no") in capsys.readouterr().err

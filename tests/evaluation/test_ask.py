"""An evaluation that is killed anywhere goes on, and ends with the same bytes; answers of other settings or data are refused."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import ask
from chatpose_jax.evaluation.scores import Scores, Value, counts_of
from chatpose_jax.evaluation.system import Answer
from chatpose_jax.evaluation.tasks.poses import Poses

from . import given_systems
from .given_systems import Drawn

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.evaluation.given_systems"
WORDS = ["eval", "poses", "--data", f"{HERE}:rows", "--quiet", "--drawings", "0"]
FOLDER = Path("poses/rows/drawn")
KEPT = ["answers.jsonl", "samples.jsonl", "scores.json", "settings.json"]


def files(out):
    """All files of a system's folder, and their bytes; those that a killed process had not yet put in place are hidden."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not Path(name).name.startswith(".")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never killed."""
    out = tmp_path_factory.mktemp("whole")
    assert main([*WORDS, "--system", f"{HERE}:Drawn", "--out", str(out)]) == 0
    assert sorted(path.name for path in (out / FOLDER).iterdir()) == KEPT
    return files(out)


def killed(monkeypatch, number, words):
    """Runs a command that ends when a file is put in place for the n-th time: before it, or (odd numbers) after it."""
    replace, seen = os.replace, []

    class Killed(BaseException):
        pass

    def counting(*paths):
        seen.append(paths)
        if len(seen) > number // 2 and number % 2 == 0:
            raise Killed
        replace(*paths)
        if len(seen) > number // 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counting)
        try:
            main(words)
        except Killed:
            return True
    return False


def test_ended_at_every_file_it_goes_on(tmp_path, monkeypatch, whole):
    """Before and after each file: settings, eight batches, the join, samples, scores, the report as Markdown and HTML."""
    words = [*WORDS, "--system", f"{HERE}:Drawn", "--out", str(tmp_path)]
    number = 0
    while killed(monkeypatch, number, words):
        assert not (tmp_path / FOLDER / "scores.json").exists() or number >= 23
        before = Drawn.asked
        assert main(words) == 0
        assert Drawn.asked - before <= 30 - 4 * max(0, min(7, (number - 1) // 2)), (
            "what was answered is not asked again"
        )
        assert files(tmp_path) == whole
        shutil.rmtree(tmp_path)
        number += 1
    assert number == 2 * 14


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_parts_in_any_order_and_another_number_of_parts_after_a_kill(tmp_path, monkeypatch, whole, order, capsys):
    words = [*WORDS, "--system", f"{HERE}:Drawn", "--out", str(tmp_path)]
    for number, part in enumerate(order):
        assert main([*words, "--part", f"{part}/2"]) == 0
        assert (tmp_path / FOLDER / "scores.json").exists() == bool(number)
    assert "4 of 8 batches are answered" in capsys.readouterr().out
    assert files(tmp_path) == whole
    shutil.rmtree(tmp_path)
    assert killed(monkeypatch, 6, [*words, "--part", "1/2"])
    for part in (3, 1, 2):
        assert main([*words, "--part", f"{part}/3"]) == 0
    assert files(tmp_path) == whole


@pytest.mark.slow
def test_sigkill_at_random(tmp_path, whole):
    """Real processes, two parts at once, ended while they wait for answers or write."""
    random.seed(16)
    for kill in range(3):
        code = f"import sys; from {HERE} import die_at; die_at({random.randrange(1, 12)}) if {kill} else None; "
        code += "from chatpose_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
        words = [*WORDS, "--system", f"{HERE}:Drawn", "--out", str(tmp_path), "--part"]
        running = [
            subprocess.Popen(
                [sys.executable, "-c", code, *words, f"{part}/{2 + kill % 2}"],
                cwd=ROOT,
                env=os.environ | {"SECONDS_A_BATCH": "0.15"},
                stdout=subprocess.DEVNULL,
            )
            for part in (1, 2)
        ]
        if not kill:
            deadline = time.monotonic() + 120
            while not list(tmp_path.rglob("*.jsonl")) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(random.random() * 0.4)
            for process in running:
                process.send_signal(signal.SIGKILL)
        assert all(process.wait(180) in (0, -signal.SIGKILL) for process in running)
    assert main([*WORDS, "--system", f"{HERE}:Drawn", "--out", str(tmp_path)]) == 0
    assert files(tmp_path) == whole


def test_a_batch_that_a_crash_cut_off_is_asked_again(tmp_path, monkeypatch, whole):
    words = [*WORDS, "--system", f"{HERE}:Drawn", "--out", str(tmp_path)]
    assert killed(monkeypatch, 8, words)
    first, second, *_ = sorted((tmp_path / FOLDER / "batches").glob("*.jsonl"))
    first.write_bytes(first.read_bytes()[:-40])
    second.write_bytes(b"")
    assert main(words) == 0
    assert files(tmp_path) == whole


def test_other_settings_are_refused_by_name(tmp_path, capsys):
    words = [*WORDS, "--out", str(tmp_path), "--system"]
    assert main([*words, f"{HERE}:Drawn"]) == 0
    before = files(tmp_path)
    for spec, said in (
        (f"{HERE}:Drawn,batch_size=5", "system.batch_size was 4, is 5"),
        (f"{HERE}:Drawn,silent=true", "system.silent was False, is True"),
        (f"{HERE}:Lazy", f"system.source was '{HERE}:Drawn', is '{HERE}:Lazy'"),
    ):
        assert main([*words, spec]) == 2
        assert said in capsys.readouterr().err
    more = [
        *WORDS[:2],
        "--data",
        f"{HERE}:rows,count=31",
        *WORDS[4:],
        "--out",
        str(tmp_path),
        "--system",
        f"{HERE}:Drawn",
    ]
    assert main(more) == 2
    assert "data.rows was 30, is 31" in capsys.readouterr().err
    assert files(tmp_path) == before


class Fixed(Poses):
    """A task over rows that a test gives, whose numbers nobody needs."""

    def score(self, answers):
        return []


def test_answers_belong_to_their_questions(tmp_path):
    system, rows = Drawn(), given_systems.rows("test", count=6)
    ask.ask(system, Fixed(rows, "rows"), tmp_path)
    assert ask.join(system, Fixed(rows, "rows"), tmp_path) == (2, 2)
    found, keys, groups = ask.read_answers(Fixed(rows, "rows"), tmp_path)
    assert keys == [row.id for row in rows] and groups == [f"clip {i}" for i in range(6)]
    fresh = system.answer([Fixed(rows, "rows").question(row) for row in rows])
    for kept, answer in zip(found, fresh, strict=True):
        assert kept.text == answer.text
        np.testing.assert_allclose(kept.pose.rotations, answer.pose.rotations, atol=1e-6)
    for other, said in (
        (given_systems.rows("test", count=6, changed=True), "line 6: the question of .* was changed"),
        ([*rows[:2], rows[3], rows[2], *rows[4:]], "line 3: answers .* the row is"),
        (rows[:5], "has 6 answers, expected 5"),
        (given_systems.rows("test", count=7), "has 6 answers, expected 7"),
    ):
        with pytest.raises(UserError, match=said):
            ask.read_answers(Fixed(other, "rows"), tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    for damaged in ('{"key": \n', '{"key": 3}\n'):
        (tmp_path / "answers.jsonl").write_text("".join([*lines[:4], damaged, *lines[5:]]))
        with pytest.raises(UserError, match=r"is damaged in line 5 \("):
            ask.read_answers(Fixed(rows, "rows"), tmp_path)
    (tmp_path / "answers.jsonl").write_text('{"key": 3}\n')
    with pytest.raises(UserError, match=r"is damaged .*delete the folder"):
        ask.read_answers(Fixed(rows, "rows"), tmp_path)


def test_a_system_that_does_not_answer_each_question(tmp_path):
    rows = given_systems.rows("test", count=6)
    with pytest.raises(UserError, match="system 'drawn' gave 1 of Answer to 4 questions, expected an Answer to each"):
        ask.ask(given_systems.Lazy(), Fixed(rows, "rows"), tmp_path)
    with pytest.raises(
        UserError, match=r"system 'drawn', questions .* \(given_systems\.py:\d+\): KeyError: 'left hip'$"
    ):
        ask.ask(given_systems.Broken(), Fixed(rows, "rows"), tmp_path)
    with pytest.raises(UserError, match=r"the answer to 'test-0-0-text' cannot be used: rotations .* joint 0 is none"):
        ask.ask(given_systems.Flat(), Fixed(rows, "rows"), tmp_path)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_pose_with_nan_is_left_out_and_counted(tmp_path):
    rows = given_systems.rows("test", count=6)
    task = Fixed(rows, "rows")

    class Half(Drawn):
        def _one(self, question):
            answer = super()._one(question)
            if question.key == rows[2].id:
                answer.pose.rotations[3, 0, 0] = np.nan
            return answer

    ask.ask(Half(), task, tmp_path)
    ask.join(Half(), task, tmp_path)
    found = ask.read_answers(task, tmp_path).answers
    assert [answer.pose is None for answer in found] == [i == 2 for i in range(6)]
    assert found[2].notes == {ask.NOT_FINITE: True}


def test_a_changed_function_is_named(tmp_path):
    ask.claim(tmp_path, {"system": {"function": "mysys:pose", "source": "1a"}})
    with pytest.raises(UserError, match="other settings: the code of mysys:pose changed"):
        ask.claim(tmp_path, {"system": {"function": "mysys:pose", "source": "2b"}})


def test_data_that_were_prepared_anew_are_other_data(tmp_path, capsys):
    words = ["eval", "poses", "--system", f"{HERE}:Drawn", "--quiet", "--drawings", "0", "--out", str(tmp_path)]
    words += ["--data", f"{HERE}:Prepared"]
    given_systems.Prepared.fingerprint = "one"
    assert main(words) == 0 == main(words)
    given_systems.Prepared.fingerprint = "two"
    assert main(words) == 2
    assert "data.contents was 'one', is 'two'" in capsys.readouterr().err


def test_scores_survive_their_file(tmp_path):
    kept = ask.Kept([Answer()] * 3, ["a", "b", "c"], ["clip 0", "clip 0", ""])
    values = {"MPJPE": Value(12.5, 11.0, 14.0, "mm"), "none": Value(float("nan"))}
    samples = {"MPJPE": np.array([1.0, np.nan, 2 / 3])}
    scores = [Scores("poses/rows/C", "Poses", {"protocol": "C"}, values, samples, "MPJPE", counts={"no pose": 1})]
    scores[0] = dataclasses.replace(scores[0], texts={"review": ["8 9\nå", "", "7 7"]})
    ask.write_scores(tmp_path, {"command": "chatpose eval"}, scores, kept)
    text = (tmp_path / "scores.json").read_text()
    assert "NaN" not in text and json.loads(text)["command"] == "chatpose eval"
    found = Scores.from_json(json.loads(text)["scores"][0])
    assert found.values["MPJPE"] == values["MPJPE"]
    assert np.isnan(found.values["none"].value) and found.counts == {"no pose": 1} and found.table == "poses/rows/C"
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [
        {"poses/rows/C": {"MPJPE": 1.0, "review": "8 9\nå"}},
        {"poses/rows/C": {"review": ""}},
        {"poses/rows/C": {"MPJPE": 0.666667, "review": "7 7"}},
    ]
    assert [line["group"] for line in lines] == ["clip 0", "clip 0", ""]


def test_notes_are_counted():
    answers = [Answer(notes={"a": True, "b": 0.5}), Answer(notes={"a": False, "c": True}), Answer(notes={"a": True})]
    assert counts_of(answers) == {"a": 2, "c": 1}

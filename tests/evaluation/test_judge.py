"""The task "judge" against a stand-in judge: the formula, both positions, reviews without scores, and what is kept."""

import json
import re

import numpy as np
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.data.example import Example
from chatpose_jax.endpoint import KEY, URL
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.scores import Scores
from chatpose_jax.evaluation.system import Answer
from chatpose_jax.evaluation.tasks.judge import Judge, parsed, review_of

from ..data.readers.llava_bench_files import write_llava_bench

KINDS = ("conv", "detail", "complex")
RATED = {"good": 9, "fair": 6, "poor": 2, "reference": 8}


def rows(images=4):
    found = []
    for number in range(3 * images):
        kind = KINDS[number % 3]
        extras = {
            "question_id": number,
            "category": kind,
            "question": f"Question {number}?",
            "reference": f"reference answer {number}",
            "captions": ("A donut.", "Food on a table."),
            "boxes": np.array([[0.37, 0.584, 0.504, 0.709]]),
            "box_names": ("donut",),
            "role": "Assistant",
            "prompt": f"Judge {kind}.",
        }
        messages = [
            {"role": "user", "content": extras["question"]},
            {"role": "assistant", "content": extras["reference"]},
        ]
        found.append(Example(str(number), "instruction", messages, extras=extras, group=f"image {number // 3}"))
    return found


@pytest.fixture
def endpoint(server, monkeypatch):
    monkeypatch.setenv(URL, server.url)
    monkeypatch.setenv(KEY, "secret")
    return server


def rate(messages):
    """A judge that knows the words, and likes the answer that stands first a little better."""
    texts = re.findall(r"\[Assistant \d\]\n(.*)\n\n\[End", messages[1]["content"])
    first, second = (RATED.get(text.split()[0] if text else "", 1) for text in texts)
    return f"{first + 0.5} {second}\nBecause of the words."


def judge(tmp_path, data=None, **options):
    return Judge(data or rows(), "llava_bench", judge="m", cache=str(tmp_path / "cache"), **options)


WORDS = ("good", "fair", "poor", "good", "poor", "fair", "fair", "good", "good", "poor", "poor", "good")
ANSWERS = [Answer(f"{word} answer {number}") for number, word in enumerate(WORDS)]


def test_values_are_ratios_of_mean_scores(endpoint, tmp_path, capsys):
    endpoint.answers(rate)
    (found,) = judge(tmp_path).score(ANSWERS)
    given = np.array([RATED[word] for word in WORDS], float)
    expected = {kind: 100 * given[i::3].mean() / 8.5 for i, kind in enumerate(KINDS)}
    expected["all"] = 100 * given.mean() / 8.5
    assert list(found.values) == [*KINDS, "all"]
    for name, value in found.values.items():
        assert value.value == pytest.approx(expected[name], abs=1e-6) and value.low <= value.value <= value.high
        assert value.better == "higher"
    assert found.values["all"].low < found.values["all"].high
    np.testing.assert_array_equal(found.samples["score"], given)
    np.testing.assert_array_equal(found.samples["score of the reference"], np.full(12, 8.5))
    assert found.texts["review"][3] == "8.5 9\nBecause of the words."
    assert found.facts["judge"] == "m, temperature 0.2" and found.facts["order of answers"] == "reference first"
    assert found.facts["interval"].startswith("95 % bootstrap over 4 images") and not found.counts
    assert "12 of 12 reviews are asked of 'm', about " in capsys.readouterr().err
    assert Scores.from_json(json.loads(json.dumps(found.to_json()))).values == found.values
    body = endpoint.asked[0][1]
    assert body["temperature"] == 0.2 and body["max_tokens"] == 1024


def test_the_judge_is_shown_all_of_the_row():
    row = rows()[1]
    content = review_of(row, "mine")[1]["content"]
    assert content == (
        "[Context]\nA donut.\nFood on a table.\n\ndonut: [0.37, 0.584, 0.504, 0.709]\n\n[Question]\nQuestion 1?\n\n"
        "[Assistant 1]\nreference answer 1\n\n[End of Assistant 1]\n\n[Assistant 2]\nmine\n\n[End of Assistant 2]\n\n"
        "[System]\nJudge detail.\n\n"
    )
    swapped = review_of(row, "mine", True)[1]["content"]
    assert "[Assistant 1]\nmine\n" in swapped and "[Assistant 2]\nreference answer 1\n" in swapped


def test_both_positions_are_averaged(endpoint, tmp_path):
    endpoint.answers(rate)
    (found,) = judge(tmp_path, swap="both").score(ANSWERS)
    given = np.array([RATED[word] for word in WORDS], float)
    np.testing.assert_allclose(found.samples["score"], given + 0.25)
    np.testing.assert_allclose(found.samples["score of the reference"], 8.25)
    assert found.values["all"].value == pytest.approx(100 * (given.mean() + 0.25) / 8.25)
    assert found.texts["review"][0].startswith("8.5 9\n")
    assert found.texts["review, answer first"][0].startswith("9.5 8\n")
    assert found.facts["order of answers"] == "both orders, averaged" and len(endpoint.asked) == 24


def test_reviews_are_kept_and_read_without_an_endpoint(endpoint, tmp_path, monkeypatch, capsys):
    endpoint.answers(rate)
    first = judge(tmp_path).score(ANSWERS)[0]
    asked = len(endpoint.asked)
    monkeypatch.delenv(URL)
    monkeypatch.delenv(KEY)
    again = judge(tmp_path).score(ANSWERS)[0]
    assert again.to_json() == first.to_json() and again.texts == first.texts and len(endpoint.asked) == asked
    capsys.readouterr()
    with pytest.raises(UserError, match=f"set {KEY}"):
        judge(tmp_path).score([Answer("another"), *ANSWERS[1:]])


def test_a_review_without_scores_is_asked_for_again_a_few_times_and_counted(endpoint, tmp_path):
    calls = {}

    def moody(messages):
        number = int(re.search(r"Question (\d+)", messages[1]["content"])[1])
        calls[number] = calls.get(number, 0) + 1
        if number == 0 and calls[number] < 3:
            return "Both are fine.\n8 9"
        return "I would rather not say." if number == 1 else rate(messages)

    endpoint.answers(moody)
    (found,) = judge(tmp_path).score(ANSWERS)
    assert calls[0] == calls[1] == 3 and calls[2] == 1 and found.facts["samples"] == "11 of 12"
    assert found.counts == {"reviews without two scores": 1}
    assert np.isfinite(found.samples["score"]).tolist() == [True, False] + [True] * 10
    given = np.array([RATED[WORDS[i]] for i in (4, 7, 10)])
    assert found.values["detail"].value == pytest.approx(100 * given.mean() / 8.5)
    assert found.texts["review"][1] == "I would rather not say."
    before = dict(calls)
    assert judge(tmp_path).score(ANSWERS)[0].to_json() == found.to_json() and calls == before


def test_with_both_positions_one_review_is_enough(endpoint, tmp_path):
    endpoint.answers(lambda messages: "none" if "1]\ngood answer 0\n" in messages[1]["content"] else rate(messages))
    (found,) = judge(tmp_path, swap="both", tries=1).score(ANSWERS)
    assert found.samples["score"][0] == 9 and found.counts == {"reviews without two scores": 1}


def test_refusals_and_empty_answers_are_counted(endpoint, tmp_path):
    def refuse(handler):
        refused = {"choices": [{"message": {"content": "", "refusal": "no"}, "finish_reason": "stop"}]}
        handler.send(200, json.dumps(refused).encode())

    endpoint.then = refuse
    (found,) = judge(tmp_path, rows(1), tries=2).score([Answer("good"), Answer("", notes={"no": True}), Answer("good")])
    assert found.counts == {"no": 1, "reviews without two scores": 3, "answers without words": 1}
    assert np.isnan(found.values["all"].value) and found.texts["review"][0] == "(the model refused: no)"


@pytest.mark.parametrize(
    ("review", "scores"),
    [
        ("8 9", (8, 9)),
        ("8, 9\nwhy", (8, 9)),
        ("\n 7.5  10 \nwhy", (7.5, 10)),
        ("8;9", (8, 9)),
        ("8", None),
        ("8 9 7", None),
        ("Scores: 8 9", None),
        ("85 90", None),
        ("-1 5", None),
        ("", None),
    ],
)
def test_scores_of_a_review(review, scores):
    found = parsed(review)
    assert (found.reference, found.candidate) == scores if scores else np.isnan(found.reference)
    if scores:
        assert (parsed(review, True).candidate, parsed(review, True).reference) == scores


def test_the_command_on_the_published_files(endpoint, tmp_path, monkeypatch, capsys):
    """Table 4 as it is typed: system and judge behind one endpoint. Typed again, nothing is asked and nothing changes."""
    monkeypatch.chdir(tmp_path)
    write_llava_bench(tmp_path / "original")
    assert main(["data", "prepare", "llava_bench", "--source", "original", "--out", "data/llava_bench"]) == 0

    def answer(messages):
        if messages[0]["role"] == "system":
            return rate(messages)
        assert messages[0]["content"][0]["type"] == "image_url"
        return f"good answer to {messages[0]['content'][1]['text']}"

    endpoint.answers(answer)
    words = ["eval", "judge", "--system", "endpoint,model=writer", "--data", "llava_bench", "--set", "judge=m"]
    assert main([*words, "--quiet", "--out", "first"]) == 0
    folder = "judge/llava_bench/writer"
    found = json.loads((tmp_path / "first" / folder / "scores.json").read_text())["scores"][0]
    assert found["values"]["all"]["value"] == pytest.approx(100 * 9 / 1.5) and found["facts"]["samples"] == "6"
    samples = [json.loads(line) for line in (tmp_path / "first" / folder / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["samples"]["judge/llava_bench"] == {
        "score": 9.0,
        "score of the reference": 1.5,
        "review": "1.5 9\nBecause of the words.",
    }
    asked = len(endpoint.asked)
    assert asked == 12
    monkeypatch.delenv(KEY)
    assert main([*words, "--quiet", "--out", "again"]) == 0 and len(endpoint.asked) == asked
    for file in ("scores.json", "samples.jsonl", "answers.jsonl"):
        assert (tmp_path / "first" / folder / file).read_bytes() == (tmp_path / "again" / folder / file).read_bytes()
    assert "secret" not in "".join(p.read_text("utf8", "ignore") for p in tmp_path.rglob("*.json*"))


def test_what_is_missing_is_said(tmp_path, endpoint):
    with pytest.raises(UserError, match="--set judge=NAME"):
        Judge(rows(), "llava_bench")
    with pytest.raises(UserError, match="has no 'category', which the judge needs; expected rows of LLaVA-Bench"):
        judge(tmp_path, [Example("a", "text", [{"role": "user", "content": "?"}])])
    endpoint.then = lambda handler: handler.send(401, b'{"error": {"message": "wrong key"}}')
    with pytest.raises(UserError, match="refuses the request for 'm': 401 wrong key"):
        judge(tmp_path).score(ANSWERS)

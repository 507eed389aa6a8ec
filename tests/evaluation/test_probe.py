"""The probe: ranks of answers whose likelihoods are known, heads on states that are known, and the command on a model."""

import json

import numpy as np
import pytest

from chatpose_jax.chat import DEMO, load
from chatpose_jax.cli.main import main
from chatpose_jax.data.synthetic.families import POSTURES
from chatpose_jax.data.synthetic.situations import SITUATIONS, shared_words, stems
from chatpose_jax.evaluation import probe

RIGHT = np.array(probe.labels())
MANY = np.ones(len(RIGHT), bool)


def weighed(bonus: np.ndarray, prior: np.ndarray, seed=0) -> probe.Weighed:
    """A model whose answers have a prior (15,), and a bonus (N, 15) for the situation."""
    random = np.random.default_rng(seed)
    alone = np.repeat(prior, 3)[None] + random.normal(size=(3, 45))
    given = alone + np.repeat(bonus, 3, axis=1)[:, None]
    states = random.normal(size=(len(RIGHT), 3, 2, 16))
    return probe.Weighed(given, alone, np.tile(np.arange(3, 48), (3, 1)), {1: states, 2: states + 1})


def test_every_posture_has_answers_that_no_other_has():
    assert list(probe.ANSWERS) == list(POSTURES)
    words = [answer for each in probe.ANSWERS.values() for answer in each]
    assert len(set(words)) == 3 * len(POSTURES)


def test_words_are_shared_by_their_stems():
    assert shared_words(stems("is arrested and kneels"), stems("The person is kneeling"))
    assert shared_words(stems("sleepwalks"), stems("is walking"))
    assert not shared_words(stems("makes an angel in the snow"), stems("takes a step over the wall"))
    named = {situation.words for situation in SITUATIONS if probe.names_posture(situation)}
    assert "is arrested and kneels" in named and "proposes marriage" not in named


def test_a_model_that_knows_is_always_right_whatever_it_says_most():
    """What a model says of every situation counts against it: the likeliest answer is always "stand", the measure is not fooled."""
    prior = np.zeros(15)
    prior[0] = 30
    found = probe.evaluate_probe(weighed(np.eye(15)[RIGHT] * 2, prior))
    assert found.table["pmi"]["first"].value == 100 and found.table["pmi"]["rank"].value == 1
    assert found.wordings.min() == 100
    said = found.table["likelihood"]
    np.testing.assert_allclose(said["first"].value, 100 / 15)  # every posture counts the same
    stands = np.mean([SITUATIONS[i].posture == "stand" for i in np.flatnonzero(found.counted)])
    np.testing.assert_allclose(said["first, plain"].value, 100 * stands)


def test_a_model_that_knows_nothing_is_at_chance():
    found = probe.evaluate_probe(weighed(np.zeros((len(RIGHT), 15)), np.random.default_rng(1).normal(size=15)))
    assert found.table["pmi"]["rank"].value == pytest.approx(probe.CHANCE["rank"])  # all equal
    assert found.table["pmi"]["first"].value == pytest.approx(probe.CHANCE["first"])


def test_ranks_by_hand():
    scores = np.zeros((3, 15))
    scores[0, :5] = [5, 4, 3, 2, 1]
    scores[1, 2] = 1
    rank, first = probe.ranks(scores, [2, 2, 7])
    np.testing.assert_allclose(rank, [3, 1, 8])
    np.testing.assert_allclose(first, [0, 1, 1 / 15])


def test_a_head_on_states_finds_what_is_there_and_only_that():
    random = np.random.default_rng(0)
    told = np.eye(15)[RIGHT] + 0.1 * random.normal(size=(len(RIGHT), 15))
    known = probe.rank_summary(probe.ridge_scores(told, RIGHT), RIGHT, MANY)
    assert known["first"].value > 95
    nothing = probe.rank_summary(probe.ridge_scores(random.normal(size=(len(RIGHT), 15)), RIGHT), RIGHT, MANY)
    assert nothing["rank"].low < 8 < nothing["rank"].high
    same = probe.ridge_scores(np.ones((len(RIGHT), 4)), RIGHT)
    np.testing.assert_allclose(
        same, 1 / 15, atol=1e-6
    )  # no state tells anything: all postures alike, none preferred for its number


@pytest.fixture(scope="module")
def folder():
    return DEMO


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_question_and_answer_are_what_the_model_would_read(folder, form):
    model = load(folder)
    for wording in probe.FORMS[form]:
        question, answers = probe._encode(model, form, wording, "hails a taxi")
        texts = [wording[1].format(answer=answer) for each in probe.ANSWERS.values() for answer in each]
        for ids, text in zip(answers, texts, strict=True):
            assert model.processor.decode(ids).endswith(text)  # pieces of the tiny tokenizer cross words
            whole = f"{wording[0].format(situation='hails a taxi')} {text}"
            if form == "plain":
                assert question + ids == [model.config.bos_token_id, *model.processor.tokenizer.encode(whole)]
            else:
                messages = [{"role": "user", "content": wording[0].format(situation="hails a taxi")}]
                messages.append({"role": "assistant", "content": text})
                encoded = model.processor.encode(messages, add_generation_prompt=False)
                assert [*question, *ids, model.config.eos_token_id] == encoded.input_ids.tolist()


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    few = [i for i, situation in enumerate(SITUATIONS) if not probe.names_posture(situation)][:12:2]
    monkeypatch.setattr(probe, "SITUATIONS", tuple(SITUATIONS[i] for i in few))
    file = tmp_path / "new" / "probe.json"
    assert main(["probe", str(folder), "--form", "plain", "--batch", "9", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "| chance | 6.7 | 8.0 | 6.7 |" in shown and "6 indirect questions of 6" in shown
    found = json.loads(file.read_text())
    assert found["format"] == "chatpose-probe" and found["form"] == "plain"
    assert [row["words"] for row in found["situations"]] == [SITUATIONS[i].words for i in few]
    for way, row in found["table"].items():
        ranks = [each["rank"][way] for each in found["situations"]]
        assert row["rank, plain"]["value"] == pytest.approx(np.mean(ranks))
    for way in ("pmi", "likelihood", "per token"):
        for each in found["situations"]:
            scores = np.array(each["scores"][way])
            assert each["rank"][way] == 1 + (scores > scores[list(POSTURES).index(each["posture"])]).sum()
    file = tmp_path / "left.json"
    assert main(["probe", str(tmp_path / "nothing"), "--json", str(file)]) == 2 and not file.exists()
    assert "no such folder" in capsys.readouterr().err

"""BLEU beside sacrebleu, ROUGE-L beside a table of longest common subsequences."""

import re

import numpy as np
import pytest

from chatpose_jax.evaluation.words import bleu, bleu_counts, bleu_of, longest_common, rouge_l, tokens_13a

WORDS = re.split(" ", "the person stands with left right arm raised bent at 90 degrees , . knee is 1.5 - forward")
MARKS = [
    "He's 1,000.5 m away - isn't he?",
    'left-hand; 3-4 times (90°)... "so" &quot;it&quot; &amp;lt; a/b',
    "<skipped>One\nline-\nbroken  ",
    "A. B, 2. 3, x.5 5.x [a] {b} c~d `e` f_g h^i $5 #6 @7 100% !",
    "",
]


def sentences(rng, count):
    return [" ".join(rng.choice(WORDS, rng.integers(1, 16))) for _ in range(count)]


@pytest.fixture(scope="module")
def sacrebleu():
    return pytest.importorskip("sacrebleu")


def test_tokens_beside_sacrebleu(sacrebleu):
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    for text in [*MARKS, *(chr(code) + "a1" + chr(code) + " " + chr(code) for code in range(32, 127))]:
        assert tokens_13a(text) == tokenize(text.rstrip()).split(), text


@pytest.mark.parametrize("several", [1, 3])
def test_bleu_beside_sacrebleu(sacrebleu, several):
    rng = np.random.default_rng(several)
    for count in (1, 2, 5, 40):
        texts = sentences(rng, count)
        references = [sentences(rng, several) for _ in range(count)]
        if count == 40:
            texts[:5], references[:5] = MARKS, [[mark + " more"] * several for mark in MARKS]
        streams = [[row[i] for row in references] for i in range(several)]
        expected = sacrebleu.corpus_bleu(texts, streams).score
        found = bleu(texts, references, [""] * count)
        np.testing.assert_allclose(found.value, expected, atol=1e-9)
        if count > 1:
            assert found.low <= found.value + 1e-9 or count < 5
            assert found.low < found.high


def test_bleu_of_rows_with_different_numbers_of_references(sacrebleu):
    texts = ["the left arm is raised high", "the person stands on one leg now"]
    references = [["the left arm is raised", "a raised left arm"], ["the person stands on the left leg"]]
    expected = sacrebleu.corpus_bleu(texts, [[references[0][0], references[1][0]], [references[0][1], None]]).score
    np.testing.assert_allclose(bleu(texts, references, ["", ""]).value, expected, atol=1e-9)


def test_bleu_at_its_ends(sacrebleu):
    assert bleu(["a b c d e"], [["a b c d e"]], [""]).value == pytest.approx(100)
    for texts in (["x y z"], [""], ["a b c"], ["a a a a a"], ["a x y z w"]):
        expected = sacrebleu.corpus_bleu(texts, [["a b c d e"]]).score
        np.testing.assert_allclose(bleu_of(bleu_counts(texts, [["a b c d e"]]).sum(0)), expected, atol=1e-9)
    assert np.isnan(bleu([], [], []).value)
    with pytest.raises(ValueError, match="text 0 has no reference"):
        bleu(["a"], [[]], [""])


def common_by_table(first, second):
    """The textbook's table."""
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if one == other else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_rouge_l_beside_a_table():
    rng = np.random.default_rng(0)
    texts = [*sentences(rng, 60), "Left-Arm, raised!", ""]
    references = [sentences(rng, int(rng.integers(1, 4))) for _ in texts[:-2]] + [["the left arm is RAISED"], ["a"]]
    expected = []
    for text, several in zip(texts, references):
        scores = []
        for reference in several:
            one, two = (re.sub("[^a-z0-9]+", " ", each.lower()).split() for each in (text, reference))
            length = common_by_table(one, two)
            precision, recall = (length / max(len(each), 1) for each in (one, two))
            scores.append(200 * precision * recall / (precision + recall) if length else 0)
        expected.append(max(scores))
    np.testing.assert_allclose(rouge_l(texts, references), expected, rtol=1e-12)
    assert rouge_l(["Left-Arm, raised!"], [["the left arm is RAISED"]])[0] == pytest.approx(75)


def test_longest_common_subsequence_of_long_texts():
    rng = np.random.default_rng(1)
    for _ in range(20):
        first, second = (rng.integers(0, 9, rng.integers(0, 150)).astype(str).tolist() for _ in range(2))
        assert longest_common(first, second) == common_by_table(first, second)

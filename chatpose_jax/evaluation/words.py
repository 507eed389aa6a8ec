"""BLEU and ROUGE-L of texts with one or more references each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from chatpose_jax.evaluation.scores import Value, bootstrap

ORDER = 4
"""Words of the longest n-gram of BLEU-4."""
BLEU_RULE = (
    "corpus BLEU-4 as sacrebleu computes it: tokenizer 13a, case kept, smoothing exp, the closest reference length"
)
ROUGE_RULE = "F1 against the best reference, averaged over the samples; words of a-z and 0-9 in lower case, no stemming"
# 13a splits off ASCII marks. A full stop, a comma stay in numbers; so does a dash before a digit.
_SPLITS = (
    (re.compile(r"([!-&(-+/:-@\[-`{-~])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}


def tokens_13a(text: str) -> list[str]:
    """The tokens of mteval-v13a, WMT's rule for European languages."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, letter in _ENTITIES.items():
        text = text.replace(entity, letter)
    text = f" {text} "
    for pattern, parts in _SPLITS:
        text = pattern.sub(parts, text)
    return text.split()


def bleu_counts(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, 10) float64, from which BLEU is computed: matching n-grams of 1 to 4 words, all n-grams of the text, its length, that of the reference.

    An n-gram matches at most as often as it occurs in any one reference. Of several references, the length closest to that of the text counts; of
    two equally close ones the shorter. Raises ValueError for a text without a reference.
    """
    found = np.zeros((len(texts), 2 * ORDER + 2))
    for row, (text, several) in enumerate(zip(texts, references, strict=True)):
        if not several:
            raise ValueError(f"text {row} has no reference")
        words, others = tokens_13a(text), [tokens_13a(each) for each in several]
        most: Counter[tuple[str, ...]] = Counter()
        for other in others:
            most |= _grams(other)
        for gram, count in _grams(words).items():
            found[row, len(gram) - 1] += min(count, most[gram])
            found[row, ORDER + len(gram) - 1] += count
        found[row, -2:] = len(words), min((len(other) for other in others), key=lambda n: (abs(n - len(words)), n))
    return found


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 in percent of sums (..., 10) of ``bleu_counts``. 0 where no word matches, and where no text has four words.

    Smoothing "exp": the k-th precision without a match counts as 1 / (2^k · its number of n-grams).
    """
    matches, totals = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER]
    length, wanted = sums[..., -2], sums[..., -1]
    zeros = 2.0 ** np.cumsum(matches == 0, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(matches > 0, matches, 1 / zeros) / totals
        score = np.exp(np.minimum(1 - wanted / length, 0) + np.log(precisions).mean(-1))
    return 100 * np.where((totals > 0).all(-1) & (matches > 0).any(-1), score, 0.0)


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[str]) -> Value:
    """Corpus BLEU-4 in percent, by ``BLEU_RULE``, with its interval over groups (``scores.bootstrap``). NaN without texts."""
    counts = bleu_counts(texts, references)
    about = {"unit": "", "better": "higher", "digits": 2}
    if not len(counts):
        return Value(float("nan"), **about)  # type: ignore[arg-type]
    return Value(float(bleu_of(counts.sum(0))), *bootstrap(counts, groups, bleu_of), **about)  # type: ignore[arg-type]


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(N,) float64, ROUGE-L F1 in percent of each text and its best reference, by ``ROUGE_RULE``. 0 for a text without words.

    Source: Lin 2004, and google-research's rouge_score without stemming.
    """
    return np.array(
        [
            max(_overlap(_words(text), _words(each)) for each in several)
            for text, several in zip(texts, references, strict=True)
        ]
    )


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _overlap(first: Sequence[str], second: Sequence[str]) -> float:
    """F1 of precision and recall, both of the longest common subsequence, in percent."""
    return 200 * longest_common(first, second) / (len(first) + len(second)) if first and second else 0.0


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence. A bit for each word of ``first`` makes a row of the table one addition (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        met = row & places.get(word, 0)
        row = ((row + met) | (row - met)) & full
    return (full & ~row).bit_count()


def _grams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1))

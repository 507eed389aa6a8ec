"""What a base knows of poses before any training: it is asked what people do who propose marriage, and weighs descriptions of 15 postures as answers.

The questions are the situations of the generated set, the answers ``ANSWERS``. A posture's score is a pointwise mutual information: the
log-probability of the answer given the question, less that given the same question about ``NEUTRAL``. Without this, the likeliest words win
whatever is asked (Holtzman et al., EMNLP 2021, "Surface form competition"). The score is the mean over all wordings of question and answer.
Wordings and score were chosen before any model was probed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from chatpose_jax.chat import ChatPose
from chatpose_jax.data.synthetic.families import POSTURES
from chatpose_jax.data.synthetic.situations import SITUATIONS, Situation, shared_words, stems
from chatpose_jax.evaluation.scores import Value, with_intervals
from chatpose_jax.likelihood import first_layers, likelihoods
from chatpose_jax.settings import one_line

Form = Literal["chat", "plain"]

ANSWERS: dict[str, tuple[str, str, str]] = {
    "stand": ("stands upright", "is standing on both feet", "is in a standing position"),
    "step": ("takes a step", "is walking with one foot in front of the other", "is in a walking position"),
    "run": ("runs", "is running with one knee in front", "is in a running position"),
    "kick": ("kicks with one leg", "is kicking forward with one leg", "is in a kicking position"),
    "squat": ("squats", "is squatting with the hips low", "is in a squatting position"),
    "lunge": ("lunges forward", "is in a lunge with one foot far in front", "is in a lunging position"),
    "kneel": ("kneels on both knees", "is kneeling upright on both knees", "is in a kneeling position on both knees"),
    "half_kneel": ("kneels on one knee", "is down on one knee", "is in a kneeling position on one knee"),
    "sit": ("sits on a chair", "is sitting on a seat", "is in a sitting position on a chair"),
    "floor_sit": (
        "sits on the floor",
        "is sitting on the ground with the legs in front",
        "is in a sitting position on the floor",
    ),
    "bend": ("bends forward at the hips", "is bending down", "is in a bent position with straight legs"),
    "crawl": ("is on hands and knees", "is crawling on all fours", "is in a crawling position"),
    "supine": ("lies on the back", "is lying face up", "is in a lying position on the back"),
    "side": ("lies on one side", "is lying sideways", "is in a lying position on one side"),
    "one_leg": ("stands on one leg", "is balancing on one leg with the other knee raised", "is in a standing position on one leg"),
}  # fmt: skip
"""Three wordings of each posture, after "The person"."""
NEUTRAL = "does something"
FORMS: dict[Form, tuple[tuple[str, str], ...]] = {
    "chat": (
        ("What pose does a person take who {situation}?", "The person {answer}."),
        ("How would a person who {situation} hold the body?", "The person {answer}."),
        ("Imagine a person who {situation}. In which posture is the body?", "The person {answer}."),
    ),
    "plain": (
        ("Imagine a person who {situation}. The person", "{answer}."),
        ("Somebody {situation}. In this picture, the person", "{answer}."),
        ("Question: In which posture is a person who {situation}? Answer: The person", "{answer}."),
    ),
}
"""(question, answer). "chat": a message and an answer in the model's own template. "plain": a text and how it goes on, for a base without chat."""
PENALTIES = (0.03, 0.3, 3.0, 30.0)
"""Of the ridge regressions, in parts of the mean squared length of the states."""


def names_posture(situation: Situation) -> bool:
    """Whether a situation shares a word with an answer, so that it is no indirect question: "is arrested and kneels"."""
    return bool(shared_words(stems(situation.words), _answer_stems()))


@functools.cache
def _answer_stems() -> frozenset[str]:
    return stems(" ".join(words for wordings in ANSWERS.values() for words in wordings))


class Weighed(NamedTuple):
    """What a model says of all situations. N situations, W wordings of the question, A = 15 · 3 answers, posture by posture.

    given: (N, W, A) log-probabilities, in nats. alone: (W, A), given the neutral question. tokens: (W, A) tokens of the answers. states: by layer,
    (N, W, 2, D): of the question's last token, and the mean over its tokens.
    """

    given: np.ndarray
    alone: np.ndarray
    tokens: np.ndarray
    states: dict[int, np.ndarray]

    def __repr__(self) -> str:
        return one_line(self)


def weigh(model: ChatPose, form: Form = "chat", batch: int = 16, label: str | None = None) -> Weighed:
    """Asks a model. batch: answers that run together, see ``likelihood.likelihoods``. label: of a progress bar; None shows none.

    The states are those of the last layer and of the one in the middle, which may be the same layer. Raises what ``likelihoods`` raises.
    """
    config, params = model.config, model.params
    wordings, layers = FORMS[form], config.text.num_layers
    halves = first_layers(config, params, max(1, layers // 2))
    bar = tqdm(
        total=(len(SITUATIONS) + 1) * len(wordings), desc=label, unit="question", disable=label is None, leave=False
    )
    rows: list[np.ndarray] = []
    tokens: list[list[int]] = []
    states: dict[int, list[np.ndarray]] = {halves[0].text.num_layers: [], layers: []}
    for words in (*(situation.words for situation in SITUATIONS), NEUTRAL):
        for wording in wordings:
            question, answers = _encode(model, form, wording, words)
            found = likelihoods(config, params, question, answers, batch)
            rows.append(found.log_probabilities)
            tokens.append([len(answer) for answer in answers])
            middle = likelihoods(*halves, question, []).states
            for layer, each in zip(states, (middle, found.states)):
                states[layer].append(np.stack([each[-1], each.mean(0)]))
            bar.update()
    bar.close()
    shape = (len(SITUATIONS) + 1, len(wordings))
    given = np.stack(rows).reshape(*shape, -1)
    kept = {layer: np.stack(each).reshape(*shape, 2, -1)[:-1] for layer, each in states.items()}
    return Weighed(given[:-1], given[-1], np.array(tokens).reshape(*shape, -1)[-1], kept)


def _encode(model: ChatPose, form: Form, wording: tuple[str, str], words: str) -> tuple[list[int], list[list[int]]]:
    """Ids of a question and of all answers to it."""
    processor = model.processor
    question, frame = wording[0].format(situation=words), wording[1]
    texts = [frame.format(answer=answer) for each in ANSWERS.values() for answer in each]
    if form == "chat":
        prompt = processor.encode([{"role": "user", "content": question}]).input_ids.tolist()
        return prompt, [processor.answer_ids(text) for text in texts]
    # A space belongs to the word after it, so question and answer are tokenised together, and cut where an answer begins.
    start = [model.config.bos_token_id] if processor.template.begin else []
    prompt = start + processor.tokenizer.encode(question)
    whole = [start + processor.tokenizer.encode(f"{question} {text}") for text in texts]
    cut = min(_common(prompt, ids) for ids in whole)
    return prompt[:cut], [ids[cut:] for ids in whole]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def posture_scores(found: Weighed) -> dict[str, np.ndarray]:
    """(N, 15) for each way to score: "pmi", the measure; and for comparison "likelihood", without the neutral question, and "per token"."""

    def mean(scores: np.ndarray) -> np.ndarray:
        return scores.reshape(len(scores), -1, len(ANSWERS), scores.shape[-1] // len(ANSWERS)).mean(axis=(1, 3))

    return {
        "pmi": mean(found.given - found.alone),
        "likelihood": mean(found.given),
        "per token": mean(found.given / found.tokens),
    }


def ridge_scores(states: np.ndarray, postures: Sequence[int]) -> np.ndarray:
    """(N, 15) scores of a linear head on frozen states (N, D), each situation by a head that was fitted on the others.

    Least squares from standardised states to the posture, each posture of the same weight, so that a head that knows nothing gives all 15 the same
    score. The penalty is the one of ``PENALTIES`` with the least error when each of the others is left out in turn.
    """
    given = np.asarray(states, np.float64)
    given = (given - given.mean(0)) / (given.std(0) + 1e-9)
    labels = np.asarray(postures)
    kernel = given @ given.T / given.shape[1]
    places = np.arange(len(labels))
    return np.concatenate([_left_out(kernel, labels, places[places != i], int(i)) for i in places])


def _left_out(kernel: np.ndarray, labels: np.ndarray, others: np.ndarray, place: int) -> np.ndarray:
    """(1, 15) scores of one row by a head on the others."""
    known = np.stack([others[others != i] for i in others])
    target, share = np.eye(len(POSTURES))[labels[others]], 1 / np.bincount(labels[others])[labels[others]]

    def error(penalty: float) -> float:
        found = _ridge(kernel, labels, known, others, penalty)
        return float(share @ np.square(found - target).sum(-1))

    return _ridge(kernel, labels, others[None], np.array([place]), min(PENALTIES, key=error))


def _ridge(kernel: np.ndarray, labels: np.ndarray, known: np.ndarray, asked: np.ndarray, penalty: float) -> np.ndarray:
    """(M, 15) scores of M rows, each by a weighted kernel ridge regression with an intercept on its own known rows (M, K)."""
    target = np.eye(len(POSTURES))[labels[known]]
    weights = (target / np.maximum(target.sum(1, keepdims=True), 1)).sum(-1)
    weights /= weights.sum(1, keepdims=True)
    middle = np.einsum("mk,mkc->mc", weights, target)
    inner = kernel[known[:, :, None], known[:, None]]
    towards = np.einsum("mkl,ml->mk", inner, weights)
    height = np.einsum("mk,mk->m", weights, towards)[:, None]
    centred = inner - towards[:, :, None] - towards[:, None] + height[:, None]
    row = kernel[asked[:, None], known]
    row = row - (row * weights).sum(1, keepdims=True) - towards + height
    size = np.maximum(np.trace(centred, axis1=1, axis2=2) / known.shape[1], 1e-12)[:, None]
    scaled = centred + np.eye(known.shape[1]) * (penalty * size / (weights * known.shape[1]))[:, None]
    return middle + np.einsum("mk,mkc->mc", row, np.linalg.solve(scaled, target - middle[:, None]))  # type: ignore[no-any-return]


def ranks(scores: np.ndarray, postures: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each situation the rank of the right posture, 1 is best, and whether it is first. Of k equal scores each has the mean rank, and is first in
    a kth. scores: (N, 15).
    """
    own = scores[np.arange(len(scores)), np.asarray(postures)][:, None]
    above, equal = (scores > own).sum(1), (scores == own).sum(1)
    return 1 + above + (equal - 1) / 2, np.where(above == 0, 1 / equal, 0.0)


CHANCE = {"first": 100 / len(POSTURES), "rank": (1 + len(POSTURES)) / 2}


def rank_summary(scores: np.ndarray, postures: Sequence[int], counted: np.ndarray) -> dict[str, Value]:
    """How often the right posture is first, and its mean rank, over the situations that count; with 95 % intervals by a bootstrap over situations.

    "first", "rank": every posture counts the same, so that a model that always says the same posture is right in 1 of 15. "first, plain" and
    "rank, plain": every situation counts the same.
    """
    labels = np.asarray(postures)[counted]
    rank, first = (each[counted] for each in ranks(scores, postures))
    weights = 1 / np.bincount(labels, minlength=len(POSTURES))[labels]
    one = np.ones(len(labels))
    rows = np.stack([first * weights, rank * weights, weights, first, rank, one], 1)

    def means(sums: np.ndarray) -> np.ndarray:
        return np.concatenate([sums[..., :2] / sums[..., 2:3], sums[..., 3:5] / sums[..., 5:6]], axis=-1)

    middle, low, high = with_intervals(rows, [""] * len(rows), means)
    names = ("first", "rank", "first, plain", "rank, plain")
    out = {}
    for i, name in enumerate(names):
        share = name.startswith("first")
        times = 100.0 if share else 1.0
        out[name] = Value(
            float(middle[i] * times),
            float(low[i] * times),
            float(high[i] * times),
            "%" if share else "",
            "higher" if share else "lower",
        )
    return out


class Probe(NamedTuple):
    """A row for each way to answer, and what it rests on.

    scores: (N, 15) by way. table: ``rank_summary`` by way. counted: (N,) bool, situations that are indirect questions. wordings: (W, 3), "first" by
    pmi of each wording of the question with each of the answer, in per cent.
    """

    scores: dict[str, np.ndarray]
    table: dict[str, dict[str, Value]]
    counted: np.ndarray
    wordings: np.ndarray

    def __repr__(self) -> str:
        return one_line(self)


def labels() -> list[int]:
    """The posture of each situation, as a number."""
    return [list(POSTURES).index(situation.posture) for situation in SITUATIONS]


def evaluate_probe(found: Weighed) -> Probe:
    """The results of a model's answers."""
    right = labels()
    counted = np.array([not names_posture(situation) for situation in SITUATIONS])
    scores = posture_scores(found)
    scores["frozen states, last"] = ridge_scores(found.states[max(found.states)].mean(1)[:, 0], right)
    every = np.concatenate([states.mean(1).reshape(len(right), -1) for _, states in sorted(found.states.items())], 1)
    scores["frozen states, middle and last"] = ridge_scores(every, right)
    pmi = (found.given - found.alone).reshape(len(right), len(found.alone), len(ANSWERS), -1)
    wordings = np.array(
        [
            [rank_summary(pmi[:, w, :, a], right, counted)["first"].value for a in range(pmi.shape[-1])]
            for w in range(pmi.shape[1])
        ]
    )
    return Probe(scores, {way: rank_summary(each, right, counted) for way, each in scores.items()}, counted, wordings)


TITLES = {
    "pmi": "likelihood of the answer, less without the situation (the measure)",
    "likelihood": "likelihood of the answer",
    "per token": "likelihood of the answer, per token",
    "frozen states, last": "ridge regression on the last token's final state",
    "frozen states, middle and last": "ridge regression on four states of the middle and the last layer",
}


def probe_table(probe: Probe) -> Iterator[str]:
    """A Markdown table, and how it is to be read."""
    count = int(probe.counted.sum())
    yield "| way to answer | right posture first, % | its mean rank of 15 | first, every situation alike, % |"
    yield "|---|---|---|---|"
    yield f"| chance | {CHANCE['first']:.1f} | {CHANCE['rank']:.1f} | {CHANCE['first']:.1f} |"
    for way, title in TITLES.items():
        cells = (_cell(probe.table[way][name]) for name in ("first", "rank", "first, plain"))
        yield f"| {title} | {' | '.join(cells)} |"
    low, high = probe.wordings.min(), probe.wordings.max()
    yield (
        f"\n{count} indirect questions of {len(SITUATIONS)}; the others name a posture, and do not count. Brackets: 95 % bootstrap over situations. "
        "In the first two columns every posture counts the same. Single wordings of question and answer put the right posture first "
        f"in {low:.0f} to {high:.0f} %."
    )


def _cell(value: Value) -> str:
    return f"{value.value:.1f} [{value.low:.1f}, {value.high:.1f}]"


def probe_to_json(probe: Probe, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the table rests on, as JSON values. about: the model and how it was asked."""
    right = labels()
    each = {way: ranks(scores, right)[0] for way, scores in probe.scores.items()}
    return {
        "format": "chatpose-probe",
        "version": 1,
        **about,
        "chance": CHANCE,
        "table": {
            way: {name: {"value": v.value, "low": v.low, "high": v.high} for name, v in values.items()}
            for way, values in probe.table.items()
        },
        "first by wording": probe.wordings.tolist(),
        "postures": list(POSTURES),
        "situations": [
            {
                "words": situation.words,
                "posture": situation.posture,
                "indirect": bool(probe.counted[i]),
                "rank": {way: float(found[i]) for way, found in each.items()},
                "scores": {way: [round(float(x), 5) for x in found[i]] for way, found in probe.scores.items()},
            }
            for i, situation in enumerate(SITUATIONS)
        ],
    }

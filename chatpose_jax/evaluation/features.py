"""The retriever that scores answers, the judge: its features of texts and poses, and what reports say about it."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.data.questions import caption_in
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.retrieval import RECALLS, Compared, recall_columns
from chatpose_jax.evaluation.scores import Value, means_of
from chatpose_jax.evaluation.system import first_question, images_in, words_of
from chatpose_jax.posescript.pairs import captions_of
from chatpose_jax.posescript.retriever import load_retriever
from smpl_jax.pose import SHARED, Pose, known, to_family, to_frame

CAPTIONS: dict[str, tuple[str, ...]] = {
    "human-first": ("human", "automatic", "caption"),
    "human": ("human",),
    "automatic": ("automatic", "caption"),
    "question": (),
}
"""How the caption of a row is chosen: rule -> kinds of captions, of which the first in the row's extras is used. "question": the words of the row's
question."""
RANK = "T2P rank"
"""The rank of the right pose among all poses, by similarity to its text; counted from 1."""
JOINTS = "those of the 22 body joints that the data measured; in true and answered poses, all others have the mean of the retriever's training data"


class RetrievalJudge(Protocol):
    """What this module needs of a ``posescript.retriever.Retriever``. settings["fingerprint"] identifies it."""

    name: str

    @property
    def settings(self) -> Mapping[str, Any]: ...
    def embed_poses(self, poses: Pose) -> np.ndarray: ...
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray: ...


class Caption(NamedTuple):
    """A text of a pose. kind: of ``posescript.pairs.KINDS``, or "question"."""

    kind: str
    text: str


@functools.lru_cache(maxsize=2)
def _load(folder: Path) -> RetrievalJudge:
    return load_retriever(folder)


def open_judge(retriever: Any) -> RetrievalJudge:
    """The retriever of a folder, or the given object with its methods. Raises UserError."""
    if retriever == "":
        raise UserError(
            "expected a retriever, --set retriever=FOLDER: 'chatpose posescript train' trains one on captions of your own, "
            "'chatpose posescript convert' reads one that PoseScript has released"
        )
    return _load(Path(retriever).expanduser().resolve()) if isinstance(retriever, str | Path) else retriever


def refuse_same_judge(judge: RetrievalJudge, name: str, settings: Any) -> None:
    """Raises UserError where the settings of a system contain the judge's fingerprint: it was the reward in training, or selected answers."""
    if _holds(settings, judge.settings["fingerprint"]):
        raise UserError(
            f"system {name!r} names the retriever {judge.name!r} (fingerprint {judge.settings['fingerprint']}) in its settings. A judge that "
            "rewards a system or selects its answers must not score it: evaluate with a retriever of another training, at least with another seed"
        )


def _holds(value: Any, fingerprint: str) -> bool:
    if isinstance(value, Mapping):
        return any(_holds(item, fingerprint) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds(item, fingerprint) for item in value)
    return isinstance(value, str) and fingerprint in value


def fits(judge: RetrievalJudge, kinds: Sequence[str], accept: bool) -> dict[str, str]:
    """A fact for a retriever that was trained on other kinds of captions than the task expects, or whose folder does not say on which.

    kinds: those of ``posescript.pairs.Captions`` that the task expects. accept: take a retriever with other ones, and say so in the fact; otherwise
    it is an error. Raises UserError.
    """
    trained = (judge.settings.get("trained_on") or {}).get("captions")
    if trained in kinds:
        return {}
    wanted = " or ".join(kinds)
    if trained is not None and not accept:
        raise UserError(
            f"the retriever {judge.name!r} was trained on captions of the kind {trained!r}; this task needs one that was trained on {wanted}: "
            f"train it with 'chatpose posescript train … --set text.captions={kinds[0]}', "
            "or accept this one with --set other_retriever=true; then the table says so"
        )
    known = (
        f"trained on captions of the kind {trained!r}"
        if trained
        else "its folder does not say on which captions it was trained"
    )
    return {"retriever's fit": f"{known}; this task is meant for one that was trained on {wanted}"}


def facts_of(judge: RetrievalJudge) -> dict[str, str]:
    """The retriever, for the facts of a table."""
    trained = judge.settings.get("trained_on") or {}
    words = ", ".join(
        _said(name, value)
        for name, value in trained.items()
        if name == "sources" or (isinstance(value, str | int) and value != "")
    )
    return {
        "retriever": f"{judge.name}, fingerprint {judge.settings['fingerprint']}",
        "retriever trained on": words or "its folder does not say",
    }


def _said(name: str, value: Any) -> str:
    return " + ".join(str(row["name"]) for row in value) if name == "sources" else f"{name} {value}"


def caption_of(row: Example, rule: str) -> Caption | None:
    """The caption of a row that a rule of ``CAPTIONS`` chooses, None if it has none. Of several of a kind it is the one in the row's question, or
    else the first.
    """
    asked = question_words(row)
    if rule == "question":
        return Caption("question", caption_in(asked)) if asked else None
    for kind in CAPTIONS[rule]:
        if texts := captions_of(row, kind):  # type: ignore[arg-type]
            return Caption(kind, next((text for text in texts if text in asked), texts[0]))
    return None


def rows_in_words(rows: Sequence[Example]) -> Iterator[int]:
    """The numbers of rows that have a pose and show no image. Of a prepared data set only the index is read."""
    entries = getattr(rows, "entries", None)
    if entries is not None:
        yield from np.flatnonzero((entries["poses"] > 0) & (entries["images"] == 0)).tolist()
    else:
        yield from (i for i in range(len(rows)) if len((row := rows[i]).poses) and not shows_image(row))


def question_words(row: Example) -> str:
    """The words of a row's first question."""
    return "".join(words_of(message["content"]) for message in first_question(row)[-1:])


def shows_image(row: Example) -> bool:
    """Whether a row shows an image before its first answer."""
    return bool(images_in(first_question(row)))


def bodies(poses: Sequence[Pose]) -> Pose:
    """(N,) poses of the 22 joints of the body in the camera frame, of poses of any frame and family; without shape and translation."""
    alike: dict[tuple[str, int], list[int]] = defaultdict(list)
    for number, pose in enumerate(poses):
        alike[pose.frame, pose.num_joints].append(number)
    rotations, measured = np.empty((len(poses), SHARED, 3, 3), np.float32), np.empty((len(poses), SHARED), bool)
    for (frame, _), numbers in alike.items():
        given = [poses[number] for number in numbers]
        stacked = Pose(
            np.stack([np.asarray(pose.rotations, np.float32) for pose in given]),
            frame,  # type: ignore[arg-type]
            measured=np.stack([np.asarray(known(pose)) for pose in given]),
        )
        body = to_family(to_frame(stacked, "camera"), "shared")
        rotations[numbers], measured[numbers] = body.rotations, body.measured
    return Pose(rotations, "camera", measured=measured)


def same_joints(given: Sequence[Pose | None], truth: Pose) -> Pose:
    """(N,) answered bodies, with only those joints measured that are measured in the truth. The true pose takes the place of a missing answer."""
    found = bodies([truth[i] if pose is None else pose for i, pose in enumerate(given)])
    return found.replace(measured=found.measured & truth.measured)


def recall_values(
    found: Compared, groups: Sequence[str], recalls: Sequence[int] = RECALLS
) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    """Values with intervals, and samples with the rank of the right pose as ``T2P rank``."""
    samples = recall_columns(found, recalls)
    values = means_of(samples, groups, {name: {"unit": "%", "better": "higher"} for name in samples})
    return values, samples | {RANK: found.t2p.ranks}

"""Baselines that are computed from training rows in closed form. They show how well a pose is predicted from words, or from nothing."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.poses import mean_pose, true_poses
from chatpose_jax.evaluation.spec import Spec, open_rows
from chatpose_jax.evaluation.system import Answer, Question, asked_words, first_question
from chatpose_jax.settings import whole
from smpl_jax.pose import Pose, known
from smpl_jax.rotations import matrix_9d_to_rotation

LONGEST = 4
"""Words of the longest n-gram."""
MOST = 4096
"""Number of n-grams that ridge regression uses: those that occur in most texts. All 8290 of 4000 generated descriptions change the error by less
than 1 mm."""
PENALTY = 10.0
_CHUNK = 512  # texts whose n-grams are dense at a time


class Model(Protocol):
    """Rotations from words. It is made from N texts and their poses (N, 24, 3, 3)."""

    def __init__(self, texts: Sequence[str], rotations: np.ndarray) -> None: ...

    def answer(self, asked: Sequence[str]) -> np.ndarray:
        """Rotations (M, 24, 3, 3) for M texts."""
        ...


class MeanPose:
    """Uses no words: for each joint the rotation nearest to the mean matrix."""

    def __init__(self, texts: Sequence[str], rotations: np.ndarray) -> None:
        self.mean = np.asarray(mean_pose(Pose(rotations, "camera")).rotations)

    def answer(self, asked: Sequence[str]) -> np.ndarray:
        return np.repeat(self.mean[None], len(asked), 0)


class NearestText:
    """The pose of the training text with the largest Jaccard index of n-grams of one to four words. A text that shares none gets the mean pose.

    The memory, and the time of an answer, grow with the number of n-grams in all N texts, not with its product with N.
    """

    def __init__(self, texts: Sequence[str], rotations: np.ndarray) -> None:
        self.rotations, self.mean = rotations, MeanPose(texts, rotations).mean
        found = [grams(text) for text in texts]
        self.columns = {gram: i for i, gram in enumerate(sorted(set().union(*found)))}
        self.sizes = np.array([len(each) for each in found])
        held = np.concatenate([_numbers(each, self.columns) for each in found])
        order = np.argsort(held, kind="stable")
        # The texts that hold n-gram c are owners[starts[c] : starts[c + 1]].
        self.owners = np.repeat(np.arange(len(texts), dtype=np.int32), self.sizes)[order]
        self.starts = np.searchsorted(held[order], np.arange(len(self.columns) + 1))

    def answer(self, asked: Sequence[str]) -> np.ndarray:
        return np.stack([self._nearest(grams(text)) for text in asked])

    def _nearest(self, asked: set[str]) -> np.ndarray:
        owners = [self.owners[self.starts[c] : self.starts[c + 1]] for c in _numbers(asked, self.columns)]
        if not owners:
            return self.mean
        shared = np.bincount(np.concatenate(owners), minlength=len(self.sizes))
        return self.rotations[(shared / (self.sizes + len(asked) - shared)).argmax()]


class RidgeRegression:
    """Ridge regression of the matrices on n-grams of one to four words. It sees which words occur, but little of their order."""

    def __init__(self, texts: Sequence[str], rotations: np.ndarray) -> None:
        counts = collections.Counter(gram for text in texts for gram in grams(text))
        first = sorted(counts, key=lambda gram: (-counts[gram], gram))[:MOST]
        self.columns = {gram: i for i, gram in enumerate(first)}
        self.mean = rotations.mean(0, dtype=np.float64)
        products, targets = PENALTY * np.eye(len(first)), np.zeros((len(first), self.mean.size))
        for start in range(0, len(texts), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            x = self._features(texts[chunk])
            products += x.T @ x
            targets += x.T @ (rotations[chunk] - self.mean).reshape(len(x), -1)
        self.weights = np.linalg.solve(products, targets)

    def answer(self, asked: Sequence[str]) -> np.ndarray:
        found = self.mean + (self._features(asked) @ self.weights).reshape(-1, *self.mean.shape)
        return np.asarray(matrix_9d_to_rotation(found.astype(np.float32)))

    def _features(self, texts: Sequence[str]) -> np.ndarray:
        out = np.zeros((len(texts), len(self.columns)), np.float32)
        for row, text in enumerate(texts):
            out[row, _numbers(grams(text), self.columns)] = 1
        return out


MODELS: dict[str, Callable[[Sequence[str], np.ndarray], Model]] = {
    "mean": MeanPose,
    "nearest": NearestText,
    "ridge": RidgeRegression,
}


def grams(text: str) -> set[str]:
    """The n-grams of one to four words. Case and punctuation do not count."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1)}


def _numbers(found: set[str], columns: Mapping[str, int]) -> np.ndarray:
    return np.array(sorted(columns[gram] for gram in found if gram in columns), np.int32)


class Simple:
    """A system of a ``Model``. A question is answered from training rows of its kind ("text" or "image"), or from all where there are none.

    Only words are read: those of the first question, without the sentence around a caption (``system.asked_words``). Answers are poses of
    SMPL in the camera frame. A joint that a training row did not measure counts as the mean. Training rows whose first answer has no pose are
    left out.

    Options:
        data: where training rows come from, as the command line names it (``spec.Spec``): a source, with its options behind commas.
        root: folder of the prepared data sets.
        rows: at most so many training rows, drawn by ``seed``.
        name: of the row in tables.

    Raises UserError for a source that is not found, or has no row with a pose.
    """

    model: ClassVar[Callable[[Sequence[str], np.ndarray], Model]]
    title: ClassVar[str]
    batch_size = 64

    def __init__(
        self, *, data: str = "synthetic", root: str = "data", rows: int = 20_000, seed: int = 0, name: str = ""
    ) -> None:
        self.name = name or self.title
        whole("rows", rows, 1)
        whole("seed", seed, 0)
        source = open_rows(Spec.parse(data), "train", root)
        drawn = np.sort(np.random.default_rng(seed).permutation(len(source))[:rows]).tolist()
        found = [light for i in drawn if (light := _in_words(source[i])) is not None]
        if not found:
            raise UserError(f"{self.name}: the training rows of {data!r:.200} have no poses to learn from")
        kinds: set[str] = {row.kind for row in found}
        self._models = {kind: self._fit([row for row in found if row.kind == kind]) for kind in kinds}
        self._all = self._fit(found)
        self.note = f"computed from {len(found):,} training rows of {data}"
        self.settings = {
            "data": data,
            "rows": len(found),
            "seed": seed,
            "trained_on": _digest(found),
        }

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One pose for each question."""
        found = [Answer()] * len(questions)
        for kind in {question.kind for question in questions}:
            places = [i for i, question in enumerate(questions) if question.kind == kind]
            rotations = self._models.get(kind, self._all).answer([asked_words(questions[i].messages) for i in places])
            for i, each in zip(places, rotations):
                found[i] = Answer(pose=Pose(each.astype(np.float32), "camera"))
        return found

    def _fit(self, rows: Sequence[Example]) -> Model:
        poses = true_poses(rows)
        filled = np.where(known(poses)[..., None, None], poses.rotations, mean_pose(poses).rotations)
        return type(self).model([row.messages[0]["content"] for row in rows], filled)


class Mean(Simple):
    """The mean pose of the training rows, whatever is asked."""

    model, title = MODELS["mean"], "mean pose"


class Nearest(Simple):
    """The pose of the training row whose words are nearest."""

    model, title = MODELS["nearest"], "nearest text"


class Ridge(Simple):
    """Ridge regression of the pose on words."""

    model, title = MODELS["ridge"], "ridge regression"


def _in_words(row: Example) -> Example | None:
    """The first question of a row, in words alone, and its pose; None if its answer has no pose. Images would fill the memory."""
    question = first_question(row)
    if "<POSE>" not in str(row.messages[len(question)]["content"]):
        return None
    return dataclasses.replace(row, messages=[{"role": "user", "content": asked_words(question)}], extras={})


def _digest(rows: Sequence[Example]) -> str:
    """Tells one set of rows from another."""
    found = hashlib.sha256()
    for row in rows:
        found.update(row.messages[0]["content"].encode())
        found.update(np.asarray(row.poses.rotations[0], np.float32).tobytes())
    return found.hexdigest()[:16]

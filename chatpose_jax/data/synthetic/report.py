"""Figures about the generated set: ``python -m chatpose_jax.data.synthetic.report``.

It says how well simple models predict a pose from its description, as a reference for a language model. The mean pose uses no words. Ridge
regression on word n-grams knows which words occur, but little of their order.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import numpy as np

from chatpose_jax.data.synthetic import skeleton
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from smpl_jax import metrics

_PENALTY = 10.0


def report(train_size: int = 4000, val_size: int = 400) -> dict[str, float]:
    """Vocabulary, caption lengths, and errors in millimetres on the validation split of detailed descriptions.

    Keys: ``vocabulary``, ``words_per_question``, ``<model>_mpjpe`` and ``<model>_pa_mpjpe`` for the models of ``simple_answers``.
    """
    train, val = (
        SyntheticDataset("train", train_size, tasks={"text": 1}),
        SyntheticDataset("val", val_size, tasks={"text": 1}),
    )
    (train_texts, train_poses), (val_texts, val_poses) = _rows(train), _rows(val)
    truth, _ = skeleton.forward_kinematics(val_poses)
    out = {
        "vocabulary": float(len({word for text in train_texts + val_texts for word in _words(text)})),
        "words_per_question": float(np.mean([len(_words(text)) for text in val_texts])),
    }
    for name, rotations in simple_answers(train_texts, train_poses, val_texts).items():
        joints, _ = skeleton.forward_kinematics(rotations)
        out[f"{name}_mpjpe"] = float(np.mean(metrics.mpjpe(joints, truth)))
        out[f"{name}_pa_mpjpe"] = float(np.mean(metrics.pa_mpjpe(joints, truth)))
    return out


def simple_answers(texts: Sequence[str], poses: np.ndarray, asked: Sequence[str]) -> dict[str, np.ndarray]:
    """Poses (M, 24, 3, 3) of simple models for M questions, trained on N questions and their poses (N, 24, 3, 3).

    ``mean`` uses no words; ``nearest`` is the training pose whose question shares most n-grams of one to four words, as a share of those of both;
    ``ridge`` is a ridge regression on these n-grams.
    """
    index = {gram: i for i, gram in enumerate(sorted({g for text in texts for g in _grams(text)}))}
    x, y = _features(texts, index), _features(asked, index)
    mean = poses.mean(0)
    target = (poses - mean).reshape(len(poses), -1)
    kernel = x @ x.T + _PENALTY * np.eye(len(poses), dtype=np.float32)
    ridge = mean + (y @ (x.T @ np.linalg.solve(kernel, target))).reshape(-1, 24, 3, 3)
    shared = y @ x.T
    union = x.sum(1)[None] + y.sum(1)[:, None] - shared
    found = {"mean": np.repeat(mean[None], len(asked), 0), "nearest": poses[(shared / union).argmax(1)], "ridge": ridge}
    return {name: _nearest_rotations(rotations) for name, rotations in found.items()}


def _rows(data: SyntheticDataset) -> tuple[list[str], np.ndarray]:
    rows = data[:]
    return [str(row.messages[0]["content"]) for row in rows], np.stack([row.poses.rotations[0] for row in rows])


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _grams(text: str) -> set[str]:
    words = _words(text)
    return {" ".join(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1)}


def _features(texts: Sequence[str], index: dict[str, int]) -> np.ndarray:
    out = np.zeros((len(texts), len(index)), np.float32)
    for row, text in enumerate(texts):
        out[row, [index[g] for g in _grams(text) if g in index]] = 1
    return out


def _nearest_rotations(matrices: np.ndarray) -> np.ndarray:
    """The rotations (..., 3, 3) nearest to any matrices, by singular values."""
    u, _, vt = np.linalg.svd(matrices)
    u[..., :, 2] *= np.linalg.det(u @ vt)[..., None]
    return u @ vt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-size", type=int, default=4000)
    parser.add_argument("--val-size", type=int, default=400)
    arguments = parser.parse_args()
    for name, value in report(arguments.train_size, arguments.val_size).items():
        print(f"{name:20s} {value:8.1f}")


if __name__ == "__main__":
    main()

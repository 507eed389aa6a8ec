"""The text-conditional pose generator as a system."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chatpose_jax.evaluation.poses import mean_pose
from chatpose_jax.evaluation.system import Answer, Question, asked_words
from chatpose_jax.posescript.generator import load_generator
from chatpose_jax.settings import whole
from smpl_jax.pose import Pose, stack


class TextToPose:
    """A generator that ``chatpose posescript train`` or ``convert`` wrote. It sees the words of a question (``system.asked_words``), not its images.

    Options:
        folder: of the generator.
        seed: of the draws. A text always gets the same answer.
        samples: how many poses are drawn for a text. The answer is the only one, or their mean, joint by joint; with 0, the pose of the mean of
            the text's distribution.
        name: of the row in tables; by default the folder's.

    Raises UserError for a folder that is none.
    """

    batch_size = 64

    def __init__(self, *, folder: str, seed: int = 0, samples: int = 1, name: str = "") -> None:
        self._generator = load_generator(folder)
        self._seed, self._samples = whole("seed", seed, 0), whole("samples", samples, 0)
        self.name = name or self._generator.name
        self.settings = {"generator": self._generator.settings, "seed": seed, "samples": samples}

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One pose for each question, in the camera frame."""
        texts = [asked_words(question.messages) for question in questions]
        if self._samples == 0:
            poses = self._generator.mean(texts, self.batch_size)
        else:
            drawn = self._generator.sample(texts, self._seed, self._samples, self.batch_size)
            poses = drawn[:, 0] if self._samples == 1 else stack([_mean(each) for each in drawn])
        return [Answer(pose=pose) for pose in poses]


def _mean(poses: Pose) -> Pose:
    """The mean of (N,), with the joints that they measure."""
    return mean_pose(poses).replace(measured=None if poses.measured is None else np.asarray(poses.measured[0]))

"""Systems for tests, named on command lines as ``tests.evaluation.given_systems:Name``."""

import dataclasses
import hashlib
import os
import signal
import time

import numpy as np
from scipy.spatial.transform import Rotation

from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.system import Answer
from chatpose_jax.evaluation.tasks.poses import Poses
from smpl_jax import Pose
from smpl_jax.pose import unmeasured


class Drawn:
    """Poses that depend on the key of the question alone."""

    asked = 0

    def __init__(self, *, name: str = "drawn", batch_size: int = 4, silent: bool = False, again: bool = False):
        self.name, self.batch_size, self.silent = name, batch_size, silent
        self.settings = {"silent": silent}

    def answer(self, questions):
        time.sleep(float(os.environ.get("SECONDS_A_BATCH", 0)))
        Drawn.asked += len(questions)
        return [self._one(question) for question in questions]

    def _one(self, question):
        if self.silent and question.key.endswith(("0-text", "5-text")):
            return Answer("I do not know.", notes={"keypoints not parsed": True})
        seed = list(hashlib.blake2b(question.key.encode(), digest_size=8).digest())
        rotations = Rotation.from_rotvec(np.random.default_rng(seed).normal(0, 0.3, (24, 3))).as_matrix()
        return Answer("It is <POSE>.", Pose(rotations.astype(np.float32), "camera"))


class Lazy(Drawn):
    """Answers the first question of a batch only."""

    def answer(self, questions):
        return super().answer(questions)[:1]


class Broken(Drawn):
    """Its code fails."""

    def answer(self, questions):
        raise KeyError("left hip")


class Flat(Drawn):
    """Its matrices are no rotations."""

    def answer(self, questions):
        return [Answer(pose=Pose(np.zeros((24, 3, 3), np.float32), "camera")) for _ in questions]


class Picky(Poses):
    """A task of one's own, which judges no system that is silent."""

    def check(self, name, settings):
        if settings.get("silent"):
            raise UserError(f"system {name!r} is not judged here")


def speechless(messages):
    """A function of messages that gives something else."""
    return len(messages)


def counts_words(messages):
    """A function of messages that answers in words."""
    return f"{len(messages[0]['content'].split())} words"


def upright(messages):
    """A function of messages that answers with a pose."""
    rotations = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
    rotations[0] = np.diag(np.float32([1, -1, -1]))
    return Pose(rotations, "camera")


def rows(split, *, count: int = 30, blind: bool = False, changed: bool = False):
    """A source with a test split only. blind: nothing was measured. changed: the last question has another word."""
    if split != "test":
        return []
    found = [
        dataclasses.replace(row, group=f"clip {i % 7}")
        for i, row in enumerate(SyntheticDataset("test", count, tasks={"text": 1}))
    ]
    if blind:
        found = [dataclasses.replace(row, poses=unmeasured((1,))) for row in found]
    if changed:
        asked, *rest = found[-1].messages
        found[-1] = dataclasses.replace(
            found[-1], messages=[{**asked, "content": f"{asked['content']} Please."}, *rest]
        )
    return found


class Prepared(list):
    """A source whose rows say what they were made of."""

    fingerprint = ""

    def __init__(self, split):
        super().__init__(rows(split, count=6))


def die_at(number):
    """Ends this process by SIGKILL at the n-th time that a file is put in its place: just before, or (odd numbers) just after."""
    replace, seen = os.replace, []

    def counting(*paths):
        seen.append(paths)
        if len(seen) > number // 2 and number % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if len(seen) > number // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counting


class Rewarded(Drawn):
    """Says by which retriever it was rewarded."""

    def __init__(self, *, by: str):
        super().__init__(name="rewarded")
        self.settings = {"reward": {"retriever": by}}

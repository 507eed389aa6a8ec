"""``Generator``: poses from texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.posescript.pairs import PoseInput
from chatpose_jax.posescript.pose_vae import PoseVae
from chatpose_jax.posescript.tokens import TextTokens, pad
from chatpose_jax.settings import one_line, whole
from smpl_jax.pose import Pose, to_frame


class Generator:
    """A trained text-conditional pose generator.

    name: of its folder. settings: JSON that identifies it: ``fingerprint`` of its numbers, its sizes, and what it was trained on.
    """

    def __init__(
        self, name: str, model: PoseVae, tokens: TextTokens, pose_input: PoseInput, settings: Mapping[str, Any]
    ) -> None:
        self.name, self.settings = name, dict(settings)
        self.model, self.tokens, self.pose_input = model, tokens, pose_input
        graph, self._state = nnx.split(model)
        self._draw = jax.jit(lambda state, *arrays: nnx.merge(graph, state).draw(*arrays))

    __repr__ = one_line

    def sample(self, texts: Sequence[str], seed: int = 0, samples: int = 1, batch_size: int = 64) -> Pose:
        """Poses drawn for texts. A text and a seed always give the same draws, whichever texts stand beside it.

        Returns a ``Pose`` of batch shape (N, samples) in the camera frame, of SMPL-H or its 22 joints of the body. The body faces the camera: the
        root has no yaw. Joints that no training pose had measured are not measured here.

        Raises UserError for a seed or a number of samples out of range, and for poses that are not finite.
        """
        whole("seed", seed, 0)
        whole("samples", samples, 1)
        shape = (samples, self.model.config.latent)
        noise = [np.random.default_rng([seed, *_numbers(text)]).standard_normal(shape, np.float32) for text in texts]
        return self._poses(texts, np.asarray(noise, np.float32).reshape(len(texts), *shape), batch_size)

    def mean(self, texts: Sequence[str], batch_size: int = 64) -> Pose:
        """The pose of the mean of each text's distribution, (N,). Otherwise as ``sample``."""
        return self._poses(texts, np.zeros((len(texts), 1, self.model.config.latent), np.float32), batch_size)[:, 0]

    def _poses(self, texts: Sequence[str], noise: np.ndarray, batch_size: int) -> Pose:
        tokens = self.tokens.encode(texts)
        found = np.zeros((*noise.shape[:2], self.pose_input.joints, 3, 3), np.float32)
        order = np.argsort([len(each) for each in tokens], kind="stable")  # texts of similar lengths go together
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            filled = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])  # one program serves all
            ids, lengths = pad([tokens[row] for row in filled])
            found[rows] = np.asarray(self._draw(self._state, ids, lengths, noise[filled]))[: len(rows)]
        if not np.isfinite(found).all():
            raise UserError(f"generator {self.name}: poses are not finite; its weights are damaged")
        measured = np.broadcast_to(self.pose_input.seen, found.shape[:-2])
        return to_frame(Pose(found, "z-up", measured=None if measured.all() else measured.copy()), "camera")


def load_generator(folder: str | Path) -> Generator:
    """Reads a folder that ``chatpose posescript train`` or ``convert`` wrote. Runs no code of it. Raises UserError."""
    from chatpose_jax.posescript.folder import open_folder

    found = open_folder(folder, "pose_vae")
    return Generator(found.name, found.model, found.tokens, found.pose_input, found.settings)


def _numbers(text: str) -> list[int]:
    """128 bits of a text's hash."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], np.uint32).tolist()

"""``Retriever``: features of poses and texts, for recall, R-precision and FID."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.posescript.network import Retrieval, RetrieverConfig, TextEncoderConfig, run
from chatpose_jax.posescript.pairs import PoseInput, axis_angles
from chatpose_jax.posescript.tokens import TextTokens, WordVocabulary, pad
from smpl_jax.pose import Pose


class Retriever:
    """A trained retrieval network.

    name: of its folder. settings: JSON that identifies it: ``fingerprint`` of its numbers, its sizes, and what it was trained on.
    """

    def __init__(
        self, name: str, model: Retrieval, tokens: TextTokens, pose_input: PoseInput, settings: Mapping[str, Any]
    ) -> None:
        self.name, self.settings = name, dict(settings)
        self.model, self.tokens, self.pose_input = model, tokens, pose_input

    def __repr__(self) -> str:
        return f"Retriever({self.name!r}, width={self.width})"

    @property
    def width(self) -> int:
        """Of the features; 512 in those that PoseScript has released."""
        return self.model.config.latent

    @classmethod
    def random(cls, texts: Sequence[str] = (), *, latent: int = 32, seed: int = 0) -> Retriever:
        """A small retriever with random weights and the words of some texts, for tests."""
        tokens = WordVocabulary.of(texts)
        config = RetrieverConfig(
            joints=22,
            latent=latent,
            pose_width=32,
            pose_bottleneck=16,
            text=TextEncoderConfig(words=len(tokens), word_width=16),
        )
        model = Retrieval(config, rngs=nnx.Rngs(seed))
        pose_input = PoseInput(np.zeros((22, 3), np.float32), np.ones(22, bool))
        return cls("random", model, tokens, pose_input, {"fingerprint": f"random-{latent}-{seed}", "trained_on": {}})

    def embed_poses(self, poses: Pose, batch_size: int = 256) -> np.ndarray:
        """Features of poses.

        poses: of batch shape (N,), in any frame and of any family (``pairs.axis_angles``). Their yaw, betas and translation do not count, nor
            joints that are not measured.

        Returns (N, width) float32 of unit length. Raises ValueError for poses of another batch shape.
        """
        if len(poses.shape) != 1:
            raise ValueError(f"expected poses of batch shape (N,), found {poses.shape}")
        found = []
        for start in range(0, len(poses), batch_size):
            values = self.pose_input(*axis_angles(poses[start : start + batch_size], self.pose_input.joints))
            found.append(self._batch("embed_poses", batch_size, values))
        return np.concatenate([np.zeros((0, self.width), np.float32), *found])

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Features of texts, (N, width) float32 of unit length. Words that the retriever does not know count as unknown words."""
        tokens = self.tokens.encode(texts)
        order = np.argsort([len(each) for each in tokens], kind="stable")  # texts of similar lengths go together
        found = np.zeros((len(tokens), self.width), np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found[rows] = self._batch("embed_texts", batch_size, *pad([tokens[row] for row in rows]))
        return found

    def _batch(self, method: str, size: int, *arrays: np.ndarray) -> np.ndarray:
        """Runs a batch that is filled up to ``size`` with copies of its first row, so that one program serves all."""
        count = len(arrays[0])
        filled = [np.concatenate([array, np.repeat(array[:1], size - count, 0)]) for array in arrays]
        features = run(self.model, method, *filled)[:count]
        if not np.isfinite(features).all():
            raise UserError(f"retriever {self.name}: features are not finite; its weights are damaged, or a pose is")
        return features


def load_retriever(folder: str | Path) -> Retriever:
    """Reads a folder that ``chatpose posescript train`` or ``convert`` wrote. Runs no code of it. Raises UserError."""
    from chatpose_jax.posescript.folder import open_folder

    found = open_folder(folder, "retriever")
    return Retriever(found.name, found.model, found.tokens, found.pose_input, found.settings)

"""PoseScript's retrieval network: poses and texts get features of unit length, near each other where they belong together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.posescript.layers import Key, normalised, split_key
from chatpose_jax.posescript.pose_encoder import PoseEncoder
from chatpose_jax.posescript.trainer import Batch, Examples, Recipe
from chatpose_jax.posescript.transformer_encoder import RELEASED, TransformerConfig, TransformerEncoder
from chatpose_jax.posescript.word_encoder import WordEncoder
from chatpose_jax.settings import check_types, did_you_mean, require


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The text encoder.

    encoder: "words" (``WordEncoder``, ECCV 2022) or "distilbert" (``TransformerEncoder``, later).
    words: number of token ids of "words"; ``distilbert`` in ``transformer`` has its own. word_width: of the word vectors.
    """

    encoder: Literal["words", "distilbert"] = "words"
    words: int = 4
    word_width: int = 300
    transformer: TransformerConfig = RELEASED

    def __post_init__(self) -> None:
        check_types(self, "text")
        require(self, "text", "at least 1", lambda value: value >= 1, "words", "word_width")

    @property
    def count(self) -> int:
        """Number of token ids."""
        return self.words if self.encoder == "words" else self.transformer.distilbert.vocabulary

    def build(self, latent: int, rngs: nnx.Rngs) -> WordEncoder | TransformerEncoder:
        """The encoder, with random weights, from (B, T) ids and (B,) lengths to (B, latent)."""
        if self.encoder == "words":
            return WordEncoder(self.words, latent, self.word_width, rngs=rngs)
        return TransformerEncoder(self.transformer, latent, rngs=rngs)


WORDS = TextEncoderConfig()


@dataclasses.dataclass(frozen=True)
class RetrieverConfig:
    """Sizes of the network; the defaults are the released ones.

    joints: 52 (SMPL-H) or 22 (its body). latent: of the features. pose_width, pose_bottleneck: of the pose encoder.
    """

    joints: Literal[52, 22] = 52
    latent: int = 512
    pose_width: int = 512
    pose_bottleneck: int = 32
    text: TextEncoderConfig = WORDS

    def __post_init__(self) -> None:
        check_types(self, "model")
        require(self, "model", "at least 1", lambda value: value >= 1, "latent", "pose_width", "pose_bottleneck")
        divisor = 2 if self.text.encoder == "words" else self.text.transformer.heads
        require(self, "model", f"a multiple of {divisor}", lambda value: value % divisor == 0, "latent")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Reads ``dataclasses.asdict``. Raises UserError for an unknown setting or a wrong value."""
        return typed(cls, values, "model")


@dataclasses.dataclass(frozen=True)
class RetrieverLossConfig:
    """How batches train.

    directions: of retrieval in the loss: "both", or "t2p", only from text to pose, as in PoseScript's code of ECCV 2022.
    noise: standard deviation in radians of the noise that is added to axis-angles in training. Some entries of generated poses hardly vary, such
        as the twist of a knee. Without noise, batch norm would magnify small differences in them, as in poses that a model predicts.
    """

    directions: Literal["both", "t2p"] = "both"
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "loss")
        require(self, "loss", "at least 0", lambda value: value >= 0, "noise")


def typed(cls: Any, values: Any, where: str) -> Any:
    """A dataclass from nested tables of its settings. Raises UserError that names a setting that it does not have."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a table of settings, found {values!r:.100}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"{where}: unknown setting {unknown[0]!r}{did_you_mean(unknown[0], fields)}")
    given = {
        name: typed(type(fields[name].default), value, f"{where}.{name}")
        if dataclasses.is_dataclass(fields[name].default)
        else value
        for name, value in values.items()
    }
    return cls(**given)


class Retrieval(nnx.Module):
    """Both encoders and the learnt temperature."""

    frozen: ClassVar[tuple[str, ...]] = ("distilbert",)
    """Names of modules whose parameters do not train."""

    def __init__(self, config: RetrieverConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.pose_encoder = PoseEncoder(
            config.joints, config.latent, config.pose_width, config.pose_bottleneck, rngs=rngs
        )
        self.text_encoder = config.text.build(config.latent, rngs)
        self.loss_weight = nnx.Param(jnp.full((1,), 10.0))

    def embed_poses(self, poses: jax.Array, key: Key = None) -> jax.Array:
        """(B, J, 3) axis-angles in radians -> (B, latent) of unit length."""
        return normalised(self.pose_encoder(poses, key))

    def embed_texts(self, tokens: jax.Array, lengths: jax.Array, key: Key = None) -> jax.Array:
        """(B, T) ids and (B,) lengths -> (B, latent) of unit length."""
        return normalised(self.text_encoder(tokens, lengths, key))

    def loss(self, batch: Batch, key: Key, settings: RetrieverLossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The cross-entropy of retrieving the pose of each text in the batch and the text of each pose, or only the former; and parts to log."""
        pose_key, text_key, noise_key = split_key(key, 3)
        given = batch.poses
        if noise_key is not None:
            given = given + settings.noise * jax.random.normal(noise_key, given.shape)
        poses = self.embed_poses(given, pose_key)
        texts = self.embed_texts(batch.tokens, batch.lengths, text_key)
        scores = texts @ poses.T * self.loss_weight[...]
        right = jnp.arange(len(scores))
        t2p, p2t = (optax.softmax_cross_entropy_with_integer_labels(each, right).mean() for each in (scores, scores.T))
        loss = t2p if settings.directions == "t2p" else (t2p + p2t) / 2
        return loss, {"loss_t2p": t2p, "loss_p2t": p2t, "temperature": self.loss_weight[0]}

    def validate(self, examples: Examples) -> dict[str, float]:
        """Recall in percent at 1, 5 and 10 in both directions, and ``mRecall``, their mean. The gallery is all poses, each with one caption. If items
        have the same features as the right one, half of them count as ranked before it. So a network whose features are all equal reaches nothing.
        """
        found = [
            (run(self, "embed_poses", batch.poses), run(self, "embed_texts", batch.tokens, batch.lengths))
            for batch in examples.batches(64)
        ]
        poses, texts = (np.concatenate(each) for each in zip(*found))
        metrics: dict[str, float] = {}
        for name, queries, gallery in (("p2t", poses, texts), ("t2p", texts, poses)):
            right = (queries * gallery).sum(1)
            ranks = np.concatenate(
                [
                    _places(queries[at : at + 512] @ gallery.T - right[at : at + 512, None])
                    for at in range(0, len(queries), 512)
                ]
            )
            metrics |= {f"{name}@{k}": float((ranks < k).mean() * 100) for k in (1, 5, 10)}
        return {"mRecall": sum(metrics.values()) / len(metrics), **metrics}


def _places(ahead: np.ndarray) -> np.ndarray:
    """(B,) the places of the right items, from 0, from the scores (B, N) less those of the right ones, of which each row has one. NaN is ahead."""
    return (~(ahead <= 1e-6)).sum(1) + ((np.abs(ahead) <= 1e-6).sum(1) - 1) / 2


def retriever_recipe(loss: RetrieverLossConfig) -> Recipe:
    """How ``Retrieval`` trains."""
    return Recipe(functools.partial(Retrieval.loss, settings=loss), Retrieval.validate, "mRecall", higher=True)


def run(network: nnx.Module, method: str, *arrays: Any) -> np.ndarray:
    """What a method of a network gives for arrays, compiled once for each shape."""
    return np.asarray(_compiled(method, *nnx.split(network), *arrays))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(method: str, graph: Any, state: Any, *arrays: jax.Array) -> jax.Array:
    return getattr(nnx.merge(graph, state), method)(*arrays)

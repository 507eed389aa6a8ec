"""PoseScript's text-conditional pose generator (ECCV 2022, section 6): a variational autoencoder of poses whose prior is given by a text.

A pose and its text each become a normal distribution over latent numbers, and a decoder makes a pose of a draw. In training the pose is drawn from
its own distribution, which is kept near that of its text; later it is drawn from that of the text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chatpose_jax.posescript.layers import Key, Linear, dropout, split_key
from chatpose_jax.posescript.network import WORDS, TextEncoderConfig, typed
from chatpose_jax.posescript.pose_encoder import PoseTrunk
from chatpose_jax.posescript.trainer import Batch, Examples, Recipe
from chatpose_jax.settings import check_types, one_line, require
from smpl_jax.body import BodyModel, forward
from smpl_jax.io import load_body
from smpl_jax.metrics import pose_metrics
from smpl_jax.pose import Pose, for_body
from smpl_jax.rotations import axis_angle_to_matrix, rotation_6d_to_matrix


@dataclasses.dataclass(frozen=True)
class PoseVaeConfig:
    """Sizes of the network; the defaults are the released ones.

    joints: 52 (SMPL-H) or 22 (its body). latent: numbers of a draw. width: of all hidden layers, and of the text encoder.
    log_scale: initial value of the learnt logarithm of the errors' scale. PoseScript's is 0, a metre, from which a short run does not get far enough.
    """

    joints: Literal[52, 22] = 52
    latent: int = 32
    width: int = 512
    text: TextEncoderConfig = WORDS
    log_scale: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "model")
        require(self, "model", "at least 1", lambda value: value >= 1, "latent", "width")
        divisor = 2 if self.text.encoder == "words" else self.text.transformer.heads
        require(self, "model", f"a multiple of {divisor}", lambda value: value % divisor == 0, "width")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Reads ``dataclasses.asdict``. Raises UserError for an unknown setting or a wrong value."""
        return typed(cls, values, "model")


class Normal(NamedTuple):
    """Independent normal distributions. mean, deviation: (..., D)."""

    mean: Any
    deviation: Any

    def __repr__(self) -> str:
        return one_line(self)

    def at(self, noise: jax.Array) -> jax.Array:
        """The draw that standard normal noise (..., D) gives."""
        return self.mean + self.deviation * noise

    def divergence(self, other: Normal) -> jax.Array:
        """Kullback-Leibler divergence from ``other`` in nats, summed over D: (...)."""
        ratio = (self.deviation / other.deviation) ** 2
        apart = ((self.mean - other.mean) / other.deviation) ** 2
        return 0.5 * (ratio + apart - 1 - jnp.log(ratio)).sum(-1)


STANDARD = Normal(0.0, 1.0)


class NormalOutput(nnx.Module):
    """Two linears, to a mean and, through softplus, a standard deviation."""

    def __init__(self, width: int, latent: int, *, rngs: nnx.Rngs):
        self.mean, self.spread = Linear(width, latent, rngs=rngs), Linear(width, latent, rngs=rngs)

    def __call__(self, x: jax.Array) -> Normal:
        """(B, width) -> (B, latent) distributions."""
        return Normal(self.mean(x), jax.nn.softplus(self.spread(x)))


class PoseDecoder(nnx.Module):
    """VPoser's decoder (Pavlakos et al. 2019): three linears with leaky ReLU, and the 6D form of each rotation, row-major (3, 2)."""

    def __init__(self, joints: int, latent: int, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(latent, width, rngs=rngs)
        self.linear_2 = Linear(width, width, rngs=rngs)
        self.linear_3 = Linear(width, joints * 6, rngs=rngs)

    def __call__(self, z: jax.Array, key: Key = None) -> jax.Array:
        """(..., latent) -> (..., J, 3, 3)."""
        x = dropout(jax.nn.leaky_relu(self.linear_1(z), 0.01), 0.1, key)
        x = self.linear_3(jax.nn.leaky_relu(self.linear_2(x), 0.01))
        return rotation_6d_to_matrix(x.reshape(*x.shape[:-1], -1, 6), "interleaved")


class PoseVae(nnx.Module):
    """The network. Poses are as ``pairs.axis_angles`` gives them: in AMASS's z-up frame, the root without yaw.

    The logarithms of the scales of the reconstruction's errors are learnt: of a Laplace distribution for positions, ``log_scale``; of the variance
    of a normal one for matrix entries.
    """

    frozen: ClassVar[tuple[str, ...]] = ("distilbert",)
    """Names of modules whose parameters do not train."""

    def __init__(self, config: PoseVaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.pose_encoder = PoseTrunk(config.joints, config.width, rngs=rngs)
        self.pose_output = NormalOutput(config.width, config.latent, rngs=rngs)
        self.text_encoder = config.text.build(config.width, rngs)
        self.text_output = NormalOutput(config.width, config.latent, rngs=rngs)
        self.decoder = PoseDecoder(config.joints, config.latent, config.width, rngs=rngs)
        scale = config.log_scale
        starts = (scale, scale, 2 * scale)  # the last is that of a variance
        self.log_scale_vertices, self.log_scale_joints, self.log_variance_rotations = (
            nnx.Param(jnp.full(1, start)) for start in starts
        )

    def encode_poses(self, poses: jax.Array, key: Key = None) -> Normal:
        """(B, J, 3) axis-angles in radians -> (B, latent) distributions."""
        return self.pose_output(self.pose_encoder(poses, key))

    def encode_texts(self, tokens: jax.Array, lengths: jax.Array, key: Key = None) -> Normal:
        """(B, T) ids and (B,) lengths -> (B, latent) distributions."""
        return self.text_output(self.text_encoder(tokens, lengths, key))

    def decode(self, z: jax.Array, key: Key = None) -> jax.Array:
        """(..., latent) -> rotations (..., J, 3, 3)."""
        return self.decoder(z, key)

    def draw(self, tokens: jax.Array, lengths: jax.Array, noise: jax.Array) -> jax.Array:
        """Poses that texts describe. noise: (B, N, latent) standard normal; zeros give the pose of the mean. Returns (B, N, J, 3, 3)."""
        found = self.encode_texts(tokens, lengths)
        return self.decode(Normal(*(each[:, None] for each in found)).at(noise))


@dataclasses.dataclass(frozen=True)
class VaeLossConfig:
    """Weights of the loss's terms, and the body that it is computed on; the defaults are those of the ECCV 2022 code.

    vertices, joints, rotations: negative log-likelihoods of the reconstruction, means over all coordinates. kl: divergence of the pose's
    distribution from the text's. pose_prior, text_prior: that of each from the standard normal, times ``kl``.
    body: a body file, "" for the embedded body. PoseScript's is the neutral SMPL-H, which needs a licence. mesh: number of its vertices that
    count, evenly spaced; 0 for all.
    """

    vertices: float = 4.0
    joints: float = 2.0
    rotations: float = 2.0
    kl: float = 0.2
    pose_prior: float = 0.02
    text_prior: float = 0.0
    body: str = ""
    mesh: int = 0

    def __post_init__(self) -> None:
        check_types(self, "loss")
        numbers = [field.name for field in dataclasses.fields(self) if field.name != "body"]
        require(self, "loss", "at least 0", lambda value: value >= 0, *numbers)


def pose_vae_loss(
    model: PoseVae, batch: Batch, key: Key, body: BodyModel, weights: VaeLossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The negative of a weighted evidence lower bound, and its parts to log.

    A joint that is not measured counts as rebuilt, so it changes no term.

    Args:
        model: the network; in training (with a key) its batch norm is updated.
        batch: poses and texts.
        key: of the pose's draw and of dropout. None takes the mean instead of a draw.
        body: gives vertices and joints, at its average shape.
        weights: of the terms.
    """
    noise_key, pose_key, text_key, decode_key = split_key(key, 4)
    pose = model.encode_poses(batch.poses, pose_key)
    text = model.encode_texts(batch.tokens, batch.lengths, text_key)
    noise = jnp.zeros_like(pose.mean) if noise_key is None else jax.random.normal(noise_key, pose.mean.shape)
    true, rebuilt = axis_angle_to_matrix(batch.poses), model.decode(pose.at(noise), decode_key)
    if batch.measured is not None:
        rebuilt = jnp.where(batch.measured[..., None, None], rebuilt, true)
    shown, expected = (forward(body, **for_body(Pose(each, "z-up"), body)) for each in (rebuilt, true))
    parts = {
        "vertices": laplace(shown.vertices - expected.vertices, model.log_scale_vertices[...]),
        "joints": laplace(shown.joints - expected.joints, model.log_scale_joints[...]),
        "rotations": gaussian(rebuilt - true, model.log_variance_rotations[...]),
        "kl": pose.divergence(text).mean(),
        "pose_prior": pose.divergence(STANDARD).mean(),
        "text_prior": text.divergence(STANDARD).mean(),
    }
    scales = {name: getattr(weights, name) for name in parts}
    scales |= {name: scales[name] * weights.kl for name in ("pose_prior", "text_prior")}
    return sum((scales[name] * value for name, value in parts.items()), jnp.zeros(())), parts


def laplace(errors: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of errors under a Laplace distribution, in nats for each coordinate."""
    return (math.log(2) + log_scale + jnp.abs(errors) / jnp.exp(log_scale)).mean()


def gaussian(errors: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of errors under a normal distribution, in nats for each coordinate."""
    return 0.5 * (math.log(2 * math.pi) + log_variance + errors**2 / jnp.exp(log_variance)).mean()


def pose_vae_recipe(loss: VaeLossConfig) -> Recipe:
    """How ``PoseVae`` trains. Its metrics are the loss and its parts without draws and dropout, and ``pa_mpjpe``: in mm, of the pose of the mean of
    each text's distribution. Raises what ``load_body`` raises for ``loss.body``.
    """
    body = load_body(loss.body or None)
    if 0 < loss.mesh < body.num_vertices:
        body = body.subset(np.linspace(0, body.num_vertices - 1, loss.mesh).astype(int))

    @functools.partial(jax.jit, static_argnums=0)
    def errors(graph: Any, state: Any, batch: Batch) -> dict[str, jax.Array]:
        model = nnx.merge(graph, state)
        value, parts = pose_vae_loss(model, batch, None, body, loss)
        means = model.draw(batch.tokens, batch.lengths, jnp.zeros((len(batch.poses), 1, model.config.latent)))[:, 0]
        true = Pose(axis_angle_to_matrix(batch.poses), "z-up", measured=batch.measured)
        pa_mpjpe = pose_metrics(Pose(means, "z-up"), true, body)["pa_mpjpe"]
        return {"val_loss": value, **{f"val_{name}": part for name, part in parts.items()}, "pa_mpjpe": pa_mpjpe.mean()}

    def validate(model: PoseVae, examples: Examples) -> dict[str, float]:
        graph, state = nnx.split(model)
        found = [(len(batch.poses), errors(graph, state, batch)) for batch in examples.batches(64)]
        return {name: sum(n * float(each[name]) for n, each in found) / len(examples.poses) for name in found[0][1]}

    return Recipe(
        lambda model, batch, key: pose_vae_loss(model, batch, key, body, loss), validate, "val_loss", higher=False
    )

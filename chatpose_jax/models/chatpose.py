"""The complete ChatPose model, and functions for any configuration: abstract shapes, fresh weights, a fake batch.

Modules only define the model; pure functions run it. Inside ``jax.jit``, ``bind(config, params)`` makes a callable model from a nested dict of
arrays::

    params = init_params(config, jax.random.key(0))
    hidden = jax.jit(lambda params, ids: bind(config, params)(ids).hidden)(params, ids)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from chatpose_jax.errors import UserError
from chatpose_jax.models.attention import Attend, attention, causal_attention
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.decoder import Decoder, KVCache
from chatpose_jax.models.heads import check_head, create_head, head_class, head_family
from chatpose_jax.models.heads.base import PoseHead, States
from chatpose_jax.models.projector import Projector
from chatpose_jax.models.sharding import constrain, shardings
from chatpose_jax.models.vision import VisionTower
from chatpose_jax.settings import one_line
from smpl_jax.pose import Pose, complete, unmeasured

Params = dict[Any, Any]
"""Nested dict of arrays; paths such as ``decoder/layers/attn/q_proj/kernel``. Unrolled layers have integer keys."""


@dataclasses.dataclass(frozen=True)
class Output:
    """hidden: (B, T, D) after the final RMSNorm. Position t predicts token t+1 and, if that is a pose token, its pose."""

    hidden: jax.Array
    cache: KVCache | None = None

    __repr__ = one_line


class ChatPoseModel(nnx.Module):
    """Vision tower, projector, decoder, pose head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = None if config.vision is None else VisionTower(config, rngs=rngs)
        self.projector = None if config.vision is None else Projector(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.pose_head = create_head(config.head, config.text.hidden_size, rngs=rngs)

    def encode_images(self, pixel_values: jax.Array, remat: str = "none") -> jax.Array:
        """(B, I, S, S, 3) normalised pixels -> (B, I*N, D) decoder embeddings; N is ``ModelConfig.image_tokens``.

        Raises UserError for a model without a vision tower.
        """
        if self.vision is None or self.projector is None:
            raise UserError("this model has no vision tower, so it cannot take images")
        batch, images = pixel_values.shape[:2]
        features = self.projector(self.vision(pixel_values.reshape(batch * images, *pixel_values.shape[2:]), remat))
        return constrain(features.reshape(batch, images * features.shape[1], -1), "batch", None, None)

    def embed(self, input_ids: jax.Array, image_features: jax.Array | None) -> jax.Array:
        """(B, T) ids -> (B, T, D). Image placeholders are replaced by the rows of ``image_features`` (B, I*N, D), in order of appearance."""
        is_image = input_ids == self.config.image_token_id
        x = self.decoder.embed_tokens(jnp.where(is_image, 0, input_ids))
        if image_features is None:
            return x
        index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, image_features.shape[1] - 1)
        x = jnp.where(is_image[..., None], jnp.take_along_axis(image_features, index[..., None], axis=1), x)
        return constrain(x, "batch", None, None)

    def __call__(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        pixel_values: jax.Array | None = None,
        image_features: jax.Array | None = None,
        cache: KVCache | None = None,
        rows: jax.Array | None = None,
        led: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        remat: str = "none",
    ) -> Output:
        """Forward pass of complete rows (without a cache), or of the next tokens (with a cache).

        Args:
            input_ids: (B, T) int32. Each image is ``image_tokens`` copies of ``image_token_id``. A row may contain any number of images.
            attention_mask: (B, T), nonzero at tokens and zero at padding; None means no padding. Padding may be on either side; with a
                cache, it must be on the right.
            segment_ids: (B, T) int32, for packed rows that contain several conversations: 1, 2, … in order, 0 for padding. Conversations do not
                attend to each other, and positions start at 0 in each. Replaces ``attention_mask``; not allowed with a cache.
            pixel_values: (B, I, S, S, 3), images in order of appearance; in rows with fewer than I images the rest is ignored. May be None.
            image_features: (B, M, D), what ``encode_images`` gives for the image tokens, in order of appearance, instead of ``pixel_values``.
            cache: each row's new tokens are written from its ``cache.lengths`` on. ``lengths + T`` must not exceed the capacity.
            rows: (B,) int32, the rows of the cache that those of ``input_ids`` continue; None for all in order.
            led: (B, T, D), the result of ``lead`` for these rows. Images, embedding and leading layers then do not run. Not with a cache.
            dropout_key: turns adapter dropout on.
            remat: name of the rematerialisation policy, see ``models.remat``.

        Returns:
            Output. With a cache, the ``lengths`` of ``output.cache`` count the new tokens too.
        """
        if led is not None:
            x = led.astype(self.decoder.dtype)
        elif image_features is not None:
            x = self.embed(input_ids, image_features)
        else:
            x = self._embedded(input_ids, pixel_values, remat)
        if cache is None:
            positions, attend = self._rows(input_ids, attention_mask, segment_ids, x.dtype)
            hidden, _ = self.decoder(x, positions, attend, dropout_key=dropout_key, remat=remat, led=led is not None)
            return Output(hidden)
        present = _present(input_ids, attention_mask)
        held = cache.lengths if rows is None else cache.lengths[rows]
        positions = held[:, None] + jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        mask = jnp.arange(cache.capacity) <= positions[..., None]
        attend = functools.partial(attention, mask=mask)
        hidden, new_cache = self.decoder(x, positions, attend, cache, rows, dropout_key=dropout_key, remat=remat)
        assert new_cache is not None
        lengths = held + jnp.sum(present, axis=1, dtype=jnp.int32)
        lengths = lengths if rows is None else cache.lengths.at[rows].set(lengths)
        return Output(hidden, dataclasses.replace(new_cache, lengths=lengths))

    def lead(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        pixel_values: jax.Array | None = None,
    ) -> jax.Array:
        """(B, T, D) states of complete rows after the decoder layers before the first with adapters (``ModelConfig.leading_layers``), in the compute
        dtype. Arguments as those of a call.

        The state of a token depends only on the tokens before it, so padding on the right, and the other conversations of a packed row, have no
        part in it.
        """
        x = self._embedded(input_ids, pixel_values, "none")
        return self.decoder.lead(x, *self._rows(input_ids, attention_mask, segment_ids, x.dtype))

    def _embedded(self, input_ids: jax.Array, pixel_values: jax.Array | None, remat: str) -> jax.Array:
        features = None if pixel_values is None else self.encode_images(pixel_values, remat)
        return self.embed(input_ids, features)

    def _rows(
        self, input_ids: jax.Array, attention_mask: jax.Array | None, segments: jax.Array | None, dtype: Any
    ) -> tuple[jax.Array, Attend]:
        """Positions and attention of complete rows."""
        present = _present(input_ids, attention_mask)
        positions = _counted(present) if segments is None else _positions(segments)
        if segments is None and attention_mask is not None:
            segments = present.astype(jnp.int32)
        length, text = input_ids.shape[1], self.config.text
        return positions, causal_attention(self.config.attention, length, text.head_dim, dtype, segments)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., D) -> (..., V) float32."""
        return self.decoder.logits(hidden)

    def states(self, hidden: jax.Array, pose_index: jax.Array, segment_ids: jax.Array | None = None) -> States:
        """The input of the pose head, from (B, T, D) final states of complete rows.

        Args:
            pose_index: (B, P), the position of the state that predicts each pose token.
            segment_ids: (B, T), for packed rows: a pose attends only to its own conversation.
        """
        token = jnp.take_along_axis(hidden, pose_index[..., None], axis=1).astype(jnp.float32)
        token = constrain(token, "batch", None, None)
        if self.pose_head.reads == "token":
            return States(token)
        before = jnp.arange(hidden.shape[1]) <= pose_index[..., None]
        if segment_ids is not None:
            own = jnp.take_along_axis(segment_ids, pose_index, axis=1)
            before &= segment_ids[:, None] == own[..., None]
        return States(token, hidden, before)

    def poses(self, states: States, key: jax.Array) -> Pose:
        """The poses of the pose head, of batch shape (B, P). key: random key for heads that draw samples."""
        return self.pose_head(dataclasses.replace(states, token=states.token.astype(jnp.float32)), key)


def _present(input_ids: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """(B, T) bool, True at tokens."""
    return jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)


def _counted(present: jax.Array) -> jax.Array:
    """(B, T) int32: the number of tokens before each."""
    return jnp.maximum(jnp.cumsum(present, axis=1, dtype=jnp.int32) - 1, 0)


def _positions(segments: jax.Array) -> jax.Array:
    """(B, T) segment ids -> the position of each token in its own conversation."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    first = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def _split(config: ModelConfig) -> tuple[Any, Any]:
    return _split_with(head_class(config.head.name), config)


@functools.lru_cache(maxsize=32)
def _split_with(head: type[PoseHead], config: ModelConfig) -> tuple[Any, Any]:
    """head: the class that ``config`` names now; a notebook defines one again and again by the same name."""
    with nnx.use_eager_sharding(False):
        check_head(config.head, config.text.hidden_size)
        return nnx.split(nnx.eval_shape(lambda: ChatPoseModel(config, rngs=nnx.Rngs(0))))


def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree as ``jax.ShapeDtypeStruct``s. Nothing is allocated."""
    return nnx.to_pure_dict(_split(config)[1])


def init_params(config: ModelConfig, key: jax.Array, mesh: Mesh | None = None) -> Params:
    """Fresh random weights, the same on every mesh. Each device makes its own shard."""
    return _init_with(head_class(config.head.name), config, mesh)(key)


@functools.lru_cache(maxsize=32)
def _init_with(head: type[PoseHead], config: ModelConfig, mesh: Mesh | None) -> Callable[[jax.Array], Params]:
    """Compiled once for each model and mesh. head: as in ``_split_with``."""

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(ChatPoseModel(config, rngs=nnx.Rngs(key))))

    return jax.jit(init, out_shardings=None if mesh is None else shardings(abstract_params(config), mesh))


def attend_evenly(params: Params) -> Params:
    """Makes the decoder's initial attention nearly uniform: scales the query kernels of fresh parameters by 0.01, so that scores are near 0.

    Random queries attend to a few random tokens, and training has to undo this before the model can read captions. Use it when no weights are
    pretrained.
    """
    layers = params["decoder"]["layers"]
    attn = layers["attn"]
    q_proj = attn["q_proj"]
    size = next((name for name in ("kernel_scale", "group_scale") if name in q_proj), "kernel")
    q_proj = {**q_proj, size: q_proj[size] * 0.01}
    return {**params, "decoder": {**params["decoder"], "layers": {**layers, "attn": {**attn, "q_proj": q_proj}}}}


def bind(config: ModelConfig, params: Params) -> ChatPoseModel:
    """The model with these parameters. It is cheap enough to call inside every traced function."""
    graphdef, state = _split(config)
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def fake_batch(config: ModelConfig, batch: int = 2, length: int = 32, images: int = 1, seed: int = 0) -> dict[str, Any]:
    """A random training batch with the right shapes (see ``docs/architecture.md``): images first, one pose token near the end."""
    rng = np.random.default_rng(seed)
    images = images if config.vision is not None else 0
    patches, size = config.image_tokens * images, config.image_size
    total = patches + length
    ids = rng.integers(3, config.text.base_vocab_size, (batch, total), dtype=np.int32)
    ids[:, :patches], ids[:, -2] = config.image_token_id, config.pose_token_id
    poses = complete(unmeasured((batch, 1), head_family(config.head)))
    labels = np.where(np.arange(total) < total - length // 2, -100, ids).astype(np.int32)
    data = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, total), np.int32),
        "labels": labels,
        "pose_index": np.full((batch, 1), total - 3, np.int32),
        "poses": poses.replace(measured=np.ones_like(poses.measured)),
        "pose_mask": np.ones((batch, 1), bool),
    }
    if images:
        data["pixel_values"] = rng.standard_normal((batch, images, size, size, 3), dtype=np.float32)
    return data


def unstack_layers(params: Params, *, consume: bool = False, config: ModelConfig | None = None) -> Params:
    """Stacked layers (leading axis L) -> ``{0: …, 1: …}``, the layout of ``scan_layers=False``.

    Also inside a traced function: the gradient of an array is put together once, not layer by layer.

    consume: free each stacked array once it is unstacked, so that the model is never in memory twice. ``params`` cannot be used afterwards.
    config: needed where ``params`` is only a part of a model, such as its adapters, which does not tell how many layers there are.
    """

    def spread(layers: Params, count: int) -> Params:
        out: Params = {}
        for name, value in layers.items():
            if isinstance(value, dict):
                pieces = spread(value, count)
            else:  # fewer than there are layers: of the last ones
                pieces = dict(enumerate(_pieces(value), count - len(value)))
                if consume:
                    jax.block_until_ready(pieces)
                    value.delete()
            for i, piece in pieces.items():
                out.setdefault(i, {})[name] = piece
        return out

    def change(tower: str, layers: Params) -> Params:
        longest = max(len(leaf) for leaf in jax.tree.leaves(layers))
        return spread(layers, longest if config is None else _num_layers(config, tower))

    return _map_layers(params, change)


def _num_layers(config: ModelConfig, tower: str) -> int:
    if tower == "decoder":
        return config.text.num_layers
    assert config.vision is not None
    return config.vision.num_used_layers


@jax.jit
def _pieces(stack: jax.Array) -> list[jax.Array]:
    return [jnp.squeeze(piece, 0) for piece in jax.lax.split(stack, (1,) * len(stack))]


def stack_layers(params: Params, *, consume: bool = False) -> Params:
    """The inverse of ``unstack_layers``. Keys may be integers or strings of digits. consume: as there."""

    def change(tower: str, layers: Params) -> Params:
        return join([layers[i] for i in sorted(layers, key=int)])

    def join(layers: list[Params]) -> Params:
        names = dict.fromkeys(name for layer in layers for name in layer)
        return {name: merge([layer[name] for layer in layers if name in layer]) for name in names}

    def merge(pieces: list[Any]) -> Any:
        if isinstance(pieces[0], dict):
            return join(pieces)
        stack = jnp.stack(pieces)
        if consume:
            jax.block_until_ready(stack)
            for piece in pieces:
                piece.delete()
        return stack

    return _map_layers(params, change)


def _map_layers(params: Params, change: Callable[[str, Params], Params]) -> Params:
    """Applies ``change`` to the layers of vision tower and decoder only; a pose head may have a list named ``layers`` too."""
    towers = {
        name: {**params[name], "layers": change(name, params[name]["layers"])}
        for name in ("vision", "decoder")
        if "layers" in params.get(name, {})
    }
    return {**params, **towers}

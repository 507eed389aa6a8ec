"""Decoding: one jitted prefill, one jitted decode loop, a preallocated cache.

For each token the loop keeps the hidden state that **predicted** it. So the pose of each pose token, even of the first token, needs no further
forward pass. For streaming, the caller runs the same loop a few steps at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import Params, bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.decoder import CACHE_AXES, KVCache, init_cache
from chatpose_jax.models.heads.base import States
from chatpose_jax.models.sharding import RULES, constrain, current_mesh, mesh_of, on_mesh
from chatpose_jax.settings import instance, one_line, real, whole

Y = TypeVar("Y")
R = TypeVar("R")

PROMPT_BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096)
CAPACITY_STEP = 128


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, otherwise from the smallest set of tokens with a total probability of ``top_p``.

    temperature: 0, or between 1e-6 and 1e6. top_p: between 1e-6 and 1. seed: a whole number in [0, 2³²). Numbers may be of Python, NumPy or
    JAX. Raises a UserError that names any other value.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", real("temperature", self.temperature, _is_temperature, _TEMPERATURES))
        object.__setattr__(self, "top_p", real("top_p", self.top_p, lambda p: 1e-6 <= p <= 1, "between 1e-6 and 1"))
        # JAX in 32-bit mode silently drops more than 32 bits.
        object.__setattr__(self, "seed", whole("seed", self.seed, 0, 2**32 - 1))


_TEMPERATURES = "0 (greedy) or between 1e-6 and 1e6"


def _is_temperature(value: float) -> bool:
    return value == 0 or 1e-6 <= value <= 1e6  # outside this range, logits / temperature may overflow float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The carry of the decode loop. B rows, at most N new tokens.

    token: (B,) the newest token, not yet in the cache.
    tokens: (B, N) emitted ids, pad after the end. hidden: (B, N, D) float32, the state that predicted each token.
    step: () tokens emitted so far by the longest row. done: (B,) bool, whether the row has ended. lengths: (B,) tokens emitted, including the
    end of sequence. has_pose: (B,) bool. forced: (B,) index into the forced tail that is being written, or -1. finite: (B,) bool, whether all
    logits so far were finite; a row ends if they are not.
    """

    cache: KVCache
    key: jax.Array
    token: jax.Array
    tokens: jax.Array
    hidden: jax.Array
    step: jax.Array
    done: jax.Array
    lengths: jax.Array
    has_pose: jax.Array
    forced: jax.Array
    finite: jax.Array

    __repr__ = one_line


@dataclasses.dataclass(frozen=True)
class Generated:
    """tokens: for each row, its new ids, including the end of sequence if there is one. hidden: (len, D) float32, a state for each token.

    cache: contains the prompt and every token of the answer except the last one. To continue, pass it back with the ids that it lacks.
    starts: (B,) int32, the slot in the cache of the state that predicted the first token of each row; the next tokens' follow.
    """

    tokens: list[np.ndarray]
    hidden: list[np.ndarray]
    cache: KVCache
    starts: np.ndarray

    __repr__ = one_line


def decode_shardings(state: DecodeState, mesh: Mesh) -> DecodeState:
    """The shardings of a decode state (of arrays or abstract shapes): rows and heads are split by the rules of ``models.sharding``."""

    def put(x: Any, *logical: Any) -> NamedSharding:
        return NamedSharding(mesh, RULES.spec(logical, x.shape, mesh))

    spread = jax.tree.map(lambda x: put(x, "batch", *(None,) * (x.ndim - 1)) if x.ndim else put(x), state)
    keys, values = jax.tree.map(lambda x: put(x, *CACHE_AXES), (state.cache.keys, state.cache.values))
    return dataclasses.replace(spread, cache=dataclasses.replace(spread.cache, keys=keys, values=values))


def _splits(batch: int, mesh: Mesh | None) -> bool:
    """Whether the mesh splits a batch of this size."""
    return mesh is not None and RULES.spec(("batch",), (batch,), mesh)[0] is not None


def _spread(state: DecodeState) -> DecodeState:
    """Shard a state on the mesh of the enclosing ``on_mesh``."""
    mesh = current_mesh()
    return state if mesh is None else jax.lax.with_sharding_constraint(state, decode_shardings(state, mesh))


def _choose(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array, greedy: bool) -> jax.Array:
    """(B, V) -> (B,). Nucleus sampling: Holtzman et al. 2019, section 3.1."""
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature

    def nucleus() -> jax.Array:
        order = jnp.argsort(-logits, axis=-1)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        outside = jnp.cumsum(probabilities, axis=-1) - probabilities >= top_p
        ranked = jnp.where(outside, -jnp.inf, jnp.log(probabilities))
        rank = jax.random.categorical(key, ranked, axis=-1)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    def everything() -> jax.Array:  # without the sort, which takes longer than a small model's step on CPU
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(top_p < 1, nucleus, everything)


def _emit(
    config: ModelConfig,
    state: DecodeState,
    hidden: jax.Array,
    logits: jax.Array,
    settings: dict[str, jax.Array],
    greedy: bool,
) -> DecodeState:
    """Choose the next token from the states (B, D) that predict it, and record both."""
    tail, limit = settings["tail"], state.tokens.shape[1]
    hidden = constrain(hidden, "batch", None)
    finite = state.finite & (state.done | jnp.isfinite(logits).all(axis=-1))
    if config.image_token_id >= 0:  # the image placeholder is never generated
        logits = logits.at[:, config.image_token_id].set(-jnp.inf)
    token = _choose(
        logits, jax.random.fold_in(state.key, state.step), settings["temperature"], settings["top_p"], greedy
    )
    late = _ends(config, token) | (state.step >= limit - tail.shape[0])
    begin = settings["force_pose"] & ~state.has_pose & (state.forced < 0) & late
    forced = jnp.where(begin, 0, state.forced)
    token = jnp.where(forced >= 0, tail[jnp.clip(forced, 0, tail.shape[0] - 1)], token)
    token = jnp.where(state.done, config.pad_token_id, token)
    emitted = dataclasses.replace(
        state,
        token=token,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        hidden=jax.lax.dynamic_update_slice_in_dim(
            state.hidden, hidden[:, None].astype(jnp.float32), state.step, axis=1
        ),
        step=state.step + 1,
        lengths=state.lengths + ~state.done,
        done=state.done | _ends(config, token) | ~finite,
        has_pose=state.has_pose | ((token == config.pose_token_id) & ~state.done),
        forced=jnp.where(forced >= 0, forced + 1, forced),
        finite=finite,
    )
    return _spread(emitted)


def _ends(config: ModelConfig, token: jax.Array) -> jax.Array:
    """Which of (B,) tokens end an answer."""
    return (token[:, None] == jnp.asarray(config.end_token_ids)).any(axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "greedy", "mesh"), donate_argnames="cache")
def prefill(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    input_ids: jax.Array,
    lengths: jax.Array,
    pixel_values: jax.Array | None,
    key: jax.Array,
    settings: dict[str, jax.Array],
    *,
    max_new_tokens: int,
    greedy: bool,
    mesh: Mesh | None = None,
) -> DecodeState:
    """Run the (right-padded) prompt once and emit the first token.

    Args:
        input_ids: (B, T), right-padded; ``lengths`` (B,) is the number of tokens in each row, at least one.
        pixel_values: (B, I, S, S, 3) or None.
        settings: ``temperature``, ``top_p`` () float32, ``force_pose`` () bool, ``tail`` (F,) int32, the ids that end a forced answer.
        mesh: the mesh of the parameters; None for one device.
    """
    batch, length = input_ids.shape
    with on_mesh(mesh, gathers=_splits(batch, mesh)):
        model = bind(config, params)
        if pixel_values is not None:
            pixel_values = constrain(pixel_values, "batch", None, None, None, None)
        present = jnp.arange(length) < lengths[:, None]
        output = model(input_ids, attention_mask=present, pixel_values=pixel_values, cache=cache)
        hidden = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        assert output.cache is not None
        state = DecodeState(
            cache=output.cache,
            key=key,
            token=jnp.zeros(batch, jnp.int32),
            tokens=jnp.full((batch, max_new_tokens), config.pad_token_id, jnp.int32),
            hidden=jnp.zeros((batch, max_new_tokens, hidden.shape[-1]), jnp.float32),
            step=jnp.zeros((), jnp.int32),
            done=jnp.zeros(batch, bool),
            lengths=jnp.zeros(batch, jnp.int32),
            has_pose=jnp.zeros(batch, bool),
            forced=jnp.full(batch, -1, jnp.int32),
            finite=jnp.ones(batch, bool),
        )
        return _emit(config, state, hidden, model.logits(hidden), settings, greedy)


MERGES_NOTHING = {"xla_gpu_dot_merger_threshold_mb": 0}
"""Compiler options of the decode loop. XLA for GPUs would merge the products of queries, keys and values of a single row into one, and for this
put their weights side by side again in every step: three times the traffic of these weights. Other backends ignore it."""


@functools.partial(
    jax.jit, static_argnames=("config", "greedy", "mesh"), donate_argnames="state", compiler_options=MERGES_NOTHING
)
def decode(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    until: jax.Array,
    settings: dict[str, jax.Array],
    *,
    greedy: bool,
    mesh: Mesh | None = None,
) -> DecodeState:
    """Emit tokens until every row is done or there are ``until`` tokens. mesh: as for ``prefill``."""

    def body(state: DecodeState) -> DecodeState:
        output = model(state.token[:, None], attention_mask=~state.done[:, None], cache=state.cache)
        hidden = output.hidden[:, 0]
        assert output.cache is not None
        state = dataclasses.replace(state, cache=output.cache)
        return _emit(config, state, hidden, model.logits(hidden), settings, greedy)

    with on_mesh(mesh, gathers=False):
        model = bind(config, params)
        return jax.lax.while_loop(lambda state: (state.step < until) & ~jnp.all(state.done), body, state)


def bucket(length: int) -> int:
    """The padded length of a prompt. There are few of them, so that few programs are compiled."""
    return next((size for size in PROMPT_BUCKETS if size >= length), -(-length // 1024) * 1024)


@functools.partial(jax.jit, static_argnames="capacity")
def _grow(cache: KVCache, capacity: int) -> KVCache:
    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, capacity - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

    keys, values, states = (
        jax.tree.map(lambda x: pad(x, x.ndim - 2), part) for part in (cache.keys, cache.values, cache.states)
    )
    return dataclasses.replace(cache, keys=keys, values=values, states=states)


def generate_stream(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    images: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    force_tail: Sequence[int] | None = None,
    cache: KVCache | None = None,
    stream_every: int = 1,
) -> Generator[tuple[np.ndarray, np.ndarray], None, Generated]:
    """Answer a batch of prompts, a few tokens at a time.

    Yields the (B, n) new ids and the (B,) numbers of tokens emitted so far: after the first token, and then after every ``stream_every``.
    The return value of the generator is the complete answer.

    Args:
        config: ``scan_layers`` says whether the layers of ``params`` are stacked; unrolled layers decode faster.
        params: on one device, or on a mesh. Decoding runs there.
        prompts: B arrays of ids, of any lengths, with expanded image placeholders.
        images: for each row, its (S, S, 3) arrays in order of appearance.
        force_tail: ids that replace the end of an answer without a pose. They contain a pose token, and the end of sequence is the last one.
        cache: the cache of earlier turns, B rows; ``prompts`` then contains only the new tokens. It is donated.

    Raises:
        UserError if a setting is out of range, a prompt is empty, images do not match their placeholders, a prompt and its answer exceed the
        context, the answer is too short for the forced tail, or the model's logits are not finite.
    """
    max_new_tokens, stream_every = whole("max_new_tokens", max_new_tokens, 1), whole("stream_every", stream_every, 1)
    instance("sampling", sampling, Sampling, "a chatpose_jax.generate.Sampling")
    batch, lengths = len(prompts), np.array([len(ids) for ids in prompts], np.int32)
    if batch == 0 or lengths.min() == 0:
        raise UserError(
            f"prompts must be at least one array of ids, and none may be empty; found lengths {lengths.tolist()}"
        )
    _check_images(config, prompts, images)
    if force_tail is not None and max_new_tokens < len(force_tail):
        raise UserError(
            f"max_new_tokens={max_new_tokens} leaves no room for a pose: at least {len(force_tail)} are needed"
        )
    held = np.zeros(batch, np.int32) if cache is None else np.asarray(cache.lengths)
    longest, context = int((held + lengths).max()), config.text.max_position_embeddings
    if longest + max_new_tokens > context:
        raise UserError(
            f"the prompt has {longest} tokens (an image counts {config.image_tokens}) and the answer may have {max_new_tokens}, "
            f"but the context is {context}: shorten the conversation or lower max_new_tokens"
        )
    padded = bucket(int(lengths.max()))
    capacity = -(-max(int(held.max()) + padded, longest + max_new_tokens) // CAPACITY_STEP) * CAPACITY_STEP
    mesh = mesh_of(params)
    if cache is None:
        cache = init_cache(config, batch, capacity, mesh)
    elif cache.capacity < capacity:
        cache = _grow(cache, capacity)

    input_ids = np.full((batch, padded), config.pad_token_id, np.int32)
    for row, ids in zip(input_ids, prompts):
        row[: len(ids)] = ids
    greedy = sampling.temperature == 0
    settings = {
        "temperature": jnp.float32(sampling.temperature),
        "top_p": jnp.float32(sampling.top_p),
        "force_pose": jnp.asarray(force_tail is not None),
        "tail": jnp.asarray([config.eos_token_id] if force_tail is None else list(force_tail), jnp.int32),
    }
    state = prefill(
        config, params, cache, jnp.asarray(input_ids), jnp.asarray(lengths), _pixels(config, images, batch),
        jax.random.key(sampling.seed), settings, max_new_tokens=max_new_tokens, greedy=greedy, mesh=mesh,
    )  # fmt: skip
    seen = 0
    while True:
        # One transfer for all, because each transfer waits for the device.
        emitted, finite, done, counts = jax.device_get((state.step, state.finite, state.done, state.lengths))
        step = int(emitted)
        if not finite.all():
            raise UserError(
                f"the model's logits for a token of the answer are not finite. Either its weights contain NaN or infinities (chatpose convert counts "
                f"them), or the range of {config.dtype} is too small: load the model with dtype='float32'"
            )
        yield np.asarray(state.tokens[:, seen:step]), counts
        seen = step
        if step >= max_new_tokens or done.all():
            break
        state = decode(
            config,
            params,
            state,
            jnp.int32(min(step + stream_every, max_new_tokens)),
            settings,
            greedy=greedy,
            mesh=mesh,
        )
    tokens, hidden = np.asarray(state.tokens), np.asarray(state.hidden)
    return Generated(
        [t[:n] for t, n in zip(tokens, counts)],
        [h[:n] for h, n in zip(hidden, counts)],
        state.cache,
        held + lengths - 1,  # the last token of each prompt predicts the first token of its answer
    )


class Returning(Iterable[Y], Generic[Y, R]):
    """Wraps a generator, to iterate over it once. After the last item, ``value`` is its return value."""

    value: R

    def __init__(self, steps: Generator[Y, None, R]):
        self._steps = steps

    def __iter__(self) -> Generator[Y, None, R]:
        self.value = yield from self._steps
        return self.value


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    images: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    stream_every: int | None = None,
    max_new_tokens: int = 128,
    **settings: Any,
) -> Generated:
    """Runs ``generate_stream`` to its end. ``on_tokens`` is called with what it yields, after every token unless ``stream_every`` is set."""
    every = (max_new_tokens if on_tokens is None else 1) if stream_every is None else stream_every
    steps = Returning(
        generate_stream(config, params, prompts, images, max_new_tokens=max_new_tokens, stream_every=every, **settings)
    )
    for tokens, counts in steps:
        if on_tokens is not None:
            on_tokens(tokens, counts)
    return steps.value


def pose_states(config: ModelConfig, generated: Generated) -> tuple[States, np.ndarray]:
    """The input of the pose head for an answer: States of P pose tokens in each row, where P is the largest number in a row.

    Also returns the (B, P) mask of the entries that are pose tokens. The other entries are padding.
    """
    places = [np.flatnonzero(tokens == config.pose_token_id) for tokens in generated.tokens]
    mask = np.arange(max(map(len, places))) < np.array([[len(place)] for place in places])
    token, slots = np.zeros((*mask.shape, config.text.hidden_size), np.float32), np.zeros(mask.shape, np.int32)
    token[mask] = np.concatenate([hidden[place] for hidden, place in zip(generated.hidden, places)])
    slots[mask] = np.concatenate([start + place for start, place in zip(generated.starts, places)])
    conversation = generated.cache.states
    if conversation is None:
        return States(jnp.asarray(token)), mask
    before = jnp.arange(generated.cache.capacity) <= jnp.asarray(slots)[..., None]
    return States(jnp.asarray(token), conversation, before), mask


def pose_key(sampling: Sampling) -> jax.Array:
    """The random key of the pose head. The key of token n is ``fold_in(key(seed), n)``, and no answer has 0xFFFFFFFF tokens."""
    return jax.random.fold_in(jax.random.key(sampling.seed), 0xFFFFFFFF)


def _check_images(
    config: ModelConfig, prompts: Sequence[np.ndarray], images: Sequence[Sequence[np.ndarray]] | None
) -> None:
    """Raises UserError unless the images of each row match its placeholders."""
    if images is not None and len(images) != len(prompts):
        raise UserError(f"images must be one list for each of {len(prompts)} prompts, found {len(images)} lists")
    size, patches = config.image_size, config.image_tokens
    for row, ids in enumerate(prompts):
        given = [] if images is None else images[row]
        if given and config.vision is None:
            raise UserError(f"prompt {row} has {len(given)} images, and this model has no vision tower; give it none")
        places = int((np.asarray(ids) == config.image_token_id).sum())
        if places != patches * len(given):
            raise UserError(
                f"prompt {row} has {places} image placeholders and {len(given)} images, which need {patches} placeholders each"
            )
        for image in given:
            if np.shape(image) != (size, size, 3):
                raise UserError(f"images must be ({size}, {size}, 3), found {np.shape(image)} in row {row}")


def _pixels(config: ModelConfig, images: Sequence[Sequence[np.ndarray]] | None, batch: int) -> jax.Array | None:
    most = max((len(row) for row in images), default=0) if images is not None else 0
    if images is None or most == 0:
        return None
    size = config.image_size
    pixels = np.zeros((batch, most, size, size, 3), np.float32)
    for b, row in enumerate(images):
        for i, image in enumerate(row):
            pixels[b, i] = image
    return jnp.asarray(pixels)

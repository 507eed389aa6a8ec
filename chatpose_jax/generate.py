"""Decoding: one compiled program that reads prompts, one that writes answers, a preallocated cache.

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


STEPS = 16
"""Tokens that one call of ``decode`` writes for each row, at most."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnswerRows:
    """An answer under way in each of B rows of a cache, or none.

    token: (B,) int32, the newest token of prompt or answer, not yet in the cache.
    seed: (B,) uint32; token n is drawn with ``fold_in(key(seed), n)``. temperature, top_p: (B,) float32, as in ``Sampling``.
    limit: (B,) int32, tokens of the answer at most. force_pose: (B,) bool, whether an answer without a pose ends with the tail.
    step: (B,) int32, tokens emitted so far, including the end of sequence. done: (B,) bool, whether the answer has ended; also of a row that has
        none. has_pose: (B,) bool. forced: (B,) index into the tail that is being written, or -1.
    finite: (B,) bool, whether all logits so far were finite; an answer ends if they are not.
    """

    token: jax.Array
    seed: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    limit: jax.Array
    force_pose: jax.Array
    step: jax.Array
    done: jax.Array
    has_pose: jax.Array
    forced: jax.Array
    finite: jax.Array

    __repr__ = one_line


def begin(
    tokens: Sequence[int], sampling: Sequence[Sampling], limits: Sequence[int], force_pose: Sequence[bool]
) -> AnswerRows:
    """B rows whose prompts are in the cache but for their last ``tokens``; arrays of NumPy."""
    batch = len(tokens)
    rows: dict[str, Any] = {
        "token": np.array(tokens, np.int32),
        "seed": np.array([draw.seed for draw in sampling], np.uint32),
        "temperature": np.array([draw.temperature for draw in sampling], np.float32),
        "top_p": np.array([draw.top_p for draw in sampling], np.float32),
        "limit": np.array(limits, np.int32),
        "force_pose": np.array(force_pose, bool),
        "step": np.zeros(batch, np.int32),
        "done": np.zeros(batch, bool),
        "has_pose": np.zeros(batch, bool),
        "forced": np.full(batch, -1, np.int32),
        "finite": np.ones(batch, bool),
    }
    return AnswerRows(**rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A cache of B rows, and their answers."""

    cache: KVCache
    rows: AnswerRows

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

    spread = jax.tree.map(lambda x: put(x, "batch", *(None,) * (x.ndim - 1)), state)
    keys, values = jax.tree.map(lambda x: put(x, *CACHE_AXES), (state.cache.keys, state.cache.values))
    return dataclasses.replace(spread, cache=dataclasses.replace(spread.cache, keys=keys, values=values))


def _splits(batch: int, mesh: Mesh | None) -> bool:
    """Whether the mesh splits a batch of this size."""
    return mesh is not None and RULES.spec(("batch",), (batch,), mesh)[0] is not None


def _spread(state: DecodeState) -> DecodeState:
    """Shard a state on the mesh of the enclosing ``on_mesh``."""
    mesh = current_mesh()
    return state if mesh is None else jax.lax.with_sharding_constraint(state, decode_shardings(state, mesh))


def _choose(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array, greedy: bool) -> jax.Array:
    """(B, V) logits, (B,) of all else -> (B,) tokens. Nucleus sampling: Holtzman et al. 2019, section 3.1."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if greedy:
        return best
    logits = logits / jnp.where(temperature == 0, 1, temperature)[:, None]

    def nucleus() -> jax.Array:
        probabilities = jax.nn.softmax(logits, axis=-1)
        ranked = -jnp.sort(-probabilities, axis=-1)
        inside = jnp.cumsum(ranked, axis=-1) - ranked < top_p[:, None]
        least = jnp.min(jnp.where(inside, ranked, 1), axis=-1)
        return jnp.where((probabilities < least[:, None]) & (top_p < 1)[:, None], -jnp.inf, logits)

    # Without a nucleus nothing is sorted, which takes longer than a small model's step on CPU. A row draws the same beside rows that have one.
    within = jax.lax.cond(jnp.any(top_p < 1), nucleus, lambda: logits)
    drawn = jax.vmap(jax.random.categorical)(keys, within).astype(jnp.int32)
    return jnp.where(temperature == 0, best, drawn)


def _emit(config: ModelConfig, rows: AnswerRows, logits: jax.Array, tail: jax.Array, greedy: bool) -> AnswerRows:
    """Chooses the next token of each row from its logits (B, V)."""
    finite = rows.finite & (rows.done | jnp.isfinite(logits).all(axis=-1))
    if config.image_token_id >= 0:  # the image placeholder is never generated
        logits = logits.at[:, config.image_token_id].set(-jnp.inf)
    keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(rows.seed, rows.step)
    token = _choose(logits, keys, rows.temperature, rows.top_p, greedy)
    late = _ends(config, token) | (rows.step >= rows.limit - len(tail))
    forced = jnp.where(rows.force_pose & ~rows.has_pose & (rows.forced < 0) & late, 0, rows.forced)
    token = jnp.where(forced >= 0, tail[jnp.clip(forced, 0, len(tail) - 1)], token)
    token = jnp.where(rows.done, config.pad_token_id, token)
    step = rows.step + ~rows.done
    return dataclasses.replace(
        rows,
        token=token,
        step=step,
        done=rows.done | _ends(config, token) | ~finite | (step >= rows.limit),
        has_pose=rows.has_pose | ((token == config.pose_token_id) & ~rows.done),
        forced=jnp.where(forced >= 0, forced + 1, forced),
        finite=finite,
    )


def _ends(config: ModelConfig, token: jax.Array) -> jax.Array:
    """Which of (B,) tokens end an answer."""
    return (token[:, None] == jnp.asarray(config.end_token_ids)).any(axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def see(config: ModelConfig, params: Params, pixel_values: jax.Array, *, mesh: Mesh | None = None) -> jax.Array:
    """(B, I, S, S, 3) pixels -> (B, I * N, D) features of images. mesh: that of the parameters; None for one device."""
    with on_mesh(mesh, gathers=_splits(len(pixel_values), mesh)):
        return bind(config, params).encode_images(constrain(pixel_values, "batch", None, None, None, None))


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="cache")
def read(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    input_ids: jax.Array,
    counts: jax.Array,
    features: jax.Array | None = None,
    rows: jax.Array | None = None,
    held: jax.Array | None = None,
    *,
    mesh: Mesh | None = None,
) -> KVCache:
    """The cache with the next tokens of all rows, or of some.

    Args:
        input_ids: (R, T), right-padded; ``counts`` (R,) is the number of tokens in each row. ``lengths + T`` must not exceed the capacity.
        features: (R, M, D), of the image tokens of ``input_ids`` in their order; None without any. M may be more than there are.
        rows: (R,) int32, the rows of the cache that those of ``input_ids`` continue, each once; None for all in order.
        held: (R,) int32, how many of their tokens these rows keep; None for all.
        mesh: the mesh of the parameters; None for one device.
    """
    with on_mesh(mesh, gathers=_splits(len(input_ids), mesh)):
        if held is not None:
            cache = dataclasses.replace(cache, lengths=cache.lengths.at[rows].set(held))
        present = jnp.arange(input_ids.shape[1]) < counts[:, None]
        output = bind(config, params)(
            input_ids, attention_mask=present, image_features=features, cache=cache, rows=rows
        )
        assert output.cache is not None
        return output.cache


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
    count: jax.Array,
    tail: jax.Array,
    rows: jax.Array | None = None,
    *,
    greedy: bool,
    mesh: Mesh | None = None,
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """The next tokens of each answer: ``count`` of them, at most ``STEPS``; fewer where it ends.

    Args:
        tail: (F,) int32, the ids that end a forced answer.
        rows: (R,) int32, the rows whose answers go on, each once; None for all. Each step copies what they hold.
        greedy: whether the temperature of these rows is 0, which saves the draw.
        mesh: the mesh of the parameters; None for one device.

    Returns:
        The state, the tokens (B, STEPS), pad where there is none, and the states that predicted them, (B, STEPS, D) float32.
    """
    batch = len(state.rows.token)

    def going(carry: Any) -> jax.Array:
        index, state, *_ = carry
        return (index < jnp.minimum(count, STEPS)) & ~jnp.all(state.rows.done)

    def body(carry: Any) -> Any:
        index, state, tokens, states = carry
        present = ~state.rows.done[:, None]
        output = model(state.rows.token[:, None], attention_mask=present, cache=state.cache, rows=rows)
        assert output.cache is not None
        hidden = constrain(output.hidden[:, 0], "batch", None)
        answers = _emit(config, state.rows, model.logits(hidden), tail, greedy)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, answers.token[:, None], index, axis=1)
        states = jax.lax.dynamic_update_slice_in_dim(states, hidden[:, None].astype(jnp.float32), index, axis=1)
        return index + 1, _spread(DecodeState(output.cache, answers)), tokens, states

    def put(all_rows: jax.Array, some: jax.Array) -> jax.Array:
        return some if rows is None else all_rows.at[rows].set(some)

    with on_mesh(mesh, gathers=False):
        model = bind(config, params)
        tokens = jnp.full((batch, STEPS), config.pad_token_id, jnp.int32)
        states = constrain(jnp.zeros((batch, STEPS, config.text.hidden_size), jnp.float32), "batch", None, None)
        some = (state.rows, tokens, states)
        if rows is not None:
            some = jax.tree.map(lambda x: x[rows], some)
        begin = (jnp.int32(0), DecodeState(state.cache, some[0]), *some[1:])
        _, end, *new = jax.lax.while_loop(going, body, begin)
        answers, tokens, states = jax.tree.map(put, (state.rows, tokens, states), (end.rows, *new))
        return DecodeState(end.cache, answers), tokens, states


def bucket(length: int) -> int:
    """The padded length of a prompt. There are few of them, so that few programs are compiled."""
    return next((size for size in PROMPT_BUCKETS if size >= length), -(-length // 1024) * 1024)


@functools.partial(jax.jit, static_argnames="capacity")
def resize(cache: KVCache, capacity: int) -> KVCache:
    """The cache with another capacity, which holds all of its tokens."""

    def fit(x: jax.Array) -> jax.Array:
        more = capacity - x.shape[-2]
        if more < 0:
            return jax.lax.slice_in_dim(x, 0, capacity, axis=x.ndim - 2)
        return jnp.pad(x, [(0, more if i == x.ndim - 2 else 0) for i in range(x.ndim)])

    keys, values, states = (jax.tree.map(fit, part) for part in (cache.keys, cache.values, cache.states))
    return dataclasses.replace(cache, keys=keys, values=values, states=states)


def generate_stream(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    images: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
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
        sampling: one for all prompts, or one for each. An answer does not depend on the others of its batch.
        force_tail: ids that replace the end of an answer without a pose. They contain a pose token, and the end of sequence is the last one.
        cache: the cache of earlier turns, B rows; ``prompts`` then contains only the new tokens. It is donated.

    Raises:
        UserError if a setting is out of range, a prompt is empty, images do not match their placeholders, a prompt and its answer exceed the
        context, the answer is too short for the forced tail, or the model's logits are not finite.
    """
    max_new_tokens, stream_every = whole("max_new_tokens", max_new_tokens, 1), whole("stream_every", stream_every, 1)
    batch, lengths = len(prompts), np.array([len(ids) for ids in prompts], np.int32)
    if batch == 0 or lengths.min() == 0:
        raise UserError(
            f"prompts must be at least one array of ids, and none may be empty; found lengths {lengths.tolist()}"
        )
    _check_images(config, prompts, images)
    draws: list[Any] = list(sampling) if isinstance(sampling, list | tuple) else [sampling] * batch
    for draw in draws:
        instance("sampling", draw, Sampling, "a chatpose_jax.generate.Sampling")
    if len(draws) != batch:
        raise UserError(f"sampling: {len(draws)} for {batch} prompts; give one, or one for each prompt")
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
    padded = bucket(int(lengths.max()) - 1) if lengths.max() > 1 else 0
    capacity = -(-max(int(held.max()) + padded, longest + max_new_tokens) // CAPACITY_STEP) * CAPACITY_STEP
    mesh = mesh_of(params)
    if cache is None:
        cache = init_cache(config, batch, capacity, mesh)
    elif cache.capacity < capacity:
        cache = resize(cache, capacity)
    if padded:  # all but the last token of each prompt, from which decoding begins
        input_ids = np.full((batch, padded), config.pad_token_id, np.int32)
        for row, ids in zip(input_ids, prompts):
            row[: len(ids) - 1] = ids[:-1]
        pixels = _pixels(config, images, batch)
        features = None if pixels is None else see(config, params, pixels, mesh=mesh)
        cache = read(config, params, cache, jnp.asarray(input_ids), jnp.asarray(lengths - 1), features, mesh=mesh)
    last = [int(ids[-1]) for ids in prompts]
    state = DecodeState(cache, begin(last, draws, [max_new_tokens] * batch, [force_tail is not None] * batch))
    if mesh is not None:  # as decode returns it, so that it is compiled once
        state = jax.device_put(state, decode_shardings(state, mesh))
    tail = jnp.asarray([config.eos_token_id] if force_tail is None else list(force_tail), jnp.int32)
    greedy = all(draw.temperature == 0 for draw in draws)
    tokens, hidden = list[np.ndarray](), list[np.ndarray]()
    emitted, done, counts = 0, np.zeros(batch, bool), np.zeros(batch, np.int32)
    while not done.all():
        begun, until = len(tokens), 1 if emitted == 0 else emitted + stream_every
        while emitted < until and not done.all():
            state, *new = decode(config, params, state, jnp.int32(until - emitted), tail, greedy=greedy, mesh=mesh)
            # One transfer for all, because each transfer waits for the device.
            new, finite, done, counts = jax.device_get((new, state.rows.finite, state.rows.done, state.rows.step))
            if not finite.all():
                raise not_finite(config)
            count, emitted = int(counts.max()) - emitted, int(counts.max())
            tokens.append(new[0][:, :count])
            hidden.append(new[1][:, :count])
        yield np.concatenate(tokens[begun:], axis=1), counts
    return Generated(
        [row[:n] for row, n in zip(np.concatenate(tokens, axis=1), counts)],
        [row[:n] for row, n in zip(np.concatenate(hidden, axis=1), counts)],
        state.cache,
        held + lengths - 1,  # the last token of each prompt predicts the first token of its answer
    )


def not_finite(config: ModelConfig) -> UserError:
    """The error about logits that are not finite."""
    return UserError(
        f"the model's logits for a token of the answer are not finite. Either its weights contain NaN or infinities (chatpose convert counts them), "
        f"or the range of {config.dtype} is too small: load the model with dtype='float32'"
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


def pose_key(seed: int | jax.Array) -> jax.Array:
    """The random key of the pose head. The key of token n is ``fold_in(key(seed), n)``, and no answer has 0xFFFFFFFF tokens."""
    return jax.random.fold_in(jax.random.key(seed), 0xFFFFFFFF)


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
        if given and ids[-1] == config.image_token_id:
            raise UserError(f"prompt {row} ends with an image: an answer begins after a token of text")


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

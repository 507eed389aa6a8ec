"""Does a pretrained base answer indirect questions whose words were never trained on? The study of docs/claim.md, and its table.

    JAX_PLATFORMS=cpu python bench/claim.py MODEL --out out/claim      # MODEL: a folder of chatpose convert; runs what is missing
    JAX_PLATFORMS=cpu python bench/claim.py --out out/claim --table    # the table of what there is, and what is missing

Every run is one file of --out, written when it is complete. A run that is killed goes on from its last checkpoint when the same command is
given again; several processes may share --out, each takes other runs. ``--only ARM FOLD SEED`` makes one run. Files
``.json`` of an older version do not count: they are made again.

The design stands in docs/claim.md, and was committed before the first run. A row is a question; the model reads it in its own chat template, and
the pose head reads the final state of its last token, which is the one that would predict the answer's <POSE>. No words are answered, so there
is no loss of words, and no LM head runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chatpose_jax.data.synthetic import skeleton
from chatpose_jax.data.synthetic.dataset import SyntheticDataset, to_camera
from chatpose_jax.data.synthetic.families import COLUMN, POSTURES, PoseSet, sample_poses
from chatpose_jax.data.synthetic.situations import QUESTIONS, SITUATIONS, Situation, shared_words, stems
from chatpose_jax.evaluation.scores import bootstrap
from chatpose_jax.locks import Locked, only_writer
from chatpose_jax.models.attention import attention
from chatpose_jax.models.chatpose import attend_evenly, bind, init_params, unstack_layers
from chatpose_jax.models.config import HeadConfig, LoRAConfig, ModelConfig
from chatpose_jax.models.decoder import init_cache
from chatpose_jax.models.heads import create_head
from chatpose_jax.models.heads.base import States
from chatpose_jax.train.allocator import keep_freed_memory
from chatpose_jax.train.trainable import Flat, flatten, unflatten
from smpl_jax import metrics

STEPS, WARMUP = 2500, 100
SITUATION_ROWS, CAPTION_ROWS = 3, 3
"""Rows of a step."""
CAPTIONS = {"train": 2000, "test": 128}
MOST_WORDS = 22
"""Captions are short, because a step costs what its longest row costs."""
SEEDS, FOLDS = 3, 2
DTYPE = "bfloat16"
"""What a base that trains is computed in. Its trained parameters, frozen bases and heads are float32."""
CHECKPOINT_SECONDS = 300
TARGETS = 16
"""Poses that are drawn for each way to order a situation's arms, and for each posture."""
LORA = LoRAConfig(16, 32.0, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


class Arm(NamedTuple):
    """base: "pretrained", or "random": the same architecture, drawn by the seed. trains: "adapters", "everything", or "" for the head alone on frozen
    states. states: which states of a frozen base its head reads, see ``frozen_states``. rate: AdamW's.
    """

    base: str
    trains: str
    states: str = "answer"
    rate: float = 1e-3


ARMS: dict[str, Arm] = {
    "frozen": Arm("pretrained", ""),
    "frozen-layers": Arm("pretrained", "", "layers"),
    "frozen-random": Arm("random", "", "layers"),
    "pretrained": Arm("pretrained", "adapters", rate=5e-4),
    "random": Arm("random", "everything", rate=3e-4),
}


@functools.cache
def stems_of(situation: Situation) -> frozenset[str]:
    return stems(situation.words)


def part_of() -> list[int]:
    """The fold that holds each situation out. Situations that share a word are in one fold. Postures are dealt evenly."""
    groups: list[list[int]] = []
    for number, situation in enumerate(SITUATIONS):
        near = [g for g in groups if any(shared_words(stems_of(situation), stems_of(SITUATIONS[i])) for i in g)]
        groups = [g for g in groups if g not in near] + [[number, *(i for g in near for i in g)]]
    counts = np.zeros((FOLDS, len(POSTURES)), int)
    fold = [0] * len(SITUATIONS)
    for group in sorted(groups, key=lambda g: (-len(g), min(g))):
        postures = np.bincount([list(POSTURES).index(SITUATIONS[i].posture) for i in group], minlength=len(POSTURES))
        chosen = min(
            range(FOLDS), key=lambda f: (int(((counts[f] + postures) ** 2 - counts[f] ** 2).sum()), counts[f].sum(), f)
        )
        counts[chosen] += postures
        for i in group:
            fold[i] = chosen
    return fold


@functools.cache
def captions(split: Any) -> tuple[list[str], np.ndarray]:
    """Short captions of the generated set, and their poses (N, 24, 3, 3) in the camera frame."""
    rows = SyntheticDataset(split, 2 * CAPTIONS[split], tasks={"text_short": 1})[:]
    short = [row for row in rows if len(row.extras["caption"].split()) <= MOST_WORDS][: CAPTIONS[split]]
    poses = np.stack([np.asarray(row.poses.rotations[0]) for row in short]).astype(np.float32)
    return [row.extras["caption"] for row in short], poses


@functools.cache
def direct() -> frozenset[int]:
    """Situations that share a word with a caption or with what stands around a question. They may be trained on, but test nothing."""
    known = stems(" ".join([*captions("train")[0], *QUESTIONS]))
    return frozenset(i for i, situation in enumerate(SITUATIONS) if shared_words(stems_of(situation), known))


class Fold(NamedTuple):
    """Numbers of situations."""

    trained: list[int]
    tested: list[int]


def fold_of(number: int) -> Fold:
    """Raises SystemExit if a word of a tested situation stands in a row that is trained on; this reads the rows themselves."""
    parts = part_of()
    trained = [i for i, part in enumerate(parts) if part != number]
    tested = [i for i, part in enumerate(parts) if part == number and i not in direct()]
    seen = stems(" ".join([*captions("train")[0], *(question(i, q) for i in trained for q in range(len(QUESTIONS)))]))
    for i in tested:
        if leaked := shared_words(stems_of(SITUATIONS[i]), seen):
            raise SystemExit(f"fold {number}: {SITUATIONS[i].words!r} is held out, but {sorted(leaked)} are trained on")
    return Fold(trained, tested)


def question(situation: int, wording: int) -> str:
    return QUESTIONS[wording].format(situation=SITUATIONS[situation].words)


def leads_left(poses: PoseSet) -> np.ndarray:
    """(N,) bool: the leg in front or raised is the left one, or the body lies on its left side."""
    roll = poses.angles[:, COLUMN["roll"]]
    legs = poses.angles[:, COLUMN["left_hip_flexion"]] - poses.angles[:, COLUMN["right_hip_flexion"]]
    return np.where(roll != 0, -roll, legs) > 0


def draw(posture: str, arms: tuple[str | None, str | None], seed: Sequence[int]) -> np.ndarray:
    """``TARGETS`` poses (N, 24, 3, 3) in the body frame whose lead leg is the left one."""
    poses = sample_poses(8 * TARGETS, seed, posture, arms)
    return poses.rotations[leads_left(poses)][:TARGETS]


@functools.cache
def targets(situation: int) -> np.ndarray:
    """(N, 24, 3, 3) poses that a situation is trained to, in the camera frame: its arms as the table orders them, the left leg in front. No question
    names a side, so a model must not be punished for either.
    """
    row = SITUATIONS[situation]
    return to_camera(draw(row.posture, row.arms, [17, situation]))


@functools.cache
def right_answers(situation: int) -> np.ndarray:
    """(N, 24, 3) joints of the poses that answer a situation: ``targets``, others with the arms exchanged, and the mirror images of both."""
    row = SITUATIONS[situation]
    exchanged = to_camera(draw(row.posture, row.arms[::-1], [18, situation]))
    return joints(_mirrored(np.concatenate([targets(situation), exchanged])))


@functools.cache
def bodies_of(posture: str) -> np.ndarray:
    """(N, 24, 3) joints of poses of a posture, with any arms."""
    poses = sample_poses(4 * TARGETS, [19, list(POSTURES).index(posture)], posture).rotations
    return joints(_mirrored(to_camera(poses)))


def _mirrored(poses: np.ndarray) -> np.ndarray:
    return np.concatenate([poses, skeleton.mirror(poses)])


def joints(rotations: np.ndarray) -> np.ndarray:
    """(N, 24, 3, 3) -> (N, 24, 3) metres, the pelvis at the origin; at β = 0."""
    return skeleton.forward_kinematics(np.asarray(rotations, float))[0].astype(np.float32)


# --- rows -----------------------------------------------------------------------------------------------------------------------------------


class Base(NamedTuple):
    """A pretrained model: its configuration, its parameters with unrolled layers, and what turns a question into ids."""

    config: ModelConfig
    params: Any
    encode: Callable[[str], Sequence[int]]


def load_base(folder: str) -> Base:
    import chatpose_jax

    model = chatpose_jax.load(folder, dtype="float32")
    return Base(
        model.config,
        model.params,
        lambda text: model.processor.encode([{"role": "user", "content": text}]).input_ids.tolist(),
    )


class Rows(NamedTuple):
    """Questions as ids of a vocabulary of their own: only tokens that occur in them.

    prefix: (P,) what all rows begin with; it is computed once a step. ids: (N, T), padded on the right. lengths: (N,). vocabulary: (V,) the base's
    ids. Rows 0 … are the situations' questions, ``len(QUESTIONS)`` each; then the captions' of "train" and of "test".
    """

    prefix: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    vocabulary: np.ndarray

    @property
    def name(self) -> str:
        """Rows with an equal name are equal."""
        return hashlib.blake2b(b"".join(part.astype(np.int32).tobytes() for part in self), digest_size=8).hexdigest()


SITUATION_TEXTS = len(SITUATIONS) * len(QUESTIONS)


def texts() -> list[str]:
    asked = [question(i, q) for i in range(len(SITUATIONS)) for q in range(len(QUESTIONS))]
    return [*asked, *captions("train")[0], *captions("test")[0]]


def encode_rows(encode: Callable[[str], Sequence[int]]) -> Rows:
    rows = [list(encode(text)) for text in texts()]
    shortest = min(map(len, rows))
    same = next((k for k in range(shortest) if len({row[k] for row in rows}) > 1), shortest - 1)
    vocabulary = np.unique([token for row in rows for token in row])
    rest = [row[same:] for row in rows]
    width = max(map(len, rest))
    ids = np.stack([np.searchsorted(vocabulary, row + [row[-1]] * (width - len(row))) for row in rest])
    prefix = np.searchsorted(vocabulary, rows[0][:same])
    return Rows(prefix.astype(np.int32), ids.astype(np.int32), np.array([len(row) for row in rest]), vocabulary)


class Batch(NamedTuple):
    rows: np.ndarray
    poses: np.ndarray


def batch_of(step: int, fold: int, seed: int) -> Batch:
    """The rows of a step and their target poses (B, 24, 3, 3): the same for every arm."""
    random = np.random.default_rng([20, fold, seed, step])
    asked = random.choice(fold_of_cached(fold).trained, SITUATION_ROWS)
    wordings = random.integers(len(QUESTIONS), size=SITUATION_ROWS)
    chosen = random.integers(TARGETS, size=SITUATION_ROWS)
    told = random.integers(CAPTIONS["train"], size=CAPTION_ROWS)
    poses = [targets(int(i))[k] for i, k in zip(asked, chosen)]
    rows = np.concatenate([asked * len(QUESTIONS) + wordings, SITUATION_TEXTS + told])
    return Batch(rows, np.concatenate([np.stack(poses), captions("train")[1][told]]))


fold_of_cached = functools.cache(fold_of)


# --- models ---------------------------------------------------------------------------------------------------------------------------------


def arm_config(base: ModelConfig, rows: Rows, arm: Arm) -> ModelConfig:
    """The base's configuration with the vocabulary of ``rows``; unrolled, float32 parameters where they train."""
    size = len(rows.vocabulary)
    text = dataclasses.replace(base.text, vocab_size=size + 1, base_vocab_size=size)
    return dataclasses.replace(
        base, vision=None, image_newline=False, text=text, lora=LORA if arm.trains == "adapters" else None, head=HeadConfig("mlp"),
        pose_token_id=size, image_token_id=-200, bos_token_id=0, eos_token_id=-1, pad_token_id=0, scan_layers=False,
        dtype=DTYPE if arm.trains else "float32", param_dtype=DTYPE if arm.trains == "adapters" else "float32",
    )  # fmt: skip


def start(base: ModelConfig, pretrained: Any, rows: Rows, arm: Arm, seed: int) -> tuple[ModelConfig, Flat, Flat]:
    """The configuration, what trains and what is frozen, by path.

    Random weights: queries near 0 (``attend_evenly``), and what a layer adds to the stream shrunk by the root of their number, as GPT-2 does it.
    A deep model learns faster so, and the control should be as good as it can be.
    """
    config = arm_config(base, rows, arm)
    drawn = init_params(config.replace(scan_layers=True), jax.random.key(seed))
    params = flatten(unstack_layers(attend_evenly(drawn)))
    for path in params:
        if path.endswith(("o_proj/kernel", "down_proj/kernel")):
            params[path] = params[path] / (2 * config.text.num_layers) ** 0.5
    if arm.base == "pretrained":
        given = flatten(pretrained)
        for path in params:
            if path == "decoder/embed_tokens/embedding":
                params[path] = jnp.asarray(given[path][rows.vocabulary], params[path].dtype)
            elif path.startswith("decoder/") and "lora" not in path and not path.endswith("/added"):
                params[path] = jnp.asarray(given[path], params[path].dtype)
    trains = {"": r"pose_head/.*", "adapters": r"pose_head/.*|.*/lora_[ab]", "everything": r"(?!.*(lm_head|/added)).*"}[
        arm.trains
    ]
    trainable = {path: leaf for path, leaf in params.items() if re.fullmatch(trains, path)}
    return config, trainable, {path: leaf for path, leaf in params.items() if path not in trainable}


def final_states(config: ModelConfig, params: Any, prefix: Any, ids: Any, lengths: Any) -> jax.Array:
    """(B, T, D) final states of rows without their prefix. The prefix is the same for all, so it is computed for one."""
    model = bind(config, params)
    count, width = ids.shape
    cache = model(prefix[None], cache=init_cache(config, 1, len(prefix) + width)).cache
    cache = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])) if x.ndim else x, cache)
    mask = jnp.arange(width) < lengths[:, None]
    return model(ids, attention_mask=mask, cache=cache).hidden


def read_poses(config: ModelConfig, head: Any, states: jax.Array) -> jax.Array:
    """(B, D) -> (B, 24, 3, 3)."""
    return head(States(states[:, None].astype(jnp.float32)), jax.random.key(0)).rotations[:, 0]


ANSWERED = 16
"""Questions that a trained model answers at a time."""


class Packed(NamedTuple):
    """Questions one after another behind one prefix: there is no padding but at the end.

    ids: (T,). positions: (T,), those of a question go on from the prefix. segments: (T,), 0 the prefix, 1 … the questions, -1 padding.
    last: (B,) where each question ends.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    last: np.ndarray


WIDTH = 16
"""Packed rows are padded to a multiple of this: each length is a program."""


def pack(rows: Rows, numbers: np.ndarray, length: int | None = None) -> Packed:
    """length: T; the next multiple of ``WIDTH`` unless told."""
    begin, counts = len(rows.prefix), rows.lengths[numbers]
    ends = begin + np.cumsum(counts)
    length = length or -(-int(ends[-1]) // WIDTH) * WIDTH
    ids, positions, segments = (
        np.zeros(length, np.int32),
        np.arange(length, dtype=np.int32),
        np.full(length, -1, np.int32),
    )
    ids[:begin], segments[:begin] = rows.prefix, 0
    for segment, (row, count, end) in enumerate(zip(numbers, counts, ends), 1):
        own = slice(end - count, end)
        ids[own], positions[own], segments[own] = rows.ids[row, :count], begin + np.arange(count), segment
    return Packed(ids, positions, segments, ends - 1)


def answers(config: ModelConfig, params: Any, packed: Packed) -> jax.Array:
    """(B, 24, 3, 3) poses. A token attends to the prefix and to its own question, as if the question stood alone."""
    model, segments = bind(config, params), packed.segments
    mask = jnp.tri(len(segments), dtype=bool) & ((segments == 0) | (segments == segments[:, None]))
    attend = functools.partial(attention, mask=mask[None])
    states, _ = model.decoder(model.embed(packed.ids[None], None), packed.positions[None], attend)
    return read_poses(config, model.pose_head, states[0][packed.last])


def distance(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """The project's loss: mean |ΔR| of the root, and of the other joints."""
    error = jnp.abs(predicted - target).mean(axis=(-2, -1))
    return error[:, 0].mean() + error[:, 1:].mean()


def optimiser(rate: float) -> optax.GradientTransformation:
    schedule = optax.join_schedules(
        [optax.linear_schedule(0, rate, WARMUP), optax.linear_schedule(rate, rate / 10, STEPS - WARMUP)], [WARMUP]
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


class Run(NamedTuple):
    arm: str
    fold: int
    seed: int

    def file(self, out: Path) -> Path:
        return out / f"{self.arm}-{self.fold}-{self.seed}.json.gz"


RUNS = [
    *(
        Run(arm, fold, seed)
        for arm, row in ARMS.items()
        if not row.trains
        for seed in range(SEEDS)
        for fold in range(FOLDS)
    ),
    *(
        Run(arm, fold, seed)
        for seed in range(SEEDS)
        for fold in range(FOLDS)
        for arm, row in ARMS.items()
        if row.trains
    ),
]
"""In the order in which they are made."""


def train(run: Run, base: Base, rows: Rows, out: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Trains from the last checkpoint on. Returns a function from rows to poses (N, 24, 3, 3)."""
    arm = ARMS[run.arm]
    config, trainable, frozen = start(base.config, base.params, rows, arm, run.seed)
    tx = optimiser(arm.rate)

    def objective(trainable: Flat, frozen: Flat, packed: Packed, poses: Any) -> jax.Array:
        return distance(answers(config, unflatten_layers({**trainable, **frozen}), packed), poses)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(trainable: Flat, moments: Any, frozen: Flat, packed: Packed, poses: Any) -> Any:
        loss, slopes = jax.value_and_grad(objective)(trainable, frozen, packed, poses)
        changes, moments = tx.update(slopes, moments, trainable)
        return optax.apply_updates(trainable, changes), moments, loss

    held = (trainable, tx.init(trainable))
    saved = out / "checkpoints" / f"{run.arm}-{run.fold}-{run.seed}.npz"
    first, held = _restore(saved, held, rows.name)
    written, losses = time.monotonic(), list[float]()
    for step in range(first, STEPS):
        batch = batch_of(step, run.fold, run.seed)
        *held, loss = update(*held, frozen, pack(rows, batch.rows), batch.poses)
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            raise SystemExit(f"{run}: the loss of step {step} is {loss}")
        if step % 50 == 49:
            print(
                f"{run.arm} fold {run.fold} seed {run.seed}: step {step + 1}, loss {np.mean(losses[-50:]):.4f}",
                flush=True,
            )
        if time.monotonic() - written > CHECKPOINT_SECONDS:
            _save(saved, step + 1, held, rows.name)
            written = time.monotonic()
    _save(saved, STEPS, held, rows.name)
    answer = jax.jit(lambda params, packed: answers(config, unflatten_layers(params), packed))
    params, most = {**held[0], **frozen}, len(rows.prefix) + ANSWERED * rows.ids.shape[1]
    return lambda numbers: _in_batches(lambda part: answer(params, pack(rows, part, most)), numbers)


def train_head(run: Run, base: Base, rows: Rows, out: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The head alone, on states that are computed once and kept."""
    arm = ARMS[run.arm]
    states = frozen_states(run, base, rows, out)
    known = np.unique(np.concatenate([batch_of(step, run.fold, run.seed).rows for step in range(STEPS)]))
    states = (states - states[known].mean(0)) / (states[known].std(0) + 1e-6)
    config = HeadConfig("mlp")
    from flax import nnx

    head = create_head(config, states.shape[1], rngs=nnx.Rngs(run.seed))
    graph, params = nnx.split(head)
    tx = optimiser(arm.rate)

    @jax.jit
    def update(params: Any, moments: Any, given: Any, poses: Any) -> Any:
        def objective(params: Any) -> jax.Array:
            return distance(read_poses(base.config, nnx.merge(graph, params), given), poses)

        loss, slopes = jax.value_and_grad(objective)(params)
        changes, moments = tx.update(slopes, moments, params)
        return optax.apply_updates(params, changes), moments, loss

    moments = tx.init(params)
    for step in range(STEPS):
        batch = batch_of(step, run.fold, run.seed)
        params, moments, _ = update(params, moments, states[batch.rows], batch.poses)
    answer = jax.jit(lambda given: read_poses(base.config, nnx.merge(graph, params), given))
    return lambda numbers: _in_batches(lambda part: answer(states[part]), numbers)


def frozen_states(run: Run, base: Base, rows: Rows, out: Path) -> np.ndarray:
    """(N, …) float32 states of all rows, computed once and kept in ``out``.

    "answer": the state that ChatPose's head reads, (N, D). "layers": beside it, of the layer in the middle, the same token's state and the mean over
    the question's tokens, (N, 3 D). A state of a layer has gone through the final norm.
    """
    arm = ARMS[run.arm]
    saved = out / "states" / (f"{arm.base}.npz" if arm.base == "pretrained" else f"{arm.base}-{run.seed}.npz")
    if not saved.is_file():
        config, trainable, frozen = start(base.config, base.params, rows, arm, run.seed)
        params, parts = unflatten_layers({**trainable, **frozen}), []
        for layers in (config.text.num_layers, config.text.num_layers // 2):
            shallow = config.replace(text=dataclasses.replace(config.text, num_layers=layers))
            decoder = {**params["decoder"], "layers": {i: params["decoder"]["layers"][i] for i in range(layers)}}
            parts.append(_states_of(shallow, {**params, "decoder": decoder}, rows))
        (last, _), (middle, mean) = parts
        _write(saved, lambda path: np.savez(path, states=np.concatenate([last, middle, mean], 1), rows=rows.name))
    with np.load(saved) as found:
        if str(found["rows"]) != rows.name:
            raise SystemExit(f"{saved} is of other rows: choose another --out")
        states = found["states"]
    return states if arm.states == "layers" else states[:, : states.shape[1] // 3]


def _states_of(config: ModelConfig, params: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) twice: the last token's, and the mean over all."""

    @jax.jit
    def run(params: Any, ids: Any, lengths: Any) -> Any:
        states = final_states(config, params, jnp.asarray(rows.prefix), ids, lengths)
        counted = (jnp.arange(ids.shape[1]) < lengths[:, None])[..., None]
        last = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return jnp.concatenate([last, jnp.where(counted, states, 0).sum(1) / lengths[:, None]], 1)

    found = _in_batches(lambda part: run(params, rows.ids[part], rows.lengths[part]), np.arange(len(rows.ids)), 32)
    return tuple(np.split(found, 2, axis=1))  # type: ignore[return-value]


def unflatten_layers(flat: Mapping[str, Any]) -> Any:
    """A nested dict; layers have integer keys."""
    tree = unflatten(flat)
    layers = {int(key): value for key, value in tree["decoder"]["layers"].items()}
    return {**tree, "decoder": {**tree["decoder"], "layers": layers}}


def _in_batches(run: Callable[[np.ndarray], Any], numbers: np.ndarray, size: int = ANSWERED) -> np.ndarray:
    out = []
    for begin in range(0, len(numbers), size):
        part = numbers[begin : begin + size]
        out.append(np.asarray(run(np.resize(part, size)))[: len(part)])
    return np.concatenate(out)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """A file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{os.getpid()}-{path.name}")
    write(new)
    os.replace(new, path)


def _save(path: Path, step: int, held: Any, rows: str) -> None:
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(held))}
    _write(path, lambda new: np.savez(new, step=step, rows=rows, **leaves))


def _restore(path: Path, held: Any, rows: str) -> tuple[int, Any]:
    if not path.is_file():
        return 0, held
    with np.load(path) as found:
        if str(found["rows"]) != rows:
            raise SystemExit(f"{path} is a checkpoint of other rows: choose another --out")
        leaves, tree = jax.tree.flatten(held)
        return int(found["step"]), tree.unflatten([jnp.asarray(found[str(i)]) for i in range(len(leaves))])


def make(run: Run, base: Base, rows: Rows, out: Path) -> None:
    """One run: trains, answers, writes its file."""
    began = time.process_time()
    answer = (train if ARMS[run.arm].trains else train_head)(run, base, rows, out)
    fold = fold_of(run.fold)
    asked = np.concatenate([np.arange(len(QUESTIONS)) + i * len(QUESTIONS) for i in fold.tested])
    learned = np.concatenate([np.arange(len(QUESTIONS)) + i * len(QUESTIONS) for i in fold.trained])
    told = len(rows.ids) - CAPTIONS["test"] + np.arange(CAPTIONS["test"])
    found = {
        "run": run._asdict(),
        "settings": {
            "steps": STEPS,
            "rows": rows.name,
            "batch": [SITUATION_ROWS, CAPTION_ROWS],
            "rate": ARMS[run.arm].rate,
            "dtype": DTYPE if ARMS[run.arm].trains else "float32",
        },
        "cpu_seconds": round(time.process_time() - began),
        "questions": [[int(i), q] for i in fold.tested for q in range(len(QUESTIONS))],
        "joints_mm": _millimetres(answer(asked)),
        "trained_questions_mm": _millimetres(answer(learned)),
        "captions_mm": _millimetres(answer(told)),
    }
    _write(run.file(out), lambda path: path.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0)))
    (out / "checkpoints" / f"{run.arm}-{run.fold}-{run.seed}.npz").unlink(missing_ok=True)


def _millimetres(rotations: np.ndarray) -> list[Any]:
    return np.rint(1000 * joints(rotations)).astype(int).tolist()  # type: ignore[no-any-return]


# --- the table ------------------------------------------------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[Any, Any], jax.Array]] = {"PA": metrics.pa_mpjpe, "MPJPE": metrics.mpjpe}


def errors(predicted: np.ndarray, sets: Sequence[np.ndarray], measure: str) -> list[np.ndarray]:
    """Millimetres (N, K) between N predicted and K right joints, for each set."""
    run = _errors(measure)
    return [np.asarray(run(predicted.astype(np.float32), answers)) for answers in sets]


@functools.cache
def _errors(measure: str) -> Callable[[Any, Any], jax.Array]:
    one = MEASURES[measure]

    def pairs(predicted: jax.Array, right: jax.Array) -> jax.Array:
        shape = (len(predicted), len(right), 24, 3)
        return one(jnp.broadcast_to(predicted[:, None], shape), jnp.broadcast_to(right[None], shape))

    return jax.jit(pairs)


def scores(predicted: np.ndarray, asked: Sequence[int]) -> dict[str, np.ndarray]:
    """Numbers of each answer. predicted: (N, 24, 3) metres. asked: (N,) situations.

    "PA", "MPJPE": to the nearest pose of the situation's set. "PA, all": to the mean of the set. "PA, others": the mean of the errors to the nearest
    pose of each tested situation of another posture. "rank": of the right posture among all, by the MPJPE to the nearest of its bodies, 1 is best.
    """
    asked, every = np.asarray(asked), sorted(set(asked))
    own, out = np.array([every.index(i) for i in asked]), dict[str, np.ndarray]()
    alike = np.array([[SITUATIONS[i].posture == SITUATIONS[j].posture for j in every] for i in asked])
    for measure in MEASURES:
        found = errors(predicted, [right_answers(int(i)) for i in every], measure)
        nearest = np.stack([each.min(1) for each in found], 1)
        means = np.stack([each.mean(1) for each in found], 1)
        out[measure] = nearest[np.arange(len(asked)), own]
        out[f"{measure}, all"] = means[np.arange(len(asked)), own]
        out[f"{measure}, others"] = np.where(alike, 0, nearest).sum(1) / (~alike).sum(1)
    found = errors(predicted, [bodies_of(name) for name in POSTURES], "MPJPE")
    near = np.stack([each.min(1) for each in found], 1)
    right = np.array([list(POSTURES).index(SITUATIONS[i].posture) for i in asked])
    mine = near[np.arange(len(asked)), right][:, None]
    out["rank"] = 1 + (near < mine).sum(1)
    out["first"] = 100.0 * (out["rank"] == 1)
    return out


def mean_pose(fold: int) -> np.ndarray:
    """(24, 3) joints of the constant answer: for each joint the rotation nearest to the mean of the trained situations' poses."""
    mean = np.concatenate([targets(i) for i in fold_of_cached(fold).trained]).astype(float).mean(0)
    u, _, vt = np.linalg.svd(mean)
    u[..., -1] *= np.linalg.det(u @ vt)[..., None]
    return joints((u @ vt)[None])[0]


WHOLE = ("captions", "trained")
"""Measures of a whole run: PA of held-out captions, and of the questions that were trained on, in parts of the mean pose's."""
Table = dict[tuple[str, int, int], dict[str, np.ndarray]]
"""By (arm, fold, seed): measures, each the means over the wordings of (S,) situations; "situation" are their numbers."""


def read(out: Path) -> Table:
    """The runs that are complete. Raises SystemExit if they do not belong together."""
    found, settings = Table(), dict[str, Any]()
    for run in RUNS:
        if not run.file(out).is_file():
            continue
        data = json.loads(gzip.decompress(run.file(out).read_bytes()))
        same = {key: value for key, value in data["settings"].items() if key not in ("rate", "dtype")}
        if settings and same != settings:
            raise SystemExit(f"{run.file(out)}: made with {same}, others with {settings}; choose another --out")
        settings = same
        asked = [i for i, _ in data["questions"]]
        numbers = scores(np.array(data["joints_mm"]) / 1000, asked)
        told, right = np.array(data["captions_mm"]) / 1000, joints(captions("test")[1])
        every = sorted(set(asked))
        rows = {
            name: np.array([values[np.array(asked) == i].mean() for i in every]) for name, values in numbers.items()
        }
        constant = np.broadcast_to(mean_pose(run.fold), right.shape)
        rows["captions"] = np.array([metrics.pa_mpjpe(told, right).mean() / metrics.pa_mpjpe(constant, right).mean()])
        rows["trained"] = np.array([_fit(run.fold, np.array(data["trained_questions_mm"]) / 1000)])
        found[run] = {**rows, "situation": np.array(every)}
    return found


def _fit(fold: int, predicted: np.ndarray) -> float:
    """The error of the questions that were trained on, in parts of the mean pose's."""
    trained = fold_of_cached(fold).trained
    own = [
        errors(part, [right_answers(i)], "PA")[0].min(1) for i, part in zip(trained, np.split(predicted, len(trained)))
    ]
    flat = [errors(mean_pose(fold)[None], [right_answers(i)], "PA")[0].min(1) for i in trained]
    return float(np.mean(own) / np.mean(flat))


def constant(folds: Sequence[int]) -> Table:
    """The mean pose as an arm."""
    out = Table()
    for fold in folds:
        tested = fold_of_cached(fold).tested
        rows = scores(np.stack([mean_pose(fold)] * len(tested)), tested)
        out["mean pose", fold, 0] = {**rows, "situation": np.array(tested), **{name: np.ones(1) for name in WHOLE}}
    return out


def by_situation(table: Table, arm: str, runs: set[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Means over the seeds, for each situation that ``runs`` test: (S,) for each measure."""
    chosen = [
        table[key]
        for key in table
        if key[0] == arm and (arm == "mean pose" or key[1:] in runs) and key[1] in {f for f, _ in runs}
    ]
    every = sorted({int(i) for rows in chosen for i in rows["situation"]})
    names = [name for name in chosen[0] if name not in ("situation", *WHOLE)]
    return {
        name: np.array(
            [np.mean([rows[name][rows["situation"] == i] for rows in chosen if i in rows["situation"]]) for i in every]
        )
        for name in names
    } | {"situation": np.array(every), **{name: np.mean([rows[name] for rows in chosen], axis=0) for name in WHOLE}}


def balanced(situations: np.ndarray) -> np.ndarray:
    """(S,) weights with which every posture counts the same: standing has many situations, and whoever always stands would be right in them."""
    postures = [SITUATIONS[int(i)].posture for i in situations]
    return np.array([1 / postures.count(posture) for posture in postures])


def ratio(over: np.ndarray, under: np.ndarray, less: np.ndarray | None = None, digits: int = 2) -> str:
    """Σ over / Σ under with its 95 % interval by a bootstrap of situations; ``less``: of Σ (over − less) / Σ under."""
    rows = np.stack([over if less is None else over - less, under], 1)
    low, high = bootstrap(rows, [""] * len(rows), lambda sums: sums[..., 0] / sums[..., 1])
    sign = "+" if less is not None else ""
    return f"{rows[:, 0].sum() / rows[:, 1].sum():{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


COLUMNS = (
    "trained questions, PA", "held-out captions, PA", "PA, nearest", "PA, mean of the set", "MPJPE, nearest", "own / others, PA",
    "own / others, MPJPE", "right posture first, %", "its mean rank of 15",
)  # fmt: skip


def report(out: Path) -> Iterator[str]:
    """Markdown: a row an arm, the comparisons that were planned, and what is missing."""
    table = read(out)
    missing = [run for run in RUNS if run not in table]
    if not table:
        yield "No run is complete."
        return
    table |= constant(sorted({key[1] for key in table}))
    ones = {arm: {key[1:] for key in table if key[0] == arm} for arm in ARMS}
    yield f"| {' | '.join(('arm', 'runs', *COLUMNS))} |"
    yield "|---|" + "---|" * (1 + len(COLUMNS))
    everywhere = set().union(*ones.values())
    for arm in ("mean pose", *ARMS):
        runs = everywhere if arm == "mean pose" else ones[arm]
        if not runs:
            continue
        rows, flat = by_situation(table, arm, runs), by_situation(table, "mean pose", runs)
        equal = balanced(rows["situation"])
        cells = [
            arm,
            "" if arm == "mean pose" else f"{len(runs)} of {SEEDS * FOLDS}, {len(equal)} situations",
            *(f"{rows[name][0]:.2f}" for name in ("trained", "captions")),
            ratio(rows["PA"], flat["PA"]),
            ratio(rows["PA, all"], flat["PA, all"]),
            ratio(rows["MPJPE"], flat["MPJPE"]),
            ratio(rows["PA"], rows["PA, others"]),
            ratio(rows["MPJPE"], rows["MPJPE, others"]),
            ratio(rows["first"] * equal, equal, digits=0),
            ratio(rows["rank"] * equal, equal, digits=1),
        ]
        yield f"| {' | '.join(cells)} |"
    yield "\nDifferences, in parts of the mean pose's error; below 0 the first is better:\n"
    yield "| | runs of both | PA, nearest | MPJPE, nearest | right posture first, points |"
    yield "|---|---|---|---|---|"
    pairs = [("pretrained", other) for other in (*ARMS, "mean pose") if other != "pretrained"] + [
        ("random", "mean pose")
    ]
    for one_arm, other in pairs:
        runs = ones[one_arm] & ones.get(other, ones[one_arm])
        if not runs:
            continue
        a, b, flat = (by_situation(table, arm, runs) for arm in (one_arm, other, "mean pose"))
        cells = [
            f"{one_arm} less {other}", str(len(runs)), ratio(a["PA"], flat["PA"], b["PA"]), ratio(a["MPJPE"], flat["MPJPE"], b["MPJPE"]),
            ratio(a["first"] * (equal := balanced(a["situation"])), equal, b["first"] * equal, digits=0),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield "\nPA, nearest, of each run (fold/seed), in parts of the mean pose's:\n"
    for arm in ARMS:
        each = [
            f"{fold}/{seed} {table[arm, fold, seed]['PA'].sum() / table['mean pose', fold, 0]['PA'].sum():.2f}"
            for fold, seed in sorted(ones[arm])
        ]
        if each:
            yield f"- {arm}: {', '.join(each)}"
    done = len(RUNS) - len(missing)
    yield f"\n{done} of {len(RUNS)} runs are complete" + (": all." if not missing else "; missing: " + ", ".join(
        f"{run.arm} fold {run.fold} seed {run.seed}" for run in missing) + ".")  # fmt: skip


def folds_in_words() -> Iterator[str]:
    parts = part_of()
    for fold in range(FOLDS):
        tested = fold_of(fold).tested
        yield f"fold {fold} tests {len(tested)}: " + "; ".join(
            f"{SITUATIONS[i].words} ({SITUATIONS[i].posture})" for i in tested
        )
    rest = [f"{SITUATIONS[i].words} ({SITUATIONS[i].posture}, held out with fold {parts[i]})" for i in sorted(direct())]
    yield f"never tested, because a caption or a question shares a word with them, {len(rest)}: " + "; ".join(rest)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model folder of a pretrained base")
    parser.add_argument("--out", type=Path, default=Path("out/claim"))
    parser.add_argument("--only", nargs=3, metavar=("ARM", "FOLD", "SEED"), help="one run")
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and run nothing")
    parser.add_argument("--folds", action="store_true", help="print which situations each fold tests")
    args = parser.parse_args(argv)
    if args.folds:
        print("\n".join(folds_in_words()))
        return
    if args.table:
        print("\n".join(report(args.out)))
        return
    if args.model is None:
        parser.error("name the model folder of a pretrained base, or give --table")
    keep_freed_memory()
    wanted = [Run(args.only[0], int(args.only[1]), int(args.only[2]))] if args.only else RUNS
    if unknown := [run for run in wanted if run not in RUNS]:
        parser.error(f"no run {' '.join(map(str, unknown[0]))}; the arms are {', '.join(ARMS)}")
    base = load_base(args.model)
    rows = encode_rows(base.encode)
    for run in wanted:
        if run.file(args.out).is_file():
            continue
        try:
            with only_writer(run.file(args.out), args.out / f".{run.arm}-{run.fold}-{run.seed}.lock"):
                make(run, base, rows, args.out)
        except Locked:
            print(f"{run}: another process is at it", flush=True)
    print("\n".join(report(args.out)))


if __name__ == "__main__":
    main()

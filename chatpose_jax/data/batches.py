"""Rows to arrays: encode an ``Example``, pad rows to one shape, and a loader whose every batch is a pure function of
its step.

The order of an epoch is planned from the seed alone, so the position of a loader is one number, resuming is exact, and
each process of a multi-host run can build its own slice of the same global batch.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import IGNORE, Processor

Batch = dict[str, np.ndarray]


def encode_example(
    processor: Processor, example: Example, max_length: int, *, normalise: bool = True
) -> dict[str, Any]:
    """One row, not yet padded.

    Returns ``input_ids`` (T,) and ``labels`` (T,) int32 with T <= max_length, ``images``: list of (S, S, 3) float32
    (uint8 where ``normalise`` is False), ``pose_positions`` (P,) int32, ``pose_targets`` (P, 24, 3, 3) float32.
    Pictures and poses behind the cut are dropped.
    Raises UserError that names the example, where it is malformed or its answers hold another number of ``<POSE>``
    than it has poses.
    """
    poses = _poses(example)
    try:
        encoded = processor.encode(
            example.messages, add_generation_prompt=False, max_length=max_length, normalise=normalise
        )
    except UserError as error:
        raise UserError(f"example {example.id!r}: {error}") from None
    found = len(encoded.pose_positions)
    if found > len(poses) or (found < len(poses) and not encoded.truncated):
        raise UserError(
            f"example {example.id!r}: its answers hold {found} <POSE>, but it has {len(poses)} poses; "
            "there must be one for each"
        )
    return {
        "input_ids": encoded.input_ids,
        "labels": encoded.labels,
        "images": encoded.images,
        "pose_positions": encoded.pose_positions,
        "pose_targets": poses[:found],
    }


def collate(rows: Sequence[Mapping[str, Any]], length: int, *, max_images: int, max_poses: int, pad_id: int) -> Batch:
    """Pad rows of ``encode_example`` on the right to one shape.

    Returns ``input_ids`` (B, T) int32, ``attention_mask`` (B, T) bool, ``labels`` (B, T) int32 (-100: no loss; not
    shifted), ``pixel_values`` (B, I, S, S, 3) float32 (absent where no row has a picture; a row with fewer than I has
    zeros behind), ``pose_index`` (B, P) int32, the position p - 1 of the hidden state that predicts the pose token at
    p (0 where unused), ``pose_targets`` (B, P, 24, 3, 3) float32 (identity where unused), ``pose_mask`` (B, P) bool.
    """
    for row in rows:
        for name, size, limit in (
            ("tokens", len(row["input_ids"]), length),
            ("pictures", len(row["images"]), max_images),
            ("poses", len(row["pose_positions"]), max_poses),
        ):
            if size > limit:
                raise UserError(f"a row has {size} {name}, more than the {limit} that the batch has room for")
    count = len(rows)
    batch: Batch = {
        "input_ids": np.full((count, length), pad_id, np.int32),
        "attention_mask": np.zeros((count, length), bool),
        "labels": np.full((count, length), IGNORE, np.int32),
        "pose_index": np.zeros((count, max_poses), np.int32),
        "pose_targets": np.broadcast_to(np.eye(3, dtype=np.float32), (count, max_poses, 24, 3, 3)).copy(),
        "pose_mask": np.zeros((count, max_poses), bool),
    }
    shape = next((image.shape for row in rows for image in row["images"]), None)
    if shape is not None:
        batch["pixel_values"] = np.zeros((count, max_images, *shape), np.float32)
    for i, row in enumerate(rows):
        tokens, poses = len(row["input_ids"]), len(row["pose_positions"])
        batch["input_ids"][i, :tokens] = row["input_ids"]
        batch["attention_mask"][i, :tokens] = True
        batch["labels"][i, :tokens] = row["labels"]
        batch["pose_index"][i, :poses] = row["pose_positions"] - 1
        batch["pose_targets"][i, :poses] = row["pose_targets"]
        batch["pose_mask"][i, :poses] = True
        for j, image in enumerate(row["images"]):
            batch["pixel_values"][i, j] = image
    return batch


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the rows of one batch share, hence what ``jit`` compiles for: padded length, and pictures in a row (0 or
    the data set's most).
    """

    length: int
    images: int


class BatchLoader:
    """Batches of fixed shapes from a sequence of examples; an iterator over ``len(self)`` batches of each epoch.

    Rows are shuffled by ``seed`` and epoch, and grouped so that a batch holds only rows with pictures or only rows
    without, of like length. What is left of a group at the end of an epoch is filled up with copies that weigh nothing
    (no label, no pose), so every row counts exactly once an epoch.

    dataset: any sequence of ``Example``; ``dataset[i]`` must always give the same row.
    batch_size: rows of a global batch; ``shard=(index, count)`` gives the rows ``index::count`` of it, for one of
        ``count`` processes.
    epochs: how many to run; None never ends.
    lengths: padded lengths to choose from; by default the ``buckets`` lengths for each kind that leave the least
        padding.
    cache: keep encoded rows, pictures as uint8, so that each is encoded once. For data sets that fit into memory.
    prefetch: batches that one thread prepares ahead; 0 prepares them when asked for.
    """

    def __init__(
        self,
        dataset: Sequence[Example],
        processor: Processor,
        batch_size: int,
        *,
        max_length: int = 1024,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        lengths: Sequence[int] | None = None,
        buckets: int = 2,
        cache: bool = False,
        prefetch: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if not len(dataset):
            raise UserError("the data set is empty; expected at least one example")
        if batch_size < 1 or batch_size % shard[1]:
            raise UserError(f"batch_size={batch_size} must be positive and divide evenly among {shard[1]} processes")
        self.dataset, self.processor, self.batch_size = dataset, processor, batch_size
        self.max_length = min(max_length, processor.ids.context)
        self.seed, self.shuffle, self.epochs, self.shard = seed, shuffle, epochs, shard
        self._cache: dict[int, dict[str, Any]] | None = {} if cache else None
        self._prefetch = prefetch
        self._step = 0
        self._plans: tuple[int, list[tuple[Shape, np.ndarray]]] | None = None
        self._measure(lengths, buckets)

    def __len__(self) -> int:
        """Batches in one epoch."""
        return sum(-(-len(rows) // self.batch_size) for rows in self._groups.values())

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Every shape that a batch can take: what a training step will be compiled for."""
        return tuple(self._groups)

    def batch(self, step: int) -> Batch:
        """The batch of a step counted from the very first: a pure function of the loader's arguments and ``step``."""
        epoch, index = divmod(step, len(self))
        shape, rows = self._plan(epoch)[index]
        encoded = [
            self._row(int(row)) if row >= 0 else _weightless(self._row(int(~row)))
            for row in rows[self.shard[0] :: self.shard[1]]
        ]
        return collate(
            encoded,
            shape.length,
            max_images=shape.images,
            max_poses=self.max_poses,
            pad_id=self.processor.ids.pad_token_id,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present state on; ``state`` counts those that were handed out."""
        if self._prefetch < 1:
            while not self._finished(self._step):
                self._step += 1
                yield self.batch(self._step - 1)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead: collections.deque[Future[Batch]] = collections.deque()
            step = self._step
            while True:
                while len(ahead) <= self._prefetch and not self._finished(step):
                    ahead.append(pool.submit(self.batch, step))
                    step += 1
                if not ahead:
                    return
                self._step += 1
                yield ahead.popleft().result()

    def state(self) -> dict[str, int]:
        """Where the loader stands, as JSON; after ``restore`` a loader made alike goes on with the very next batch."""
        return {"step": self._step, "seed": self.seed, "batch_size": self.batch_size, "rows": len(self.dataset)}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go to a saved state. Raises UserError where it belongs to another data set, seed or batch size: its batches
        would be others.
        """
        for name, value in self.state().items():
            if name != "step" and state.get(name) != value:
                raise UserError(
                    f"the saved data position has {name}={state.get(name)!r}, this run has {value!r}; "
                    "resume with the same data settings"
                )
        self._step = int(state["step"])

    def _finished(self, step: int) -> bool:
        return self.epochs is not None and step >= self.epochs * len(self)

    def _measure(self, lengths: Sequence[int] | None, buckets: int) -> None:
        sizes = np.empty((len(self.dataset), 3), np.int64)  # tokens, pictures, poses
        for index in range(len(self.dataset)):
            if self._cache is not None:
                row = self._cache[index] = self._encode(index, normalise=False)
                sizes[index] = len(row["input_ids"]), len(row["images"]), len(row["pose_positions"])
            else:
                example = self.dataset[index]
                tokens, images = self.processor.count_tokens(example.messages)
                sizes[index] = min(tokens, self.max_length), images, len(example.poses)
        self.max_images, self.max_poses = int(sizes[:, 1].max()), max(1, int(sizes[:, 2].max()))
        self._groups: dict[Shape, np.ndarray] = {}
        for images in (0, self.max_images) if self.max_images else (0,):
            rows = np.flatnonzero((sizes[:, 1] > 0) == (images > 0))
            if not rows.size:
                continue
            chosen = sorted(lengths) if lengths is not None else fit_buckets(sizes[rows, 0], buckets, self.max_length)
            if chosen[-1] < sizes[rows, 0].max():
                raise UserError(
                    f"lengths={tuple(chosen)} hold no row of {sizes[rows, 0].max()} tokens; "
                    "add a longer one or lower max_length"
                )
            slots = np.searchsorted(chosen, sizes[rows, 0])
            for slot in np.unique(slots):
                self._groups[Shape(int(chosen[slot]), images)] = rows[slots == slot]

    def _plan(self, epoch: int) -> list[tuple[Shape, np.ndarray]]:
        """Batches of an epoch: shape and (batch_size,) rows; ``~row`` is a copy of ``row`` that weighs nothing."""
        if self._plans is None or self._plans[0] != epoch:
            random = np.random.default_rng((self.seed, epoch))
            plan = []
            for shape, rows in self._groups.items():
                order = random.permutation(rows) if self.shuffle else rows
                fill = np.resize(order, -len(order) % self.batch_size)
                plan += [(shape, chunk) for chunk in np.concatenate([order, ~fill]).reshape(-1, self.batch_size)]
            if self.shuffle:
                plan = [plan[i] for i in random.permutation(len(plan))]
            self._plans = epoch, plan
        return self._plans[1]

    def _row(self, index: int) -> dict[str, Any]:
        if self._cache is None:
            return self._encode(index, normalise=True)
        row = self._cache[index]
        return {**row, "images": [self.processor.images.normalise(image) for image in row["images"]]}

    def _encode(self, index: int, normalise: bool) -> dict[str, Any]:
        return encode_example(self.processor, self.dataset[index], self.max_length, normalise=normalise)


def fit_buckets(lengths: np.ndarray, count: int, limit: int, multiple: int = 16) -> list[int]:
    """At most ``count`` padded lengths, multiples of ``multiple`` up to ``limit``, that hold all ``lengths`` (N,) with
    the least padding in sum.
    """
    rounded = np.minimum(-(-np.asarray(lengths) // multiple) * multiple, limit)
    values, frequency = (column.tolist() for column in np.unique(rounded, return_counts=True))
    if len(values) > 128:  # the search below takes time by the square
        return fit_buckets(lengths, count, limit, 2 * multiple)
    below = np.cumsum(frequency).tolist()
    # best[j]: least padded total of the rows up to values[j], and the buckets that reach it, the last being values[j]
    best = [(value * rows, [value]) for value, rows in zip(values, below)]
    for _ in range(count - 1):
        best = [
            min(
                [
                    best[j],
                    *((best[i][0] + values[j] * (below[j] - below[i]), [*best[i][1], values[j]]) for i in range(j)),
                ]
            )
            for j in range(len(values))
        ]
    return best[-1][1]


def _weightless(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "labels": np.full_like(row["labels"], IGNORE),
        "pose_positions": row["pose_positions"][:0],
        "pose_targets": row["pose_targets"][:0],
    }


def _poses(example: Example) -> np.ndarray:
    poses = np.asarray(example.poses, np.float32)
    if poses.size == 0:
        return np.zeros((0, 24, 3, 3), np.float32)
    if poses.ndim != 4 or poses.shape[1:] != (24, 3, 3) or not np.isfinite(poses).all():
        raise UserError(
            f"example {example.id!r}: poses must be finite rotation matrices (P, 24, 3, 3), found shape {poses.shape}"
        )
    return poses

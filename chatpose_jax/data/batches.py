"""A loader of batches. Each batch is a pure function of its step.

An epoch is planned from the seed and its number. So the position of a loader is one number, a run resumes exactly in any number of processes,
and each process makes its rows of the same global batch. Batches are prepared ahead by one thread, or by Grain's threads or processes, which
read them by number.
"""

from __future__ import annotations

import collections
import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from chatpose_jax.data.collate import BETAS, Batch, collate, encode_example, pack, weightless
from chatpose_jax.data.example import Example
from chatpose_jax.data.sizes import measure
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import Processor
from chatpose_jax.settings import flag, whole
from smpl_jax.pose import Family, complete, unmeasured

TEXT_BESIDE_AN_IMAGE = 64
"""The least tokens, about, of a conversation with an image beside those of the image. It gives a packed row's room for images."""
TOKENS_BETWEEN_POSES = 64
"""The least tokens, about, for each pose. It gives a packed row's room for poses."""
ENDLESS = 1 << 40
ROW_BYTES = 2048
"""Bytes, about, of the Python objects of a row that is kept."""


def fit_packs(sizes: np.ndarray, limits: np.ndarray, open_packs: int = 64) -> list[list[int]]:
    """Packs rows by best fit, in their order: each goes into the pack where it leaves the fewest tokens free, among ``open_packs``.

    sizes: (N, K) tokens, images, poses of each row; none is larger than ``limits`` (K,).
    """
    done: list[list[int]] = []
    packs: list[list[int]] = []
    room = np.empty((0, sizes.shape[1]), np.int64)
    for row, size in enumerate(sizes):
        fits = np.flatnonzero((room >= size).all(axis=1))
        if fits.size:
            best = fits[np.argmin(room[fits, 0])]
        else:
            if len(packs) == open_packs:  # the fullest is the least likely to take another row
                full = int(np.argmin(room[:, 0]))
                done.append(packs.pop(full))
                room = np.delete(room, full, axis=0)
            best = len(packs)
            packs.append([])
            room = np.concatenate([room, limits[None]])
        packs[best].append(row)
        room[best] -= size
    return done + packs


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of a batch, for which ``jit`` compiles.

    length: padded tokens. images: room for images in each row, 0 or the most of any row.
    """

    length: int
    images: int


EpochPlan = list[tuple[BatchShape, list[list[int]]]]


class Drawn(Protocol):
    """A data set that chooses the rows of an epoch: ``data.mixture.Mixture``."""

    def epoch(self, number: int, seed: int) -> np.ndarray: ...


class BatchLoader:
    """Batches of few fixed shapes from a sequence of examples; an iterator over the batches of all epochs.

    Rows are shuffled by ``seed`` and epoch. A batch has only rows with images or only rows without, of similar length. The last batch of a
    group in an epoch is filled with copies that have no label and no pose, so each row counts once an epoch, or as often as a mixture
    (``Drawn``) says.

    dataset: any sequence of ``Example``; ``dataset[i]`` must always give the same row.
    batch_size: rows of a global batch.
    family: the body family of the poses, that of the pose head.
    rows: the rows of each batch that this process makes (``train.feed.local_rows``); None makes all.
    epochs: number of epochs; None never ends.
    lengths: padded lengths. By default they are the ``buckets`` lengths for each kind that pad least.
    packing: put several conversations into each row of ``max_length`` tokens (``pack``) instead of padding each.
    cache: encoded rows are kept, with images as uint8, up to so many bytes.
    sizes: of all rows, as ``data.sizes.measure`` gives them. Without, they are measured here; no image is opened.
    prefetch: batches to prepare ahead; 0 prepares each when it is asked for.
    threads: threads that prepare batches ahead; from 2 on they are Grain's. Images are decoded in parallel.
    workers: processes of Grain that prepare batches ahead, for rows made by Python code, which threads cannot make in parallel.
    """

    def __init__(
        self,
        dataset: Sequence[Example],
        processor: Processor,
        batch_size: int,
        *,
        max_length: int = 1024,
        family: Family = "smpl",
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        lengths: Sequence[int] | None = None,
        buckets: int = 2,
        packing: bool = False,
        cache: int = 0,
        sizes: np.ndarray | None = None,
        prefetch: int = 0,
        threads: int = 1,
        workers: int = 0,
        rows: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        if not len(dataset):
            raise UserError("the data set is empty; expected at least one example")
        batch_size, max_length = whole("batch_size", batch_size, 1), whole("max_length", max_length, 1)
        for name, value, least in (
            ("seed", seed, 0),
            ("buckets", buckets, 1),
            ("cache", cache, 0),
            ("prefetch", prefetch, 0),
            ("threads", threads, 1),
            ("workers", workers, 0),
        ):
            whole(name, value, least)
        for name, value in (("shuffle", shuffle), ("packing", packing)):
            flag(name, value)
        if epochs is not None:
            whole("epochs", epochs, 1)
        self.dataset, self.processor, self.batch_size = dataset, processor, batch_size
        self.max_length, self.family = min(max_length, processor.ids.context), family
        self.seed, self.shuffle, self.epochs, self.packing = seed, shuffle, epochs, packing
        self.rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        if self.rows.size and not 0 <= self.rows.min() <= self.rows.max() < batch_size:
            raise UserError(f"rows {self.rows.min()} to {self.rows.max()} of a batch of {batch_size}")
        self._cache: dict[int, dict[str, Any]] = {}
        self._prefetch, self._threads, self._workers = prefetch, threads, workers
        self._step = 0
        self._plans: dict[int, EpochPlan] = {}
        self._starts = {0: 0}  # epoch -> its first step, for epochs that are known
        self._sizes = measure(dataset, processor, self.max_length) if sizes is None else np.asarray(sizes, np.int64)
        # The first rows are kept. Every epoch has a new order, so the last used would serve no better.
        pose = complete(unmeasured((), family), BETAS)
        size = np.array([8, 3 * processor.images.size**2, sum(x.nbytes for x in jax.tree.leaves(pose))])
        self._cached = int(np.searchsorted(np.cumsum(self._sizes @ size + ROW_BYTES), cache, "right"))
        self._group(lengths, buckets)

    def __len__(self) -> int:
        """Batches in the first epoch."""
        return self._count(0)

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        """All shapes of batches, for which a training step is compiled."""
        return tuple(self._groups)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 in the first epoch: a pure function of the loader's arguments and ``step``."""
        epoch, index = self._locate(step)
        shape, packs = self._plan(epoch)[index]
        return collate(
            [self._packed(packs[row]) for row in self.rows],
            shape.length,
            max_images=shape.images,
            max_poses=self.max_poses,
            pad_id=self.processor.ids.pad_token_id,
            image_size=self.processor.images.size,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state on. ``state`` counts those that were given out."""
        ahead = self._inline() if self._prefetch < 1 else self._in_thread()
        if self._threads > 1 or self._workers:
            ahead = self._by_grain()
        for batch in ahead:
            self._step += 1
            yield batch

    def _inline(self) -> Iterator[Batch]:
        while not self._finished(self._step):
            yield self.batch(self._step)

    def _in_thread(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead: collections.deque[Future[Batch]] = collections.deque()
            step = self._step
            while True:
                while len(ahead) <= self._prefetch and not self._finished(step):
                    ahead.append(pool.submit(self.batch, step))
                    step += 1
                if not ahead:
                    return
                yield ahead.popleft().result()

    def _by_grain(self) -> Iterator[Batch]:
        import grain
        from absl import flags

        source = grain.MapDataset.source(_Steps(self, self._step))
        options = grain.ReadOptions(num_threads=max(self._threads, 1), prefetch_buffer_size=max(self._prefetch, 1))
        batches = source.to_iter_dataset(options)
        if self._workers:
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which this program does not parse
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(self._workers))
        return iter(batches)

    def state(self) -> dict[str, int]:
        """The position of the loader, for JSON. After ``restore`` an equal loader continues with the next batch, in any number of processes."""
        epoch, index = self._locate(self._step)
        place = {"step": self._step, "epoch": epoch, "index": index}
        words = repr((self.packing, self.shapes, getattr(self.dataset, "shares", None)))
        contents = zlib.crc32(words.replace(BatchShape.__name__, "Shape").encode())  # its name in runs of before
        contents = zlib.crc32(self._sizes.tobytes(), contents)
        return {
            **place,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "rows": len(self.dataset),
            "contents": contents,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a saved state. Raises UserError where it belongs to other data or settings, which would give other batches."""
        for name, value in self.state().items():
            if name not in ("step", "epoch", "index") and state.get(name) != value:
                raise UserError(
                    f"the saved data position has {name}={state.get(name)!r}, this run has {value!r}; "
                    "resume with the same data settings"
                )
        self._step = int(state["step"])
        self._starts[int(state["epoch"])] = self._step - int(state["index"])

    def _finished(self, step: int) -> bool:
        return self.epochs is not None and self._locate(step)[0] >= self.epochs

    def _locate(self, step: int) -> tuple[int, int]:
        """(epoch, index in it) of a step. Epochs of packs or of a mixture differ in length."""
        if self._fixed is not None:
            return divmod(step, self._fixed)
        epoch = max(number for number, start in list(self._starts.items()) if start <= step)
        while step >= (end := self._starts[epoch] + self._count(epoch)):
            epoch += 1
            self._starts[epoch] = end
        return epoch, step - self._starts[epoch]

    def _count(self, epoch: int) -> int:
        return len(self._plan(epoch)) if self._fixed is None else self._fixed

    def _group(self, lengths: Sequence[int] | None, buckets: int) -> None:
        sizes = self._sizes
        self.max_images, self.max_poses = int(sizes[:, 1].max()), max(1, int(sizes[:, 2].max()))
        self._groups: dict[BatchShape, np.ndarray] = {}
        self._fixed: int | None = None
        if self.packing:
            if self.max_images:
                room = self.max_length // (self.processor.ids.num_patches + TEXT_BESIDE_AN_IMAGE)
                self.max_images = max(self.max_images, room)
            self.max_poses = max(self.max_poses, self.max_length // TOKENS_BETWEEN_POSES)
            for images in np.unique([0 if (sizes[:, 1] == 0).any() else self.max_images, self.max_images]):
                self._groups[BatchShape(self.max_length, int(images))] = np.arange(len(sizes))
            return
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
                self._groups[BatchShape(int(chosen[slot]), images)] = rows[slots == slot]
        if not hasattr(self.dataset, "epoch"):
            self._fixed = sum(-(-len(rows) // self.batch_size) for rows in self._groups.values())

    def _plan(self, epoch: int) -> EpochPlan:
        """The batches of an epoch: shape, and for each of ``batch_size`` rows the indices of the examples in it. ``~index`` is a copy without
        labels and poses, which fills the batch.
        """
        if (found := self._plans.get(epoch)) is not None:
            return found
        random = np.random.default_rng((self.seed, epoch))
        plan: EpochPlan = []
        for shape, packs in self._packs(epoch, random):
            fill = [[~row for row in packs[i % len(packs)]] for i in range(-len(packs) % self.batch_size)]
            packs = [*packs, *fill]
            plan += [(shape, packs[i : i + self.batch_size]) for i in range(0, len(packs), self.batch_size)]
        if self.shuffle:
            plan = [plan[i] for i in random.permutation(len(plan))]
        self._plans = {number: known for number, known in self._plans.items() if abs(number - epoch) == 1}
        self._plans[epoch] = plan  # batches ahead may belong to the next epoch
        return plan

    def _packs(self, epoch: int, random: np.random.Generator) -> Iterator[tuple[BatchShape, list[list[int]]]]:
        """The packs of an epoch by shape, in their order; a pack is one row without ``packing``."""
        times = None
        if hasattr(self.dataset, "epoch"):
            times = np.bincount(self.dataset.epoch(epoch, self.seed), minlength=len(self.dataset))
        groups: list[tuple[BatchShape | None, np.ndarray]] = list(self._groups.items())
        if self.packing:
            groups = [(None, np.arange(len(self.dataset)))]
        for shape, rows in groups:
            drawn = rows if times is None else np.repeat(rows, times[rows])
            order = random.permutation(drawn) if self.shuffle else drawn
            if shape is not None:
                if order.size:
                    yield shape, [[int(row)] for row in order]
                continue
            limits = np.array([self.max_length, self.max_images, self.max_poses])
            packs = [[int(order[i]) for i in pack] for pack in fit_packs(self._sizes[order], limits)]
            for packed in self._groups:
                some = [rows for rows in packs if bool(self._sizes[rows, 1].any()) == bool(packed.images)]
                if some:
                    yield packed, some

    def _packed(self, numbers: list[int]) -> dict[str, Any]:
        """One row of a batch."""
        rows = [self._row(number if number >= 0 else ~number) for number in numbers]
        row = pack(rows) if self.packing else rows[0]
        return row if numbers[0] >= 0 else weightless(row)

    def _row(self, index: int) -> dict[str, Any]:
        if index >= self._cached:
            return self._encode(index, normalise=True)
        if (row := self._cache.get(index)) is None:
            row = self._cache[index] = self._encode(index, normalise=False)
        return {**row, "images": [self.processor.images.normalise(image) for image in row["images"]]}

    def _encode(self, index: int, normalise: bool) -> dict[str, Any]:
        example = self.dataset[index]
        row = encode_example(self.processor, example, self.max_length, family=self.family, normalise=normalise)
        found = [len(row[name]) for name in ("input_ids", "images", "pose_positions")]
        if found != (planned := self._sizes[index].tolist()):
            raise UserError(
                f"{example.place}: the epoch was planned for {planned} tokens, images and poses, and it has {found}; "
                "a row must always be the same, and sizes() of a data set must be right"
            )
        return row


class _Steps:
    """The batches from ``first`` on, for Grain's random access."""

    def __init__(self, loader: BatchLoader, first: int) -> None:
        self.loader, self.first = loader, first
        end = ENDLESS if loader.epochs is None else sum(map(loader._count, range(loader.epochs)))
        self.length = max(end - first, 0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        return self.loader.batch(self.first + index)


def fit_buckets(lengths: np.ndarray, count: int, limit: int, multiple: int = 16) -> list[int]:
    """At most ``count`` padded lengths for rows of ``lengths`` (N,) that pad least in all: multiples of ``multiple``, at most ``limit``."""
    rounded = np.minimum(-(-np.asarray(lengths) // multiple) * multiple, limit)
    values, frequency = (column.tolist() for column in np.unique(rounded, return_counts=True))
    if len(values) > 128:  # the search takes quadratic time
        return fit_buckets(lengths, count, limit, 2 * multiple)
    below = np.cumsum(frequency).tolist()
    # best[j]: the least padded total of the rows up to values[j], and its buckets, of which values[j] is the last
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

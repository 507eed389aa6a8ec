"""A loader of batches. Each batch is a pure function of its step.

Which rows a batch holds is worked out from its number (``data.order``). So the position of a loader is one number, a run resumes exactly in
any number of processes, and each process makes its rows of the same global batch. Batches are prepared ahead by threads or processes of
Grain, which reads them by number.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from chatpose_jax.data.collate import BETAS, Batch, collate, encode_example, pack, weightless
from chatpose_jax.data.example import Example, rows_at
from chatpose_jax.data.order import Pattern, Pools, fit_buckets, fit_packs, key, shuffled, slices
from chatpose_jax.data.sizes import demand_sight, measure
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import Processor
from chatpose_jax.settings import flag, whole
from smpl_jax.pose import Family, complete, unmeasured

TEXT_BESIDE_AN_IMAGE = 64
"""About the fewest text tokens of a conversation with an image. It determines how many images fit into a packed row."""
TOKENS_BETWEEN_POSES = 64
"""About the fewest tokens for each pose. It determines how many poses fit into a packed row."""
ENDLESS = 1 << 40
ROW_BYTES = 2048
"""About the bytes of the Python objects of a cached row."""
ORDER = 2
"""The version of the order of rows. A run resumes only with the version with which it began."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of a batch, for which ``jit`` compiles.

    length: padded tokens. images: room for images in each row, 0 or the most of any row.
    """

    length: int
    images: int


class Drawn(Protocol):
    """A data set of several sources, of which an epoch takes shares: ``data.mixture.Mixture``.

    draws: (rows, rows that an epoch takes) of each source, in their order.
    """

    @property
    def draws(self) -> Sequence[tuple[int, int]]: ...


class _Group(NamedTuple):
    """The batches of one shape in an epoch. ends: the packs of the patterns up to each."""

    shape: BatchShape
    patterns: list[Pattern]
    ends: np.ndarray
    batches: int


class _Epoch(NamedTuple):
    """before, drawn: (pools, sources) rows that earlier epochs took, and that this one takes."""

    before: np.ndarray
    drawn: np.ndarray
    groups: list[_Group]


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
    threads: threads that prepare batches ahead. Images are decoded in parallel.
    workers: processes of Grain that prepare batches ahead, for rows made by Python code, which threads cannot make in parallel.

    shapes: all shapes of batches, for which a training step is compiled.
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
        self._starts = {0: 0}  # epoch -> its first step, for epochs that are known
        self._epochs: dict[int, _Epoch] = {}
        sizes = measure(dataset, processor, self.max_length) if sizes is None else sizes
        demand_sight(dataset, processor, sizes)
        self._types, self._type = _types(sizes)
        draws = getattr(dataset, "draws", [(len(dataset), len(dataset))])
        self._draws = [(int(rows), int(share)) for rows, share in draws]
        # The first rows are cached. Every epoch has a new order, so the most recently used ones would be no better.
        pose = complete(unmeasured((), family), BETAS)
        size = np.array([8, 3 * processor.ids.image_size**2, sum(x.nbytes for x in jax.tree.leaves(pose))])
        kept = (self._types @ size + ROW_BYTES)[self._type[: cache // ROW_BYTES]]
        self._cached = int(np.searchsorted(np.cumsum(kept), cache, "right"))
        self._form_pools(lengths, buckets)
        contents = zlib.crc32(repr((packing, self.shapes, self._draws)).encode())
        self._contents = zlib.crc32(self._type.tobytes(), zlib.crc32(self._types.tobytes(), contents))

    def __len__(self) -> int:
        """Batches in the first epoch."""
        return self._count(0)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 in the first epoch: a pure function of the loader's arguments and ``step``."""
        shape, packs = self.rows_of(step)
        rows = self._read(sorted({number if number >= 0 else ~number for pack in packs for number in pack}))
        return collate(
            [self._packed(rows, numbers) for numbers in packs],
            shape.length,
            max_images=shape.images,
            max_poses=self.max_poses,
            pad_id=self.processor.ids.pad_token_id,
            image_size=self.processor.ids.image_size,
        )

    def rows_of(self, step: int) -> tuple[BatchShape, list[list[int]]]:
        """The shape of the batch of a step, and the numbers of the data rows in each of its rows, several where they are packed.

        ``~number`` stands for a copy without labels and poses, which fills the batch.
        """
        epoch, index = self._locate(step)
        plan = self._plan(epoch)
        if self.shuffle:
            total = sum(group.batches for group in plan.groups)
            index = int(shuffled(np.array(index), total, key(self.seed, 2, epoch)))
        number = 0
        while index >= plan.groups[number].batches:
            index -= plan.groups[number].batches
            number += 1
        group = plan.groups[number]
        slots = index * self.batch_size + self.rows
        full = int(group.ends[-1])
        packs = slots % full
        if self.shuffle and len(group.patterns) > 1:
            packs = shuffled(packs, full, key(self.seed, 3, epoch, number))
        pattern = np.searchsorted(group.ends, packs, "right")
        first = group.ends - [pattern.count for pattern in group.patterns]
        places = [group.patterns[i].places(int(n)) for i, n in zip(pattern, packs - first[pattern])]
        pools, inner = np.array([place for pack in places for place in pack], np.int64).reshape(-1, 2).T
        rows = iter(self._pools.rows(epoch, plan.before, plan.drawn, pools, inner).tolist())
        return group.shape, [
            [next(rows) if slot < full else ~next(rows) for _ in pack] for slot, pack in zip(slots, places)
        ]

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state on. ``state`` counts those that were taken."""
        steps = _Steps(self, self._step)
        reads_ahead = self._prefetch or self._threads > 1 or self._workers
        for batch in self._ahead(steps) if reads_ahead else map(steps.__getitem__, range(len(steps))):
            self._step += 1
            yield batch

    def _ahead(self, steps: _Steps) -> Iterator[Batch]:
        import grain
        from absl import flags

        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=max(self._prefetch, 1))
        batches = grain.MapDataset.source(steps).to_iter_dataset(options)
        if self._workers:
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which this program does not parse
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(self._workers))
        return iter(batches)

    def state(self) -> dict[str, int]:
        """The position of the loader, for JSON. After ``restore`` an equal loader continues with the next batch, in any number of processes."""
        epoch, index = self._locate(self._step)
        return {
            "step": self._step,
            "epoch": epoch,
            "index": index,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "rows": len(self.dataset),
            "contents": self._contents,
            "order": ORDER,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a saved state. Raises UserError where it belongs to other data or settings, which would give other batches."""
        if (order := state.get("order", 1)) != ORDER:
            raise UserError(
                f"the run began with version {order} of the order of rows, and this program has version {ORDER}, which would give other "
                "batches; finish the run with the program that began it, or start a new run"
            )
        for name, value in self.state().items():
            if name not in ("step", "epoch", "index") and state.get(name) != value:
                raise UserError(
                    f"the saved data position has {name}={state.get(name)!r}, this run has {value!r}; "
                    "resume with the same data settings"
                )
        self._step = int(state["step"])
        self._starts[int(state["epoch"])] = self._step - int(state["index"])

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
        return sum(group.batches for group in self._plan(epoch).groups) if self._fixed is None else self._fixed

    def _form_pools(self, lengths: Sequence[int] | None, buckets: int) -> None:
        """Rows that may stand for each other in a batch form a pool: those of one shape of batch, or of one size where they are packed."""
        types, rows = self._types, np.bincount(self._type)
        self.max_images, self.max_poses = int(types[:, 1].max()), max(1, int(types[:, 2].max()))
        if self.packing:
            if self.max_images:
                room = self.max_length // (self.processor.ids.num_patches + TEXT_BESIDE_AN_IMAGE)
                self.max_images = max(self.max_images, room)
            self.max_poses = max(self.max_poses, self.max_length // TOKENS_BETWEEN_POSES)
            held = sorted({0 if (types[:, 1] == 0).any() else self.max_images, self.max_images})
            self.shapes = tuple(BatchShape(self.max_length, images) for images in held)
            pools = np.arange(len(types))
        else:
            shapes: list[BatchShape] = []
            pools = np.zeros(len(types), np.int64)
            for images in (0, self.max_images) if self.max_images else (0,):
                some = np.flatnonzero((types[:, 1] > 0) == (images > 0))
                if not some.size:
                    continue
                found = types[some, 0]
                chosen = (
                    sorted(lengths) if lengths is not None else fit_buckets(found, buckets, self.max_length, rows[some])
                )
                if chosen[-1] < found.max():
                    raise UserError(
                        f"lengths={tuple(chosen)} hold no row of {found.max()} tokens; add a longer one or lower max_length"
                    )
                used, places = np.unique(np.searchsorted(chosen, found), return_inverse=True)
                pools[some] = places + len(shapes)
                shapes += [BatchShape(int(chosen[slot]), images) for slot in used]
            self.shapes = tuple(shapes)
        self._pools = Pools(pools, self._type, self._draws, self.seed, self.shuffle)
        self._fixed: int | None = None
        self._fixed = self._count(0) if self._pools.constant else None

    def _plan(self, epoch: int) -> _Epoch:
        """What the batches of an epoch hold. It grows with the number of different sizes of rows, not with the number of rows."""
        if (found := self._epochs.get(epoch)) is not None:
            return found
        before = self._pools.before(epoch)
        drawn = self._pools.before(epoch + 1) - before
        known = next(iter(self._epochs.values()), None) if self._pools.constant else None
        plan = _Epoch(before, drawn, known.groups if known else self._groups(drawn.sum(axis=1)))
        # Batches ahead may belong to the next epoch.
        self._epochs = {number: known for number, known in self._epochs.items() if abs(number - epoch) == 1} | {
            epoch: plan
        }
        return plan

    def _groups(self, drawn: np.ndarray) -> list[_Group]:
        """The batches of an epoch of ``drawn`` (pools,) rows, by shape."""
        if self.packing:
            patterns = fit_packs(self._types, drawn, np.array([self.max_length, self.max_images, self.max_poses]))
            images = [any(self._types[pool, 1] for pool, _, _ in pattern.parts) for pattern in patterns]
            by_shape = [[p for p, some in zip(patterns, images) if some == (shape.images > 0)] for shape in self.shapes]
        else:
            by_shape = [[Pattern(int(rows), [(pool, 1, 0)])] if rows else [] for pool, rows in enumerate(drawn)]
        groups = []
        for shape, some in zip(self.shapes, by_shape):
            if some:
                ends = np.cumsum([pattern.count for pattern in some])
                groups.append(_Group(shape, some, ends, -(-int(ends[-1]) // self.batch_size)))
        return groups

    def _packed(self, found: Mapping[int, dict[str, Any]], numbers: list[int]) -> dict[str, Any]:
        """One row of a batch."""
        rows = [found[number if number >= 0 else ~number] for number in numbers]
        row = pack(rows) if self.packing else rows[0]
        return row if numbers[0] >= 0 else weightless(row)

    def _read(self, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Some rows, encoded. Those that are not in the cache are read together."""
        absent = [number for number in numbers if number not in self._cache]
        read = dict(zip(absent, rows_at(self.dataset, absent)))
        return {number: self._row(number, read) for number in numbers}

    def _row(self, index: int, read: Mapping[int, Example]) -> dict[str, Any]:
        if index >= self._cached:
            return self._encode(index, read[index], normalise=True)
        if (row := self._cache.get(index)) is None:
            row = self._cache[index] = self._encode(index, read[index], normalise=False)
        settings = self.processor.images
        return {**row, "images": [settings.normalise(image) for image in row["images"]]} if settings else row

    def _encode(self, index: int, example: Example, normalise: bool) -> dict[str, Any]:
        row = encode_example(self.processor, example, self.max_length, family=self.family, normalise=normalise)
        found = [len(row[name]) for name in ("input_ids", "images", "pose_positions")]
        if found != (planned := self._types[self._type[index]].tolist()):
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


def _types(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different sizes (T, 3) of rows, and the number (N,) of the one that each row has, in few bytes."""
    most = sizes.max(axis=0).astype(np.int64) + 1

    def joined(some: slice) -> np.ndarray:
        return np.ravel_multi_index(tuple(sizes[some].astype(np.int64).T), tuple(most))

    parts = slices(len(sizes))
    found = np.unique(np.concatenate([np.unique(joined(some)) for some in parts]))
    where = np.empty(len(sizes), np.min_scalar_type(len(found)))
    for some in parts:
        where[some] = np.searchsorted(found, joined(some))
    return np.stack(np.unravel_index(found, tuple(most)), axis=1), where

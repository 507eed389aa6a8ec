"""Data settings, as plain frozen data, and the table of sources."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from chatpose_jax.data.example import Example, Kind
from chatpose_jax.errors import UserError
from chatpose_jax.settings import check_types, require

Split = Literal["train", "val", "test"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they become batches.

    source: a name of ``SOURCES``, or ``package.module:function`` of one's own with the same signature.
    sources: pairs of (source, weight) that the source "mixture" draws from; the paper's proportions by default (Feng et
        al. 2024, section 3.3: text, instructions and pictures as 1 : 1 : 2).
    seed: of what the source draws.
    train_size, val_size, test_size: rows of each split (of each of ``sources``); 0 is the source's own choice.
    mixture: pairs of (task, weight) where the source has tasks; empty is its own choice.
    template: conversation template of ``processing.conversation``, for a model that starts from nothing; others keep their folder's.
    buckets: padded lengths of batches with pictures, and as many of batches without: each compiles a step.
    packing: several conversations in each row of ``train.max_length`` tokens, instead of padded lengths.
    cache_mib: memory of each process for rows that were encoded once, their pictures at the model's size; 0 keeps none, and Grain's
        processes keep none.
    threads, workers: Grain's threads (from two on) and processes that prepare batches; 0 workers is threads alone.
    """

    source: str = "synthetic"
    sources: tuple[tuple[str, float], ...] = (
        ("synthetic-text", 1.0),
        ("synthetic-instruction", 1.0),
        ("synthetic-image", 2.0),
    )
    seed: int = 0
    train_size: int = 0
    val_size: int = 0
    test_size: int = 0
    mixture: tuple[tuple[str, float], ...] = ()
    template: str = "vicuna_v1"
    buckets: int = 4
    packing: bool = False
    cache_mib: int = 1024
    threads: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        check_types(self, "data")
        sizes = ("seed", "train_size", "val_size", "test_size", "cache_mib", "workers")
        require(self, "data", "at least 0", lambda value: value >= 0, *sizes)
        require(self, "data", "at least 1", lambda value: value >= 1, "buckets", "threads")
        if any(weight < 0 for _, weight in self.mixture):
            raise UserError(f"data.mixture: weights must not be negative, found {self.mixture}")
        if any(weight <= 0 for _, weight in self.sources):
            raise UserError(f"data.sources: weights must be positive, found {self.sources}")


Source = Callable[[DataConfig, Split, int], Sequence[Example]]
"""(settings, split, picture size in pixels) -> rows by index."""


def _synthetic(config: DataConfig, split: Split, image_size: int, kind: Kind | None = None) -> Sequence[Example]:
    from chatpose_jax.data.synthetic.dataset import DEFAULT_MIXTURE, TASKS, SyntheticDataset

    mixture = dict(config.mixture) or DEFAULT_MIXTURE
    if kind is not None:
        mixture = {task: weight for task, weight in mixture.items() if task not in TASKS or TASKS[task][0] == kind}
    return SyntheticDataset(split, _size(config, split) or None, config.seed, image_size, mixture)


def _mixture(config: DataConfig, split: Split, image_size: int) -> Sequence[Example]:
    from chatpose_jax.data.mixture import Mixture

    parts = [dataclasses.replace(config, source=source) for source, _ in config.sources]
    if any(part.source == "mixture" for part in parts):
        raise UserError("data.sources: a mixture cannot be one of its own sources")
    return Mixture([examples(part, split, image_size) for part in parts], [weight for _, weight in config.sources])


def _size(config: DataConfig, split: Split) -> int:
    return {"train": config.train_size, "val": config.val_size, "test": config.test_size}[split]


SOURCES: dict[str, Source] = {
    "synthetic": _synthetic,
    "synthetic-text": functools.partial(_synthetic, kind="text"),
    "synthetic-instruction": functools.partial(_synthetic, kind="instruction"),
    "synthetic-image": functools.partial(_synthetic, kind="image"),
    "mixture": _mixture,
}


def examples(config: DataConfig, split: Split, image_size: int) -> Sequence[Example]:
    """The rows of a split.

    Raises UserError for a source of one's own that cannot be found, that gives no rows, or whose code fails, then or at any row; an
    OSError of that code stays one. Both name the source, and the row where it was one.
    """
    if config.source in SOURCES:
        return SOURCES[config.source](config, split, image_size)
    module, _, name = config.source.partition(":")
    if not (module and name):
        raise UserError(
            f"data.source={config.source!r}: expected one of {', '.join(SOURCES)}, or 'package.module:function'"
        )
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"data.source={config.source!r} cannot be imported: {error} (a module of your own must be installed, or its folder be on PYTHONPATH)"
        ) from error
    except Exception as error:
        raise _raised(f"data.source={config.source!r} cannot be imported", error) from error
    source: Source | None = getattr(found, name, None)
    if not callable(source):
        raise UserError(f"data.source={config.source!r}: the module {module} has no function {name!r}")
    try:
        inspect.signature(source).bind(config, split, image_size)
    except TypeError as error:
        raise UserError(f"data.source={config.source!r}: a source takes (config, split, image_size): {error}") from None
    try:
        rows = source(config, split, image_size)
    except Exception as error:
        raise _raised(f"data.source={config.source!r} raised for split {split!r}", error) from error
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise UserError(f"data.source={config.source!r}: expected a sequence of Example, found {type(rows).__name__}")
    named = NamedRows(rows, config.source)
    if len(named):
        named[0]  # the first fault is found before anything is read
    return named


class NamedRows(Sequence[Example]):
    """The rows of a source of one's own by index; an error of its code is one line that names the row."""

    def __init__(self, rows: Any, source: str) -> None:
        self.rows, self.source = rows, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Row ``index``, or the rows of a slice; IndexError beyond the size."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        where = f"row {index} of data.source={self.source!r}"
        try:
            row = self.rows[index]
        except Exception as error:
            raise _raised(where, error) from error
        if not isinstance(row, Example):
            raise UserError(f"{where}: expected an Example, found {type(row).__name__}")
        return row

    def __getattr__(self, name: str) -> Any:
        if name in ("epoch", "shares"):  # of rows that say themselves what an epoch holds: data.mixture.Mixture
            return getattr(self.rows, name)
        raise AttributeError(name)


def _raised(where: str, error: Exception) -> Exception:
    """What an error in code of one's own becomes: one line that says where it was raised. What the operating system refused stays an
    OSError, as others tell by its number whether the run can go on.
    """
    if isinstance(error, UserError):
        return UserError(f"{where}: {error}")
    kind, words = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno:
        return OSError(error.errno, f"{error.strerror or words} ({where}: {kind})", error.filename)
    return UserError(f"{where}: {kind}" + (f": {words}" if words else ""))

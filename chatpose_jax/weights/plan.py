"""The plan of a conversion: for each leaf of the parameter tree where its values come from.

A plan reads headers only. It is complete or it raises: every tensor of every source feeds a leaf or is ignored by a
rule with a reason, and every leaf has exactly one origin of the right shape.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import DType, ModelConfig, TextConfig
from chatpose_jax.models.heads import create_head
from chatpose_jax.models.projector import Projector
from chatpose_jax.models.vision import VisionTower
from chatpose_jax.settings import one_line
from chatpose_jax.weights.adapters import row_module
from chatpose_jax.weights.infer import Vocabulary, embedding_rows, infer_config
from chatpose_jax.weights.layouts import Rule
from chatpose_jax.weights.leaves import Leaf, array_leaf, source_leaf
from chatpose_jax.weights.nonfinite import Nonfinite
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.pictures import Pictures, infer_pictures
from chatpose_jax.weights.readers import Index, TensorEntry
from chatpose_jax.weights.sources import Source

_FLOATING = {np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_SHOWN = 8
"""How many names of each kind of problem an error shows."""
PARTS = ("vision", "projector", "decoder", "pose_head")
_TABLES = {"embed_tokens": "decoder/embed_tokens/embedding", "lm_head": "decoder/lm_head/kernel"}
_REPLACED = "the adapter brings its own"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do. ``ignored`` maps source tensors to the reason; ``fresh`` names what no
    source gave; ``passengers`` are the ignored tensors that ride along, by layout; ``nonfinite`` knows what was found in the
    leaves that have been read."""

    config: ModelConfig
    sources: tuple[Source, ...]
    vocabulary: Vocabulary
    pictures: Pictures
    leaves: Mapping[str, Leaf]
    ignored: Mapping[str, str]
    fresh: tuple[str, ...]
    nonfinite: Nonfinite
    passengers: Mapping[str, Mapping[str, TensorEntry]] = dataclasses.field(default_factory=dict)

    __repr__ = one_line

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return sum(leaf.nbytes for leaf in self.leaves.values())


def make_plan(
    sources: Sequence[Source],
    *,
    tokenizer: str | Path | None = None,
    dtype: DType | None = None,
    init_missing: Sequence[str] = (),
    pose_head: str = "auto",
    seed: int = 0,
    allow_nonfinite: bool = False,
    image_fit: str | None = None,
) -> Plan:
    """Checks everything and plans; see ``convert.convert`` for the arguments. Raises one UserError that lists every
    problem."""
    if unknown := sorted(set(init_missing) - {"vision", "projector", "pose_head"}):
        raise UserError(f"--init-missing {unknown[0]!r}: expected vision, projector or pose_head")
    provided = {part for source in sources for part in source.layout.parts}
    fresh_parts = set(init_missing)
    if pose_head == "init" or "pose_head" not in provided:
        fresh_parts.add("pose_head")
    absent = []
    for part in PARTS:
        if part not in provided | fresh_parts:
            option = f"--{part} {'FILE' if part == 'projector' else 'FOLDER'}"
            way = f"{option}, or --init-missing {part}" if part in ("vision", "projector") else "another source"
            absent.append(f"{part} (give {way})")
    try:
        config, vocabulary = infer_config(sources, tokenizer, dtype=dtype)
    except UserError as error:
        # One error for all that is missing: a user fetches it in one go.
        if absent:
            raise UserError(f"{error}. Without a source, too: {', '.join(absent)}") from None
        raise
    pictures = infer_pictures(sources, config, vocabulary.tokens.folder, image_fit)
    tree: dict[str, jax.ShapeDtypeStruct] = by_path(abstract_params(config))

    problems = _Problems()
    leaves: dict[str, Leaf] = {}
    ignored: dict[str, str] = {}
    passengers: dict[str, dict[str, TensorEntry]] = {}
    replaced = {path for source in sources if source.is_adapter for path in source.targets}
    if any(path.startswith("pose_head/") for path in replaced):  # whatever kind of head the base has
        replaced |= {path for source in sources for path in source.targets if path.startswith("pose_head/")}
    for source in sources:
        skipped = dict.fromkeys(() if source.is_adapter else replaced, _REPLACED)
        skipped |= {
            path: f"{path.split('/')[0]} is initialised afresh" for path in tree if path.split("/")[0] in fresh_parts
        }
        riders = _plan_source(
            source, config, tree, skipped, table_rows(sources, config.text.base_vocab_size), leaves, ignored, problems
        )
        # Of what stands beside the main checkpoint, only tensors that other layouts know.
        riders = [name for name in riders if source is sources[0] or source.layout.locate(name)]
        if riders and not source.is_adapter:
            passengers[source.layout.name] = {name: source.checkpoint.tensors[name] for name in riders}
    for part in sorted(fresh_parts):
        for path, array in initial(part, config, seed).items():
            leaves[path] = array_leaf(path, array)
    for part in absent:
        problems.add("parts without a source", part)
    problems.raise_if_any(sources)

    fresh = sorted(fresh_parts)
    if vocabulary.pose_is_new and vocabulary.rows > embedding_rows(sources):
        fresh.append("pose token rows: mean of the others")
    _append_rows(leaves, tree, sources, config.text)
    for source in sources:
        _replace_rows(leaves, source, config.text)
    nonfinite = Nonfinite(allowed=allow_nonfinite)
    leaves = {path: nonfinite.watched(leaves[path]) for path in tree}
    return Plan(config, tuple(sources), vocabulary, pictures, leaves, ignored, tuple(fresh), nonfinite, passengers)


def table_rows(sources: Sequence[Source], base: int) -> dict[str, set[int]]:
    """How many rows the table of ``embed_tokens``, and of ``lm_head``, may have: as many as the embedding, or as all tokens that have a
    row anywhere; down to ``base`` where an adapter lists what is missing (``trainable_token_indices``)."""
    listed: dict[str, set[int]] = {"embed_tokens": set(), "lm_head": set()}
    for source in sources:
        for name, ids in source.token_rows.items():
            listed.setdefault(row_module(name), set()).update(ids)
    held = embedding_rows(sources)
    every = max([held, *(id + 1 for rows in listed.values() for id in rows)])
    allowed = {}
    for module, rows in listed.items():
        shortest = every
        while shortest > base and shortest - 1 in rows:
            shortest -= 1
        allowed[module] = {held, *range(shortest, every + 1)}
    return allowed


class Rounded(NamedTuple):
    """A tensor of a source whose values the dtype of their leaf cannot hold exactly."""

    source: Source
    name: str
    path: str
    dtype: np.dtype
    """The leaf's."""


def rounded(plan: Plan) -> Iterator[Rounded]:
    """What the sources say more exactly than the result does."""
    base = plan.config.text.base_vocab_size
    for source in plan.sources:
        for name, entry in source.checkpoint.tensors.items():
            if ids := source.token_rows.get(name):
                # Rows of new tokens stay in float32.
                path = _TABLES[row_module(name)] if any(id < base for id in ids) else None
            else:
                # An adapter's tensor may have the name of the one that it replaces.
                reason = plan.ignored.get(name)
                read = reason is None or (source.is_adapter and reason == _REPLACED)
                place = source.layout.locate(name) if read else None
                path = place[0].target if place else None
            leaf = plan.leaves.get(path) if path else None
            if path and leaf and leaf.dtype.itemsize > 1 and np.promote_types(entry.dtype, leaf.dtype) != leaf.dtype:
                yield Rounded(source, name, path, leaf.dtype)


def initial(part: str, config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Fresh weights of one part, by path, as training would start it."""
    state = _initialiser(part, config)(jax.random.key(seed))
    return {f"{part}/{path}": np.asarray(leaf) for path, leaf in by_path(state).items()}


@functools.lru_cache(maxsize=8)
def _initialiser(part: str, config: ModelConfig) -> Callable[[jax.Array], dict[str, Any]]:
    makers: dict[str, Callable[[nnx.Rngs], Any]] = {
        "vision": lambda rngs: VisionTower(config, rngs=rngs),
        "projector": lambda rngs: Projector(config, rngs=rngs),
        "pose_head": lambda rngs: create_head(config.head, config.text.hidden_size, rngs=rngs),
    }
    return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(makers[part](nnx.Rngs(key)))))


class _Problems:
    """Collects; raises once."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, what: str) -> None:
        self.found.setdefault(kind, []).append(what)

    def raise_if_any(self, sources: Sequence[Source]) -> None:
        if not self.found:
            return
        lines = []
        for kind, names in self.found.items():
            more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{kind} ({len(names)}): {', '.join(names[:_SHOWN])}{more}")
        kinds = "; ".join(f"{source.title} read as {source.layout.name}" for source in sources)
        raise UserError(f"these weights do not fit ({kinds}); nothing was written. " + "; ".join(lines))


def _plan_source(
    source: Source,
    config: ModelConfig,
    tree: Mapping[str, jax.ShapeDtypeStruct],
    skipped: Mapping[str, str],
    rows: Mapping[str, set[int]],
    leaves: dict[str, Leaf],
    ignored: dict[str, str],
    problems: _Problems,
) -> list[str]:
    """Adds the leaves that a source feeds, except those ``skipped`` (path → why). rows: of ``table_rows``.
    Returns the tensors that feed nothing in this model."""
    tensors = source.checkpoint.tensors
    riders: dict[str, str] = {}
    known: set[str] = set(source.token_rows)
    for rule in source.layout.unused:
        known.add(rule.source)
        if rule.source in tensors:
            riders[rule.source] = "follows the last block, which feeds nothing"
    for rule in source.layout.rules:
        part = rule.target.split("/")[0]
        layers = config.vision.num_used_layers if part == "vision" else config.text.num_layers
        names = rule.sources(layers)
        if part == "vision" and rule.stacked:
            for name in rule.sources(config.vision.num_layers)[layers:]:
                known.add(name)
                if name in tensors:
                    riders[name] = "follows the last block that feeds the projector"
        known.update(names)
        if rule.target in skipped:
            ignored.update({name: skipped[rule.target] for name in names if name in tensors})
            continue
        absent = [name for name in names if name not in tensors and not source.spares(name)]
        target = tree.get(rule.target)
        if absent or target is None:
            for name in absent:
                if name not in problems.found.get("missing", ()):
                    problems.add("missing", name)
            if not absent:
                problems.add("without a place in the model", names[0])
            continue
        if rule.target in leaves:
            problems.add("duplicate", f"{rule.target} comes from {source.title} and from another source")
            continue
        fits = [
            _fits(rule, target, tensors[name], rows, problems)
            for name in names
            if rule.rows != "added" and name in tensors
        ]
        if all(fits):
            start = config.text.base_vocab_size if rule.rows == "added" else 0
            leaves[rule.target] = source_leaf(rule.target, target, rule, [tensors.get(name) for name in names], start)
    for name in tensors:
        if name in known:
            continue
        reason = next((rule.why for rule in source.layout.ignored if rule.matches(name)), None)
        if reason is None:
            problems.add("unknown", name)
        else:
            riders[name] = reason
    ignored.update(riders)
    return list(riders)


def _fits(
    rule: Rule, target: jax.ShapeDtypeStruct, entry: TensorEntry, rows: Mapping[str, set[int]], problems: _Problems
) -> bool:
    expected = rule.transform.source_shape(tuple(target.shape[1:] if rule.stacked else target.shape))
    if rule.rows == "base":
        allowed, found = rows[rule.target.split("/")[1]], entry.shape[0] if entry.shape else 0
        expected = (found if found in allowed else max(allowed), *expected[1:])
    if entry.shape != expected:
        problems.add("misshaped", f"{entry.name} is {entry.shape}, expected {expected}")
    elif entry.dtype not in _FLOATING:
        problems.add("not floating point", f"{entry.name} is {entry.dtype}")
    else:
        return True
    return False


def _append_rows(
    leaves: dict[str, Leaf], tree: Mapping[str, jax.ShapeDtypeStruct], sources: Sequence[Source], text: TextConfig
) -> None:
    """Gives token rows that a table lacks their values: the mean over those that it has, the neutral start for a token that
    nothing has trained."""
    added = {
        rule.target: (rule, source.checkpoint.tensors[rule.source])
        for source in sources
        for rule in source.layout.rules
        if rule.rows == "added" and rule.source in source.checkpoint.tensors
    }
    for rule, entry in added.values():
        rows, width = entry.shape
        if rows == text.vocab_size:
            continue
        total = np.zeros(width, np.float64)
        for row in range(0, rows, 4096):
            block = entry.read((slice(row, min(row + 4096, rows)), slice(0, width)))
            total += block.astype(np.float32).sum(0, dtype=np.float64)
        stored = entry.read((slice(text.base_vocab_size, rows), slice(0, width))).astype(np.float32)
        count = rule.transform.source_shape(tuple(tree[rule.target].shape))[0] - len(stored)
        mean = np.repeat((total / rows).astype(np.float32)[None], count, axis=0)
        array = rule.transform.forward(np.concatenate([stored, mean]))
        leaves[rule.target] = array_leaf(rule.target, np.ascontiguousarray(array))


def _replace_rows(leaves: dict[str, Leaf], source: Source, text: TextConfig) -> None:
    """Lays the rows that an adapter has trained over those of the vocabulary, base and added."""
    for name, ids in source.token_rows.items():
        entry = source.checkpoint.tensors[name]
        module = row_module(name)
        if module not in _TABLES or entry.shape[1:] != (text.hidden_size,):
            raise UserError(
                f"{source.title}: {name} is {entry.shape}; expected rows of {text.hidden_size} for embed_tokens or lm_head: "
                "the adapter belongs to another base"
            )
        axis = 0 if module == "embed_tokens" else 1
        for kind, first in (("embedding" if axis == 0 else "kernel", 0), ("added", text.base_vocab_size)):
            path = f"decoder/{module}/{kind}"
            rows = {id - first: row for row, id in enumerate(ids) if 0 <= id - first < leaves[path].shape[axis]}
            if rows:
                leaves[path] = _overlaid(leaves[path], entry.read(), rows, axis)


def _overlaid(leaf: Leaf, values: np.ndarray, rows: Mapping[int, int], axis: int) -> Leaf:
    """The leaf with ``values[row]`` at position ``place`` of ``axis``, for each place and row of ``rows``."""

    def read(index: Index) -> np.ndarray:
        out = np.array(leaf.read(index))
        bounds = [part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)]
        across = slice(*bounds[1 - axis])
        for place, row in rows.items():
            if bounds[axis][0] <= place < bounds[axis][1]:
                at = place - bounds[axis][0]
                out[(at, slice(None)) if axis == 0 else (slice(None), at)] = values[row, across].astype(leaf.dtype)
        return out

    return dataclasses.replace(leaf, read=read, names=())

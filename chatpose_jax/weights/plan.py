"""The plan of a conversion: the origin of each leaf of the parameter tree.

A plan reads headers only. It is complete or it raises: every tensor of every source either becomes part of a leaf or is ignored by a rule with a
reason, and every leaf has exactly one origin of the right shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.heads import trusted_head
from chatpose_jax.settings import one_line
from chatpose_jax.weights.adapters import row_module
from chatpose_jax.weights.backbones import Language, language
from chatpose_jax.weights.images import Preprocessing, infer_image_settings
from chatpose_jax.weights.infer import Vocabulary, embedding_rows, infer_config, sees
from chatpose_jax.weights.initial import initial
from chatpose_jax.weights.leaves import Leaf, array_leaf, same, source_leaf
from chatpose_jax.weights.nonfinite import Nonfinite
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.quantized import quantized
from chatpose_jax.weights.readers import TensorEntry
from chatpose_jax.weights.rows import allowed_rows, append_rows, replace_rows
from chatpose_jax.weights.sources import Source, open_sources
from chatpose_jax.weights.spec import SourceSpec
from chatpose_jax.weights.table import NameRule

_FLOATING = {np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_SHOWN = 8
"""Number of names that an error shows for each kind of problem."""
PARTS = ("vision", "projector", "decoder", "pose_head")
_TABLES = {"embed_tokens": "decoder/embed_tokens/embedding", "lm_head": "decoder/lm_head/kernel"}
# Leaves that tied weights do not have, and those that stand for them.
_TIED = {
    "decoder/lm_head/kernel": "decoder/embed_tokens/embedding",
    "decoder/lm_head/added": "decoder/embed_tokens/added",
}
_REPLACED = "replaced by the adapter"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Everything that a conversion will do.

    ignored: source tensor → the reason why it is not used. fresh: parts that no source has. passengers: for each layout, the ignored tensors that
    are kept for export. images: None for a model without a vision tower. nonfinite: non-finite values found in the leaves that were read.
    """

    config: ModelConfig
    sources: tuple[Source, ...]
    vocabulary: Vocabulary
    images: Preprocessing | None
    leaves: Mapping[str, Leaf]
    ignored: Mapping[str, str]
    fresh: tuple[str, ...]
    nonfinite: Nonfinite
    passengers: Mapping[str, Mapping[str, TensorEntry]]

    __repr__ = one_line

    @property
    def language(self) -> Language:
        """The family of the language model."""
        return language(self.config.text.backbone)

    @property
    def nbytes(self) -> int:
        """Size of the result in bytes."""
        return sum(leaf.nbytes for leaf in self.leaves.values())


def plan_conversion(spec: SourceSpec) -> Conversion:
    """Reads the headers, checks them and makes the plan. Raises one UserError that lists every problem."""
    sources = open_sources(spec)
    provided = {part for source in sources for part in source.layout.parts}
    fresh: set[str] = set(spec.init_missing)
    if spec.pose_head == "init" or "pose_head" not in provided:
        fresh.add("pose_head")
    ways = {
        "vision": "--vision FOLDER, or --init-missing vision",
        "projector": "--projector FILE, or --init-missing projector",
    }
    needed = PARTS if sees(sources, spec) else ("decoder", "pose_head")
    absent = [f"{part} (give {ways.get(part, 'another source')})" for part in needed if part not in provided | fresh]
    try:
        config, vocabulary = infer_config(sources, spec)
    except UserError as error:
        # One error for everything that is missing, so that a user can fetch it at once.
        if absent:
            raise UserError(f"{error}. Parts without a source: {', '.join(absent)}") from None
        raise
    if spec.head is not None:
        trusted_head(str(spec.path), config.head, spec.head)  # raises if the head is given but not needed
    images = infer_image_settings(sources, config, vocabulary.tokens.folder, spec.image_fit)

    work = _Work(config, allowed_rows(sources, config.text.base_vocab_size))
    passengers: dict[str, dict[str, TensorEntry]] = {}
    replaced = {path for source in sources if source.is_adapter for path in source.targets}
    if any(path.startswith("pose_head/") for path in replaced):  # the base may have any kind of head
        replaced |= {path for source in sources for path in source.targets if path.startswith("pose_head/")}
    for source in sources:
        skipped = dict.fromkeys(() if source.is_adapter else replaced, _REPLACED)
        parts = {path: path.split("/")[0] for path in work.tree}
        skipped |= {path: f"{part} is initialised" for path, part in parts.items() if part in fresh}
        unused = work.take(source, skipped)
        # From the other sources, only tensors that other layouts have names for.
        unused = [name for name in unused if source is sources[0] or source.layout.locate(name)]
        if unused and not source.is_adapter:
            passengers[source.layout.name] = {name: source.checkpoint.tensors[name] for name in unused}
    for part in absent:
        work.problem("parts without a source", part)
    work.raise_problems(sources)

    leaves = work.leaves
    for part in fresh:
        leaves |= {path: array_leaf(path, array) for path, array in initial(part, config, spec.seed).items()}
    started = sorted(fresh)
    if vocabulary.pose_is_new and vocabulary.rows > embedding_rows(sources):
        started.append("pose token rows: mean of the others")
    append_rows(leaves, sources, config.text)
    for source in sources:
        replace_rows(leaves, source, config.text)
    nonfinite = Nonfinite(allowed=spec.allow_nonfinite)
    leaves = {path: nonfinite.watched(leaves[path]) for path in work.tree}
    if spec.quantize != "none":
        config = config.replace(quantize=spec.quantize)
        leaves = quantized(config, leaves)
    return Conversion(
        config, tuple(sources), vocabulary, images, leaves, work.ignored, tuple(started), nonfinite, passengers
    )


class _Work:
    """A plan in the making: leaves that have an origin, tensors that have a reason to be ignored, and problems by kind."""

    def __init__(self, config: ModelConfig, rows: Mapping[str, set[int]]):
        self.config, self.rows = config, rows
        self.tree: dict[str, jax.ShapeDtypeStruct] = by_path(abstract_params(config))
        self.leaves: dict[str, Leaf] = {}
        self.ignored: dict[str, str] = {}
        self.problems: dict[str, dict[str, None]] = {}

    def problem(self, kind: str, what: str) -> None:
        self.problems.setdefault(kind, {})[what] = None

    def raise_problems(self, sources: list[Source]) -> None:
        if not self.problems:
            return
        lines = []
        for kind, names in self.problems.items():
            more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{kind} ({len(names)}): {', '.join([*names][:_SHOWN])}{more}")
        kinds = "; ".join(f"{source.title} read as {source.layout.title}" for source in sources)
        raise UserError(f"these weights do not fit ({kinds}); nothing was written. " + "; ".join(lines))

    def take(self, source: Source, skipped: Mapping[str, str]) -> list[str]:
        """Adds the leaves from a source, except those in ``skipped`` (path → reason). Returns the source's tensors that this model does not use."""
        tensors, vision, text = source.checkpoint.tensors, self.config.vision, self.config.text
        known: set[str] = set(source.token_rows)
        unused = {rule.source: "follows the last block, and is not used" for rule in source.layout.unused}
        for rule in source.layout.rules:
            is_vision = rule.target.startswith("vision/")
            used, all_layers = (0, 0) if vision is None else (vision.num_used_layers, vision.num_layers)
            names = rule.sources(used if is_vision else text.num_layers)
            known.update(names)
            if is_vision:
                behind = rule.sources(all_layers)[len(names) :]
                unused |= dict.fromkeys(behind, "follows the last block that is used")
            if rule.target in skipped:
                self.ignored |= {name: skipped[rule.target] for name in names if name in tensors}
            elif rule.target not in self.tree:
                for name in names:
                    if name in tensors and text.tied and rule.target in _TIED:
                        self._take_tied(source, rule, tensors[name])
                    elif name in tensors:
                        self.problem("not in the model", name)
            elif absent := [name for name in names if name not in tensors and not source.may_lack(name)]:
                for name in absent:
                    self.problem("missing", name)
            elif rule.target in self.leaves:
                self.problem("duplicate", f"{rule.target} comes from {source.title} and from another source")
            else:
                first = self.config.leading_layers if "/lora_" in rule.target else 0
                entries = [tensors.get(name) for name in names[first:]]
                start = text.base_vocab_size if rule.rows == "added" else 0
                fits = [self._fits(rule, entry) for entry in entries if entry and not start]
                if all(fits):
                    self.leaves[rule.target] = source_leaf(rule.target, self.tree[rule.target], rule, entries, start)
            if rule.target in _TIED.values() and text.tied and source.unties and names[0] in tensors:
                self.problem("trained apart from the LM head, to which it is tied", names[0])
        for name in tensors:
            if name not in known and name not in unused:
                reason = next((rule.why for rule in source.layout.ignored if rule.matches(name)), None)
                if reason is None:
                    self.problem("unknown", name)
                else:
                    unused[name] = reason
        unused = {name: why for name, why in unused.items() if name in tensors}
        self.ignored |= unused
        return list(unused)

    def _take_tied(self, source: Source, rule: NameRule, head: TensorEntry) -> None:
        """An LM head in the files of a model that ties it to the embedding: it must have the same values."""
        path = _TIED[rule.target]
        table = next(each for each in source.layout.rules if each.target == path)
        embedding = source.checkpoint.tensors.get(table.source)
        if embedding is None:
            self.problem("trained apart from the embedding, to which it is tied", head.name)
        elif embedding.shape != head.shape:
            self.problem(
                "misshaped", f"{head.name} is {head.shape}, the embedding to which it is tied {embedding.shape}"
            )
        else:
            self.ignored[head.name] = "the same as the embedding, to which it is tied"
            if path in self.leaves:
                start = self.config.text.base_vocab_size if rule.rows == "added" else 0
                twin = source_leaf(path, self.tree[path], table, [head], start)
                self.leaves[path] = same(self.leaves[path], twin)

    def _fits(self, rule: NameRule, entry: TensorEntry) -> bool:
        target = self.tree[rule.target]
        expected = rule.transform.source_shape(tuple(target.shape[1:] if rule.stacked else target.shape))
        if rule.rows == "base":
            allowed, found = self.rows[rule.target.split("/")[1]], entry.shape[0] if entry.shape else 0
            expected = (found if found in allowed else max(allowed), *expected[1:])
        if entry.shape != expected:
            self.problem("misshaped", f"{entry.name} is {entry.shape}, expected {expected}")
        elif entry.dtype not in _FLOATING:
            self.problem("not floating point", f"{entry.name} is {entry.dtype}")
        else:
            return True
        return False


class Rounded(NamedTuple):
    """A source tensor whose values its leaf's dtype cannot hold exactly."""

    source: Source
    name: str
    path: str
    dtype: np.dtype
    """The leaf's."""


def rounded(plan: Conversion) -> Iterator[Rounded]:
    """Source tensors that are rounded in the result."""
    base = plan.config.text.base_vocab_size
    for source in plan.sources:
        for name, entry in source.checkpoint.tensors.items():
            if ids := source.token_rows.get(name):
                # Rows of new tokens stay in float32.
                path = _TABLES[row_module(name)] if any(id < base for id in ids) else None
            else:
                # An adapter's tensor may have the same name as the one that it replaces.
                reason = plan.ignored.get(name)
                read = reason is None or (source.is_adapter and reason == _REPLACED)
                place = source.layout.locate(name) if read else None
                path = place[0].target if place else None
            leaf = plan.leaves.get(path) if path else None
            if path and leaf and leaf.dtype.itemsize > 1 and np.promote_types(entry.dtype, leaf.dtype) != leaf.dtype:
                yield Rounded(source, name, path, leaf.dtype)

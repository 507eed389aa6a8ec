"""The plan of a conversion: sources, the configuration that they imply, and for each leaf of the parameter tree where
its values come from.

A plan reads headers only. It is complete or it raises: every tensor of every source feeds a leaf or is ignored by a
rule with a reason, and every leaf has exactly one origin of the right shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import DType, ModelConfig, TextConfig, VisionConfig
from chatpose_jax.models.heads import create_head
from chatpose_jax.models.projector import Projector
from chatpose_jax.models.vision import VisionTower
from chatpose_jax.processing.conversation import POSE
from chatpose_jax.weights.layouts import Layout, Rule, Transform, recognise
from chatpose_jax.weights.readers import PROJECTOR_FILES, Checkpoint, Index, TensorEntry, open_checkpoint
from chatpose_jax.weights.tokens import Tokens, new_tokens, read_tokens

_FLOATING = {np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_SHOWN = 8
"""How many names of each kind of problem an error shows."""
PARTS = ("vision", "projector", "decoder", "pose_head")


@dataclasses.dataclass(frozen=True)
class Source:
    """One checkpoint and what it is."""

    checkpoint: Checkpoint
    layout: Layout

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.checkpoint.tensors.items()}

    @property
    def title(self) -> str:
        """How errors and reports call it."""
        return self.checkpoint.folder.name or str(self.checkpoint.folder)


def open_sources(
    path: str | Path,
    *,
    vision: str | Path | None = None,
    projector: str | Path | None = None,
    layout: str | None = None,
) -> list[Source]:
    """The main checkpoint first, then what stands beside it: a projector of its own (found in the folder, or given),
    CLIP (given).

    Args:
        path: folder or file of the main checkpoint.
        vision: folder or file of CLIP, for layouts without a vision tower.
        projector: file of the projector, for layouts without one.
        layout: one of ``layouts.FAMILIES``; ``None`` recognises it by tensor names.

    Raises:
        UserError: what ``open_checkpoint`` raises, or tensors of no known layout.
    """
    path = Path(path)
    sources = [_source(path, layout)]
    if projector is None and "projector" not in sources[0].layout.parts and path.is_dir():
        projector = next((path / name for name in PROJECTOR_FILES if (path / name).is_file()), None)
    if projector is not None:
        sources.append(_source(Path(projector), "llava_projector"))
    if vision is not None:
        sources.append(_source(Path(vision), "clip"))
    return sources


def _source(path: Path, family: str | None) -> Source:
    checkpoint = open_checkpoint(path)
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    try:
        return Source(checkpoint, recognise(shapes, family))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# -------------------------------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """tokens: as the source has them. added: literals that the written tokenizer gets. pose_is_new: the pose token is
    one of them."""

    tokens: Tokens
    added: tuple[str, ...]
    pose_token_id: int
    rows: int
    """Rows of the embedding in the result."""

    @property
    def pose_is_new(self) -> bool:
        return self.tokens.pose_token_id is None


def infer_config(
    sources: Sequence[Source], tokenizer: str | Path | None = None, *, dtype: DType | None = None
) -> tuple[ModelConfig, Vocabulary]:
    """The configuration that the sources' ``config.json``, tensor shapes and tokenizer imply.

    Args:
        sources: from ``open_sources``.
        tokenizer: folder with the tokenizer; default the main source's.
        dtype: dtype of the base, stored and computed in; default the one that most of the main source is stored in
            (float64 becomes float32).

    Raises:
        UserError: a setting that the model cannot follow, or files that contradict each other.
    """
    settings: dict[str, Any] = {}
    for source in sources:
        try:
            found = source.layout.settings(source.checkpoint.config(), source.shapes)
        except UserError as error:
            raise UserError(f"{source.checkpoint.folder}: {error}") from None
        settings = found | settings
    main = sources[0].checkpoint
    if "text" not in settings:
        raise UserError(
            f"{main.folder}: {sources[0].layout.title}: no language model in it; give the checkpoint that has one first"
        )
    rows = embedding_rows(sources[0])
    flat = main.config() | (main.config().get("text_config") or {})
    ids: dict[str, Any] = {
        name: int(flat[name])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if isinstance(flat.get(name), int)
    }
    ids = {name: id for name, id in ids.items() if id >= 0}
    image_token_id = settings.get("image_token_id", -200)
    vocabulary = _vocabulary(read_tokens(tokenizer or main.folder), rows, image_token_id, ids.get("pad_token_id", 0))
    param_dtype = dtype or cast(DType, "float32" if main.dtype == np.float64 else main.dtype.name)
    vision = settings.get("vision", VisionConfig())
    config = ModelConfig(
        vision=dataclasses.replace(vision, select_layer=settings.get("select_layer", vision.select_layer)),
        text=TextConfig(vocab_size=vocabulary.rows, base_vocab_size=vocabulary.tokens.base_size, **settings["text"]),
        lora=None,
        pose_token_id=vocabulary.pose_token_id,
        image_token_id=image_token_id,
        dtype=param_dtype,
        param_dtype=param_dtype,
        **ids,
    )
    return config, vocabulary


def _vocabulary(tokens: Tokens, rows: int, image_token_id: int, pad_token_id: int) -> Vocabulary:
    if tokens.base_size > rows or tokens.size > rows:
        raise UserError(
            f"{tokens.folder}: the tokenizer has {tokens.size} tokens, the embedding {rows} rows; this tokenizer "
            f"belongs to another checkpoint"
        )
    special = {
        id: literal
        for id, literal in ((image_token_id, "<image>"), (pad_token_id, "<pad>"))
        if tokens.size <= id < rows
    }
    first_free = max([tokens.size, *(id + 1 for id in special)])
    pose = tokens.pose_token_id if tokens.pose_token_id is not None else first_free
    added = new_tokens(tokens, special | {pose: POSE}, max([pose, first_free - 1]))
    return Vocabulary(tokens, tuple(added), pose, max(rows, pose + 1))


# --------------------------------------------------------------------------------------------------------------- leaves


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree, not yet read. ``read(index)`` gives any box of it (slices of step 1) in
    ``dtype``."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray] = dataclasses.field(repr=False)
    split_axis: int = 0
    """The axis along which boxes are contiguous in the source file."""
    stacked: bool = False
    origin: Callable[[Index], tuple[str, int]] = dataclasses.field(default=lambda index: ("", 0), repr=False)
    """Where a box begins: file and byte."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, limit: int, chunk: tuple[int, ...]) -> Iterator[Index]:
        """Boxes that cover the leaf in the source's order, of at most about ``limit`` bytes, each a whole number of
        ``chunk``s.
        """
        axis = self.split_axis % len(self.shape)
        layer_bytes = self.nbytes // (self.shape[0] if self.stacked else 1)
        step = max(limit * self.shape[axis] // layer_bytes // chunk[axis], 1) * chunk[axis]
        layers = range(0, self.shape[0], chunk[0]) if self.stacked else (0,)
        for layer in layers:
            for start in range(0, self.shape[axis], step):
                box = [slice(0, n) for n in self.shape]
                box[axis] = slice(start, min(start + step, self.shape[axis]))
                if self.stacked:
                    box[0] = slice(layer, layer + chunk[0])
                yield tuple(box)


def _source_leaf(
    path: str, target: jax.ShapeDtypeStruct, rule: Rule, entries: Sequence[TensorEntry], row_start: int
) -> Leaf:
    shape = tuple(target.shape[1:] if rule.stacked else target.shape)
    dtype = np.dtype(target.dtype)

    def read_layer(entry: TensorEntry, index: Index, out: np.ndarray) -> None:
        def read(box: Index) -> np.ndarray:
            rows = slice(box[0].start + row_start, box[0].stop + row_start) if row_start else box[0]
            return entry.read((rows, *box[1:]))

        _copy(out, rule.transform.read(read, shape, index))

    def read(index: Index) -> np.ndarray:
        index = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, target.shape, strict=True))
        out = np.empty([part.stop - part.start for part in index], dtype)
        if rule.stacked:
            for slot, layer in enumerate(range(index[0].start, index[0].stop)):
                read_layer(entries[layer], index[1:], out[slot])
        else:
            read_layer(entries[0], index, out)
        return out

    axis = -1 if rule.transform is not Transform.SAME else int(rule.stacked)

    def origin(index: Index) -> tuple[str, int]:
        entry = entries[index[0].start if rule.stacked else 0]
        return str(entry.file), entry.offset + (index[axis].start + row_start) * (entry.nbytes // entry.shape[0])

    return Leaf(path, tuple(target.shape), dtype, read, axis, rule.stacked, origin)


def _array_leaf(path: str, array: np.ndarray) -> Leaf:
    return Leaf(path, array.shape, array.dtype, lambda index: array[index])


def _copy(out: np.ndarray, source: np.ndarray) -> None:
    """``out[...] = source``; a transposed matrix in blocks that stay in the cache, up to nine times as fast as whole, and no
    copying through the slow loops of custom float types."""
    if out.dtype == source.dtype:
        word = np.dtype(f"u{out.dtype.itemsize}")
        out, source = out.view(word), source.T.view(word).T if source.flags.f_contiguous else source.view(word)
    if source.ndim != 2 or source.flags.c_contiguous:
        out[...] = source
        return
    for column in range(0, source.shape[1], 16):
        for row in range(0, source.shape[0], 4096):
            out[row : row + 4096, column : column + 16] = source[row : row + 4096, column : column + 16]


# ------------------------------------------------------------------------------------------------------------- the plan


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do. ``ignored`` maps source tensors to the reason; ``fresh`` names what no
    source gave."""

    config: ModelConfig
    sources: tuple[Source, ...]
    vocabulary: Vocabulary
    leaves: Mapping[str, Leaf]
    ignored: Mapping[str, str]
    fresh: tuple[str, ...]

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
) -> Plan:
    """Checks everything and plans; see ``convert.convert`` for the arguments. Raises one UserError that lists every
    problem."""
    if unknown := sorted(set(init_missing) - {"vision", "projector", "pose_head"}):
        raise UserError(f"--init-missing {unknown[0]!r}: expected vision, projector or pose_head")
    config, vocabulary = infer_config(sources, tokenizer, dtype=dtype)
    tree: dict[str, jax.ShapeDtypeStruct] = flatten_dict(abstract_params(config), sep="/")
    provided = {part for source in sources for part in source.layout.parts}
    fresh_parts = set(init_missing)
    if pose_head == "init" or "pose_head" not in provided:
        fresh_parts.add("pose_head")

    problems = _Problems()
    leaves: dict[str, Leaf] = {}
    ignored: dict[str, str] = {}
    for source in sources:
        _plan_source(source, config, tree, fresh_parts, leaves, ignored, problems)
    for part in sorted(fresh_parts):
        for path, array in initial(part, config, seed).items():
            leaves[path] = _array_leaf(path, array)
    for part in PARTS:
        if part not in provided | fresh_parts:
            option = f"--{part} FOLDER" if part in ("vision", "projector") else "another source"
            problems.add("parts without a source", f"{part} (give {option}, or --init-missing {part})")
    problems.raise_if_any(sources)

    fresh = sorted(fresh_parts)
    if vocabulary.rows > embedding_rows(sources[0]):
        fresh.append("pose token rows: mean of the others")
        _append_rows(leaves, tree, sources[0], config.text.base_vocab_size)
    return Plan(config, tuple(sources), vocabulary, {path: leaves[path] for path in tree}, ignored, tuple(fresh))


def embedding_rows(source: Source) -> int:
    """Rows of the embedding that the source holds."""
    rule = next(rule for rule in source.layout.rules if rule.target == "decoder/embed_tokens/embedding")
    return source.checkpoint.tensors[rule.source].shape[0]


def initial(part: str, config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Fresh weights of one part, by path, as training would start it."""
    makers: dict[str, Callable[[nnx.Rngs], Any]] = {
        "vision": lambda rngs: VisionTower(config, rngs=rngs),
        "projector": lambda rngs: Projector(config, rngs=rngs),
        "pose_head": lambda rngs: create_head(config.head, config.text.hidden_size, rngs=rngs),
    }
    state = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(makers[part](nnx.Rngs(key)))))(jax.random.key(seed))
    return {f"{part}/{path}": np.asarray(leaf) for path, leaf in flatten_dict(state, sep="/").items()}


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
    fresh_parts: set[str],
    leaves: dict[str, Leaf],
    ignored: dict[str, str],
    problems: _Problems,
) -> None:
    tensors = source.checkpoint.tensors
    known: set[str] = set()
    for rule in source.layout.rules:
        part = rule.target.split("/")[0]
        layers = config.vision.num_used_layers if part == "vision" else config.text.num_layers
        names = rule.sources(layers)
        if part == "vision" and rule.stacked:
            for name in rule.sources(config.vision.num_layers)[layers:]:
                known.add(name)
                if name in tensors:
                    ignored[name] = "follows the last block that feeds the projector"
        known.update(names)
        if part in fresh_parts:
            ignored.update({name: f"{part} is initialised afresh" for name in names if name in tensors})
            continue
        absent = [name for name in names if name not in tensors]
        target = tree.get(rule.target)
        if absent or target is None:
            for name in absent:
                if name not in problems.found.get("missing", ()):
                    problems.add("missing", name)
            continue
        if rule.target in leaves:
            problems.add("duplicate", f"{rule.target} comes from {source.title} and from another source")
            continue
        fits = [_fits(rule, target, tensors[name], source, problems) for name in names if rule.rows != "added"]
        if all(fits):
            start = config.text.base_vocab_size if rule.rows == "added" else 0
            leaves[rule.target] = _source_leaf(rule.target, target, rule, [tensors[name] for name in names], start)
    for name in tensors:
        if name in known:
            continue
        reason = next((rule.why for rule in source.layout.ignored if rule.matches(name)), None)
        if reason is None:
            problems.add("unknown", name)
        else:
            ignored[name] = reason


def _fits(rule: Rule, target: jax.ShapeDtypeStruct, entry: TensorEntry, source: Source, problems: _Problems) -> bool:
    expected = rule.transform.source_shape(tuple(target.shape[1:] if rule.stacked else target.shape))
    if rule.rows == "base":
        expected = (embedding_rows(source), *expected[1:])
    if entry.shape != expected:
        problems.add("misshaped", f"{entry.name} is {entry.shape}, expected {expected}")
    elif entry.dtype not in _FLOATING:
        problems.add("not floating point", f"{entry.name} is {entry.dtype}")
    else:
        return True
    return False


def _append_rows(leaves: dict[str, Leaf], tree: Mapping[str, jax.ShapeDtypeStruct], source: Source, base: int) -> None:
    """Gives the new token rows their values: the mean over the source's rows, the neutral start for a token that
    nothing has trained."""
    for rule in source.layout.rules:
        if rule.rows != "added":
            continue
        entry = source.checkpoint.tensors[rule.source]
        rows, width = entry.shape
        total = np.zeros(width, np.float64)
        for row in range(0, rows, 4096):
            block = entry.read((slice(row, min(row + 4096, rows)), slice(0, width)))
            total += block.astype(np.float32).sum(0, dtype=np.float64)
        stored = entry.read((slice(base, rows), slice(0, width))).astype(np.float32)
        count = rule.transform.source_shape(tuple(tree[rule.target].shape))[0] - len(stored)
        mean = np.repeat((total / rows).astype(np.float32)[None], count, axis=0)
        array = rule.transform.forward(np.concatenate([stored, mean]))
        leaves[rule.target] = _array_leaf(rule.target, np.ascontiguousarray(array))

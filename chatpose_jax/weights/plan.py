"""The plan of a conversion: sources, the configuration that they imply, and for each leaf of the parameter tree where
its values come from.

A plan reads headers only. It is complete or it raises: every tensor of every source feeds a leaf or is ignored by a
rule with a reason, and every leaf has exactly one origin of the right shape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import DType, HeadConfig, LoRAConfig, ModelConfig, TextConfig, VisionConfig
from chatpose_jax.models.heads import create_head
from chatpose_jax.models.projector import Projector
from chatpose_jax.models.vision import VisionTower
from chatpose_jax.processing.conversation import POSE
from chatpose_jax.weights.adapters import TOKEN_ROWS
from chatpose_jax.weights.layouts import Rule, Transform
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.readers import Index, TensorEntry
from chatpose_jax.weights.sources import Source, open_adapter, open_sources
from chatpose_jax.weights.tokens import TOKENIZER_FILES, Tokens, new_tokens, read_tokens

__all__ = ["PARTS", "Leaf", "Plan", "Source", "initial", "make_plan", "open_adapter", "open_sources"]

_FLOATING = {np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_SPARE_ROWS = 1024
"""How many rows an embedding may have without a token, to be of a round size."""
_SHOWN = 8
"""How many names of each kind of problem an error shows."""
PARTS = ("vision", "projector", "decoder", "pose_head")


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
        stored = source.checkpoint.config()
        if not stored and not source.is_adapter and any(name.endswith("embed_tokens.weight") for name in source.shapes):
            raise UserError(
                f"{source.checkpoint.folder}: no config.json beside the weights; heads, norm and rotary settings cannot be read off the tensors: "
                "fetch it from where the weights came from"
            )
        try:
            found = source.layout.settings(stored, source.shapes)
        except UserError as error:
            raise UserError(f"{source.checkpoint.folder}: {error}") from None
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{source.checkpoint.folder}: config.json holds a setting of the wrong kind ({error}); fetch it again"
            ) from None
        settings = settings | found if source.is_adapter else found | settings
    main = sources[0].checkpoint
    if "text" not in settings:
        raise UserError(
            f"{main.folder}: {sources[0].layout.title}: no language model in it; give the checkpoint that has one first"
        )
    rows = embedding_rows(sources)
    nested = main.config().get("text_config")
    nested = {name: value for name, value in nested.items() if value is not None} if isinstance(nested, dict) else {}
    flat = main.config() | nested
    ids: dict[str, Any] = {
        name: int(flat[name])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if isinstance(flat.get(name), int)
    }
    ids = {name: id for name, id in ids.items() if id >= 0}
    image_token_id = settings.get("image_token_id", -200)
    tokens = read_tokens(tokenizer or _tokenizer_folder(sources))
    if rows > tokens.size + _SPARE_ROWS:
        raise UserError(
            f"{tokens.folder}: the tokenizer has {tokens.size} tokens, the embedding {rows} rows, far more; this tokenizer "
            "belongs to another checkpoint"
        )
    listed = [id for source in sources for ids in source.token_rows.values() for id in ids]
    if listed and max(listed) >= max(rows, tokens.size) + len(listed):
        raise UserError(
            f"the adapter has a row for token {max(listed)}, the embedding has {rows} rows and the tokenizer {tokens.size} "
            "tokens; the adapter belongs to another base"
        )
    vocabulary = _vocabulary(
        tokens, max([rows, *(id + 1 for id in listed)]), image_token_id, ids.get("pad_token_id", 0)
    )
    param_dtype = dtype or cast(DType, "float32" if main.dtype == np.float64 else main.dtype.name)
    vision = settings.get("vision", VisionConfig())
    config = ModelConfig(
        vision=dataclasses.replace(vision, select_layer=settings.get("select_layer", vision.select_layer)),
        text=TextConfig(vocab_size=vocabulary.rows, base_vocab_size=vocabulary.tokens.base_size, **settings["text"]),
        lora=_lora(sources),
        head=settings.get("head", HeadConfig()),
        pose_token_id=vocabulary.pose_token_id,
        image_token_id=image_token_id,
        dtype=param_dtype,
        param_dtype=param_dtype,
        **ids,
    )
    return config, vocabulary


def _lora(sources: Sequence[Source]) -> LoRAConfig | None:
    found = [source for source in sources if source.lora is not None]
    if len(found) > 1:
        raise UserError(
            f"{found[0].title} and {found[1].title} both hold adapters, this model holds one set; "
            "merge one of them in PyTorch first (merge_and_unload)"
        )
    return found[0].lora if found else None


def _tokenizer_folder(sources: Sequence[Source]) -> Path:
    """An adapter's where it has one: it knows the tokens that were added for it."""
    folders = [source.checkpoint.folder for source in sources if source.is_adapter]
    has = (folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES[:2]))
    return next(has, sources[0].checkpoint.folder)


def _vocabulary(tokens: Tokens, rows: int, image_token_id: int, pad_token_id: int) -> Vocabulary:
    if tokens.base_size > rows or tokens.size > rows:
        raise UserError(
            f"{tokens.folder}: the tokenizer has {tokens.size} tokens, the embedding {rows} rows; this tokenizer "
            f"belongs to another checkpoint"
        )
    named = [(image_token_id, "<image>"), (pad_token_id, "<pad>")]
    if image_token_id == tokens.base_size:
        # transformers' own conversion of LLaVA puts both behind the base vocabulary; not every config.json names the second.
        named.insert(0, (image_token_id + 1, "<pad>"))
    special = {id: literal for id, literal in named if tokens.size <= id < rows}
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

    def blocks(self, limit: int, chunk: tuple[int, ...], span: Index | None = None) -> Iterator[Index]:
        """Boxes that cover ``span`` (default: the leaf) in the source's order, of at most about ``limit`` bytes, each a whole
        number of ``chunk``s from the span's start.
        """
        span = span if span is not None else tuple(slice(0, n) for n in self.shape)
        axis = self.split_axis % len(self.shape)
        layer_bytes = self.nbytes // (self.shape[0] if self.stacked else 1)
        step = max(limit * self.shape[axis] // layer_bytes // chunk[axis], 1) * chunk[axis]
        for layers in _pieces(span[0], chunk[0]) if self.stacked else (span[0],):
            for part in _pieces(span[axis], step):
                box = [layers, *span[1:]]
                box[axis] = part
                yield tuple(box)


def _pieces(whole: slice, step: int) -> list[slice]:
    return [slice(start, min(start + step, whole.stop)) for start in range(whole.start, whole.stop, step)]


def _source_leaf(
    path: str, target: jax.ShapeDtypeStruct, rule: Rule, entries: Sequence[TensorEntry], row_start: int
) -> Leaf:
    shape = tuple(target.shape[1:] if rule.stacked else target.shape)
    dtype = np.dtype(target.dtype)

    def read_layer(entry: TensorEntry, index: Index, out: np.ndarray) -> None:
        def read(box: Index) -> np.ndarray:
            rows = slice(box[0].start + row_start, box[0].stop + row_start) if row_start else box[0]
            return entry.read((rows, *box[1:]), borrowed=True)

        copy_array(out, rule.transform.read(read, shape, index))
        demand_finite_cast(entry.name, out, entry.dtype)

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


def copy_array(out: np.ndarray, source: np.ndarray) -> None:
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


def demand_finite_cast(name: str, out: np.ndarray, stored: np.dtype) -> None:
    """Raises UserError where ``out``, cast from ``stored``, has values that float16 cannot hold."""
    if out.dtype == np.float16 and stored != np.float16 and not np.isfinite(out).all():
        raise UserError(f"{name}: values beyond float16, which ends at 65504; choose --dtype bfloat16 or float32")


# ------------------------------------------------------------------------------------------------------------- the plan


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do. ``ignored`` maps source tensors to the reason; ``fresh`` names what no
    source gave; ``passengers`` are the ignored tensors that ride along, by layout."""

    config: ModelConfig
    sources: tuple[Source, ...]
    vocabulary: Vocabulary
    leaves: Mapping[str, Leaf]
    ignored: Mapping[str, str]
    fresh: tuple[str, ...]
    passengers: Mapping[str, Mapping[str, TensorEntry]] = dataclasses.field(default_factory=dict)

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
    tree: dict[str, jax.ShapeDtypeStruct] = by_path(abstract_params(config))
    provided = {part for source in sources for part in source.layout.parts}
    fresh_parts = set(init_missing)
    if pose_head == "init" or "pose_head" not in provided:
        fresh_parts.add("pose_head")

    problems = _Problems()
    leaves: dict[str, Leaf] = {}
    ignored: dict[str, str] = {}
    passengers: dict[str, dict[str, TensorEntry]] = {}
    replaced = {path for source in sources if source.is_adapter for path in source.targets}
    if any(path.startswith("pose_head/") for path in replaced):  # whatever kind of head the base has
        replaced |= {path for source in sources for path in source.targets if path.startswith("pose_head/")}
    for source in sources:
        skipped = dict.fromkeys(() if source.is_adapter else replaced, "the adapter brings its own")
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
            leaves[path] = _array_leaf(path, array)
    for part in PARTS:
        if part not in provided | fresh_parts:
            option = f"--{part} FOLDER" if part in ("vision", "projector") else "another source"
            problems.add("parts without a source", f"{part} (give {option}, or --init-missing {part})")
    problems.raise_if_any(sources)

    fresh = sorted(fresh_parts)
    if vocabulary.pose_is_new and vocabulary.rows > embedding_rows(sources):
        fresh.append("pose token rows: mean of the others")
    _append_rows(leaves, tree, sources, config.text)
    for source in sources:
        _replace_rows(leaves, source, config.text)
    leaves = {path: leaves[path] for path in tree}
    return Plan(config, tuple(sources), vocabulary, leaves, ignored, tuple(fresh), passengers)


def embedding_rows(sources: Sequence[Source]) -> int:
    """Rows of the embedding that the sources hold; an adapter's embedding replaces the base's."""
    held = [
        math.prod(source.checkpoint.tensors[rule.source].shape[:1])  # a scalar is found misshaped later
        for source in sources
        for rule in source.layout.rules
        if rule.target == "decoder/embed_tokens/embedding" and rule.source in source.checkpoint.tensors
    ]
    return held[-1]


def table_rows(sources: Sequence[Source], base: int) -> dict[str, set[int]]:
    """How many rows the table of ``embed_tokens``, and of ``lm_head``, may have: as many as the embedding, or as all tokens that have a
    row anywhere; down to ``base`` where an adapter lists what is missing (``trainable_token_indices``)."""
    listed: dict[str, set[int]] = {"embed_tokens": set(), "lm_head": set()}
    for source in sources:
        for name, ids in source.token_rows.items():
            listed.setdefault(_module(name), set()).update(ids)
    held = embedding_rows(sources)
    every = max([held, *(id + 1 for rows in listed.values() for id in rows)])
    allowed = {}
    for module, rows in listed.items():
        shortest = every
        while shortest > base and shortest - 1 in rows:
            shortest -= 1
        allowed[module] = {held, *range(shortest, every + 1)}
    return allowed


def _module(token_rows: str) -> str:
    """``embed_tokens`` or ``lm_head``, of the name of a tensor that replaces rows of one."""
    return token_rows.removesuffix(TOKEN_ROWS).rsplit(".", 1)[-1]


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
        absent = [name for name in names if name not in tensors]
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
        fits = [_fits(rule, target, tensors[name], rows, problems) for name in names if rule.rows != "added"]
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
        leaves[rule.target] = _array_leaf(rule.target, np.ascontiguousarray(array))


def _replace_rows(leaves: dict[str, Leaf], source: Source, text: TextConfig) -> None:
    """Lays the rows that an adapter has trained over those of the vocabulary, base and added."""
    for name, ids in source.token_rows.items():
        entry = source.checkpoint.tensors[name]
        module = _module(name)
        if module not in ("embed_tokens", "lm_head") or entry.shape[1:] != (text.hidden_size,):
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

    return dataclasses.replace(leaf, read=read)

"""Rows of the vocabulary tables: their number, missing rows, and rows that an adapter has trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import TextConfig
from chatpose_jax.weights.adapters import row_module
from chatpose_jax.weights.infer import embedding_rows
from chatpose_jax.weights.leaves import Leaf, array_leaf
from chatpose_jax.weights.readers import Index, bounded
from chatpose_jax.weights.sources import Source


def allowed_rows(sources: Sequence[Source], base: int) -> dict[str, set[int]]:
    """The numbers of rows that the tables ``embed_tokens`` and ``lm_head`` may have: that of the embedding, or that of all tokens that have a row
    anywhere. A table may have fewer rows, down to ``base``, if an adapter lists the missing ones (``trainable_token_indices``).
    """
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


def append_rows(leaves: dict[str, Leaf], sources: Sequence[Source], text: TextConfig) -> None:
    """Fills missing rows of a table with the mean of the others, a neutral start for an untrained token."""
    tables = {
        rule.target: (rule.transform, source.checkpoint.tensors[rule.source])
        for source in sources
        for rule in source.layout.rules
        if rule.rows == "added" and rule.target in leaves and rule.source in source.checkpoint.tensors
    }
    for path, (transform, entry) in tables.items():
        rows, width = entry.shape
        if rows == text.vocab_size:
            continue
        total = np.zeros(width, np.float64)
        for row in range(0, rows, 4096):
            block = entry.read((slice(row, min(row + 4096, rows)), slice(0, width)))
            total += block.astype(np.float32).sum(0, dtype=np.float64)
        stored = entry.read((slice(text.base_vocab_size, rows), slice(0, width))).astype(np.float32)
        mean = np.repeat((total / rows).astype(np.float32)[None], text.num_added_tokens - len(stored), axis=0)
        leaves[path] = array_leaf(path, np.ascontiguousarray(transform.forward(np.concatenate([stored, mean]))))


def replace_rows(leaves: dict[str, Leaf], source: Source, text: TextConfig) -> None:
    """Replaces rows of the vocabulary, base and added, by those that an adapter has trained."""
    for name, ids in source.token_rows.items():
        entry, module = source.checkpoint.tensors[name], row_module(name)
        tables = {"embed_tokens": ("embedding", 0), "lm_head": ("kernel", 1)}
        if module not in tables or entry.shape[1:] != (text.hidden_size,):
            raise UserError(
                f"{source.title}: {name} is {entry.shape}; expected rows of {text.hidden_size} for embed_tokens or lm_head: "
                "the adapter belongs to another base"
            )
        if text.tied and module == "lm_head":
            raise UserError(
                f"{source.title}: {name} has rows of the LM head, which is tied to the embedding in this base; expected rows of embed_tokens "
                "only, which PEFT uses for both"
            )
        base, axis = tables[module]
        for kind, first in ((base, 0), ("added", text.base_vocab_size)):
            path = f"decoder/{module}/{kind}"
            rows = {id - first: row for row, id in enumerate(ids) if 0 <= id - first < leaves[path].shape[axis]}
            if rows:
                leaves[path] = _overlaid(leaves[path], entry.read(), rows, axis)


def _overlaid(leaf: Leaf, values: np.ndarray, rows: Mapping[int, int], axis: int) -> Leaf:
    """The leaf with ``values[row]`` at position ``place`` of ``axis``, for each place and row of ``rows``."""

    def read(index: Index) -> np.ndarray:
        out = np.array(leaf.read(index))
        box = bounded(index, leaf.shape)
        turned = out if axis == 0 else out.T
        for place, row in rows.items():
            if box[axis].start <= place < box[axis].stop:
                turned[place - box[axis].start] = values[row, box[1 - axis]].astype(leaf.dtype)
        return out

    return dataclasses.replace(leaf, read=read, names=())

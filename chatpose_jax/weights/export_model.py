"""The parameters of a model folder as tensors with torch's names and shapes. Each is read block by block while it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.settings import one_line
from chatpose_jax.storage import Location
from chatpose_jax.weights import pose_head
from chatpose_jax.weights.arrays import Stored
from chatpose_jax.weights.folder import PARAMS
from chatpose_jax.weights.leaves import copy_array, demand_finite_cast
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.table import NameRule
from chatpose_jax.weights.tokens import Tokens
from chatpose_jax.weights.writers import Tensor, row_blocks


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """What an export writes.

    weights: file name without suffix → tensors. json_files: file name → content. notes: for the user. new_tokens: tokens that the tokenizer gets in
    addition.
    """

    weights: Mapping[str, Sequence[Tensor]]
    json_files: Mapping[str, Any]
    notes: Sequence[str]
    new_tokens: Sequence[str] = ()

    __repr__ = one_line


class StoredModel:
    """Reads the parameters of a model folder box by box, as weights of the base with the adapters merged or left out."""

    def __init__(self, folder: Location, config: ModelConfig, tokens: Tokens, passengers: Path, merge: bool):
        """passengers: the folder of that name on a disk; see ``storage.local``."""
        self.folder, self.config, self.tokens, self.passengers = folder, config, tokens, passengers
        self.stored = Stored(folder / PARAMS)
        self.shapes = {
            path: leaf.shape for path, leaf in by_path(abstract_params(config.replace(scan_layers=True))).items()
        }
        absent = [path for path, shape in self.shapes.items() if 0 not in shape and path not in self.stored.shapes]
        wrong = [path for path in self.stored.shapes if self.stored.shapes[path].shape != self.shapes.get(path)]
        if absent or wrong:
            raise UserError(
                f"{folder}: params/ and config.json disagree at {', '.join((absent + wrong)[:6])}; copy the folder again"
            )
        self.merged = merge and config.lora is not None

    @property
    def pose_token(self) -> str:
        """The text of the pose token. Raises UserError if the tokenizer has no token of its id."""
        found = [text for text, id in self.tokens.added.items() if id == self.config.pose_token_id]
        if not found:
            raise UserError(
                f"{self.tokens.folder}: no token has the id {self.config.pose_token_id}, the pose_token_id of config.json; copy the folder again"
            )
        return found[0]

    def read(self, path: str, layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        """A box of a leaf, or of one of its rows of layers: as stored, or in float32 if it is dequantised or merged."""
        at = () if layer is None else (layer,)
        values = self.stored.read(path, (*at, *index))
        parent = path.removesuffix("/kernel")
        if parent != path:
            values = self._dequantized(values, parent, at, *index)
        row = -1 if layer is None else layer - self.first_layer(f"{parent}/lora_a")
        if self.merged and parent != path and f"{parent}/lora_a" in self.shapes and row >= 0:
            assert self.config.lora is not None
            a = self.stored.read(f"{parent}/lora_a", (row, index[0]))
            b = self.stored.read(f"{parent}/lora_b", (row, slice(None), index[1]))
            values = values.astype(np.float32) + np.float32(self.config.lora.scale) * (a @ b)
        return values

    def _dequantized(
        self, codes: np.ndarray, parent: str, at: tuple[int, ...], rows: slice, columns: slice
    ) -> np.ndarray:
        """The values of a box of a quantised kernel; those of any other kernel as they are."""
        if (scale := f"{parent}/kernel_scale") in self.shapes:
            return codes.astype(np.float32) * self.stored.read(scale, (*at, columns))
        if (scale := f"{parent}/group_scale") in self.shapes:
            size = self.shapes[f"{parent}/kernel"][-2] // self.shapes[scale][-2]
            first = rows.start // size
            groups = self.stored.read(scale, (*at, slice(first, -(-rows.stop // size)), columns))
            steps = np.repeat(groups.astype(np.float32), size, axis=0)[rows.start - first * size :]
            return codes.astype(np.float32) * steps[: len(codes)]
        return codes

    def first_layer(self, path: str) -> int:
        """The layer to which the first row of a stacked leaf belongs."""
        return self.config.leading_layers if "/lora_" in path else 0

    def tensors(self, rules: Sequence[NameRule], dtype: Any, more_rows: int = 0) -> list[Tensor]:
        """The tensors that ``rules`` describe, in the order of the layers.

        more_rows: number of rows to append to the embedding and the LM head, each the mean of the others.
        """
        grouped: dict[str, list[NameRule]] = {}
        rules = [rule for rule in rules if 0 not in self.shapes.get(rule.target, (0,))]
        for rule in rules:
            grouped.setdefault(rule.source, []).append(rule)
        found = []
        ends = [self.first_layer(rule.target) + self.shapes[rule.target][0] for rule in rules if rule.stacked]
        for layer in (None, *range(max(ends, default=0))):
            for source, group in grouped.items():
                if group[0].stacked != (layer is not None):
                    continue
                row = None if layer is None else layer - self.first_layer(group[0].target)
                if row is None or 0 <= row < self.shapes[group[0].target][0]:
                    extra = more_rows if group[0].rows == "base" else 0
                    found.append(self._tensor(source.replace("{i}", str(layer)), group, row, np.dtype(dtype), extra))
        return found

    def _tensor(
        self, name: str, rules: Sequence[NameRule], layer: int | None, dtype: np.dtype, more_rows: int
    ) -> Tensor:
        leaves = [self.shapes[rule.target][layer is not None :] for rule in rules]
        shapes = [rule.transform.source_shape(leaf) for rule, leaf in zip(rules, leaves)]
        rows = sum(shape[0] for shape in shapes)

        def blocks() -> Iterator[np.ndarray]:
            total = np.zeros(shapes[0][1:], np.float64)
            for rule, leaf, shape in zip(rules, leaves, shapes):
                axis = rule.transform.row_axis % len(leaf)
                chunk = self.stored.chunk(rule.target)[layer is not None :][axis]
                for box in row_blocks(shape, max(dtype.itemsize, 4), chunk):
                    index = tuple(box[0] if i == axis else slice(0, n) for i, n in enumerate(leaf))
                    values = rule.transform.inverse(self.read(rule.target, layer, index))
                    out = np.empty(values.shape, dtype)
                    copy_array(out, values)
                    demand_finite_cast(name, out, values)
                    if more_rows:
                        total += out.astype(np.float32).sum(0, dtype=np.float64)
                    yield out
            if more_rows:
                yield np.repeat((total / rows).astype(np.float32)[None], more_rows, 0).astype(dtype)

        return Tensor(name, dtype, (rows + more_rows, *shapes[0][1:]), blocks)


def head_weights(model: StoredModel) -> dict[str, Sequence[Tensor]]:
    """The tensors of ``pose_head.safetensors``, under the file's name without suffix."""
    paths = [path for path in model.shapes if path.startswith("pose_head/")]
    stem = pose_head.WEIGHTS.removesuffix(".safetensors")
    return {stem: model.tensors(pose_head.rules(model.config.head, paths), np.float32)}

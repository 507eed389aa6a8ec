"""States of the leading layers, kept in host memory: where nothing before the first adapter trains, a row has the same ones in every epoch.

They are kept for each conversation by what it contains. The state of a token depends on the tokens and images before it in its conversation, not on
padding, nor on other rows or other conversations of a packed row. So it does not matter in which batch a conversation comes again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from chatpose_jax.models.chatpose import bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.sharding import on_mesh
from chatpose_jax.train import feed
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.trainable import Flat, trains_before_adapters, unflatten


def not_kept(model: ModelConfig, config: TrainConfig, params: Mapping[str, Any], epoch: int, tokens: int) -> str | None:
    """Why a run does not keep states; None if it does.

    params: of the model, or their abstract shapes, layers stacked. epoch: its steps. tokens: of all training data.
    """
    needed = -(-tokens * model.text.hidden_size * (4 if model.dtype == "float32" else 2) >> 20)
    if not model.leading_layers:
        return "every layer has adapters (model.lora.last_layers)"
    if path := trains_before_adapters(params, config.trainable):
        return f"{path} trains, on which they depend: freeze it in train.trainable where it need not train"
    if config.steps <= epoch:
        return "every row comes once"
    if needed > config.keep_states_mib:
        return f"they take {needed} MiB, more than train.keep_states_mib={config.keep_states_mib}"
    if jax.process_count() > 1:
        return "a row comes to another process in each epoch"
    return None


class KeptStates:
    """A function from a batch to the same batch with ``led``, the states after the leading layers, and without pixels, which nothing else needs."""

    def __init__(self, model: ModelConfig, config: TrainConfig, frozen: Flat, mesh: Mesh | None):
        """frozen: in the layout of ``model``; everything that the leading layers need."""
        self._model, self._mesh, self._size, self._frozen = model, mesh, config.batch_size, frozen
        self._held: dict[bytes, np.ndarray] = {}
        self._free = config.keep_states_mib << 20

        def lead(frozen: Flat, batch: Mapping[str, Any]) -> jax.Array:
            with on_mesh(mesh):
                return bind(model, unflatten(frozen)).lead(**batch)

        self._lead = jax.jit(lead)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """batch: the rows of all micro-batches, as the loader gives them, each padded on the right."""
        ids = batch["input_ids"]
        keys = [list(self._conversations(batch, row)) for row in range(len(ids))]
        led = np.zeros((*ids.shape, self._model.text.hidden_size), np.dtype(self._model.dtype))
        for first in range(0, len(ids), self._size):
            rows = range(first, first + self._size)
            new = {}
            if any(key not in self._held for row in rows for _, key in keys[row]):
                states = self._states(batch, slice(first, first + self._size))
                new = {key: states[row - first, span] for row in rows for span, key in keys[row]}
            for row in rows:
                for span, key in keys[row]:
                    led[row, span] = self._held[key] if key in self._held else new[key]
            for key, value in new.items():
                if key not in self._held and value.nbytes <= self._free:
                    self._held[key] = value.copy()
                    self._free -= value.nbytes
        return {**{name: value for name, value in batch.items() if name != "pixel_values"}, "led": led}

    def _states(self, batch: Mapping[str, Any], rows: slice) -> np.ndarray:
        names = ("input_ids", "segment_ids", "pixel_values")
        part = {name: batch[name][rows] for name in names if name in batch}
        return np.asarray(self._lead(self._frozen, feed.put(part, self._mesh, self._size)))

    def _conversations(self, batch: Mapping[str, Any], row: int) -> Iterator[tuple[slice, bytes]]:
        """The conversations of a row: their places, and hashes of their tokens and images."""
        ids, images = batch["input_ids"][row], 0
        length = int(np.count_nonzero(batch["attention_mask"][row]))
        segments = batch["segment_ids"][row, :length] if "segment_ids" in batch else np.zeros(length, np.int32)
        ends = [*(np.flatnonzero(np.diff(segments)) + 1).tolist(), length]
        for begin, end in zip([0, *ends], ends):
            own = ids[begin:end]
            digest = hashlib.blake2b(own.tobytes(), digest_size=16)
            count = int(np.count_nonzero(own == self._model.image_token_id)) // max(self._model.image_tokens, 1)
            for image in range(images, images + count):
                digest.update(batch["pixel_values"][row, image].tobytes())
            images += count
            yield slice(begin, end), digest.digest()

"""The JAX side of ``verify``: the converted folder, in float32."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chatpose_jax.models.attention import attention
from chatpose_jax.models.chatpose import bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.decoder import rotary
from chatpose_jax.models.heads.base import States
from chatpose_jax.processing.processor import Processor
from chatpose_jax.storage import Location
from chatpose_jax.weights.arrays import Stored
from chatpose_jax.weights.folder import PARAMS, TOKENIZER
from chatpose_jax.weights.paths import nested


class JaxModel:
    """The converted folder, run by the model's own modules in float32. Inputs and outputs are NumPy arrays."""

    def __init__(self, folder: Location, config: ModelConfig):
        self.processor = Processor.load(folder / TOKENIZER, config)
        self.config = config.replace(dtype="float32", param_dtype="float32", scan_layers=True)
        text = dataclasses.replace(config.text, num_layers=1)
        self.width = 0 if config.vision is None else config.vision.hidden_size
        lora = None if config.lora is None else dataclasses.replace(config.lora, last_layers=None)
        self.single = self.config.replace(text=text, lora=lora, scan_layers=False)
        self.stored = Stored(folder / PARAMS)

    def _run(self, parts: Sequence[str], call: Any, *args: Any) -> np.ndarray:
        """Runs ``call(model, *args)``; only the named parts of the model are read."""
        params: dict[str, np.ndarray] = {}
        for part in parts:
            params |= {path: self._float(self.stored.read(path)) for path in self.stored.under(part)}
        with jax.default_matmul_precision("highest"):
            return np.asarray(
                jax.jit(lambda params, *args: call(bind(self.config, nested(params)), *args))(params, *args)
            )

    @staticmethod
    def _float(array: np.ndarray) -> np.ndarray:
        return array if jnp.issubdtype(array.dtype, jnp.integer) else array.astype(np.float32)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Image tokens for the decoder: (I, H, W, 3) -> (I·N, D)."""
        return self._run(("vision", "projector"), lambda model, x: model.encode_images(x)[0], pixels[None])

    def tower(self, pixels: np.ndarray) -> np.ndarray:
        """Image features before the projector: (I, H, W, 3) -> (I·N, D)."""
        return self._run(("vision",), lambda model, x: model.vision(x), pixels).reshape(-1, self.width)

    def embed(self, ids: np.ndarray, features: np.ndarray | None) -> np.ndarray:
        rows = None if features is None else features[None]
        return self._run(("decoder/embed_tokens",), lambda model, ids: model.embed(ids[None], rows)[0], ids)

    def layer(self, number: int) -> Any:
        """A function (T, D) -> (T, D)."""
        prefix, leading = "decoder/layers/", self.config.leading_layers
        rows = {path: number - leading if "/lora_" in path else number for path in self.stored.under(prefix)}
        single = self.single.replace(lora=None) if number < leading else self.single
        params = {
            path.replace(prefix, f"{prefix}0/", 1): self._float(self.stored.read(path, row))
            for path, row in rows.items()
            if row >= 0
        }

        def run(x: np.ndarray) -> np.ndarray:
            with jax.default_matmul_precision("highest"):
                return np.asarray(_layer(single, params, x))

        return run

    def norm(self, x: np.ndarray) -> np.ndarray:
        return self._run(("decoder/norm",), lambda model, x: model.decoder.norm(x), x)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        table = "decoder/embed_tokens" if self.config.text.tied else "decoder/lm_head"
        return self._run((table,), lambda model, x: model.logits(x), hidden)

    def poses(self, hidden: np.ndarray) -> np.ndarray:
        return self._run(
            ("pose_head",), lambda model, x: model.poses(States(x[None]), jax.random.key(0)).rotations[0], hidden
        )


@functools.partial(jax.jit, static_argnums=0)
def _layer(config: ModelConfig, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    model = bind(config, nested(params))
    length = x.shape[0]
    angles = rotary(jnp.arange(length)[None], config.text)
    mask = jnp.tri(length, dtype=bool)[None]
    y, _ = model.decoder.layers[0](x[None], angles, functools.partial(attention, mask=mask))
    return y[0]

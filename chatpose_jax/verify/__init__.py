"""The proof of a conversion: the same prompts through PyTorch and through JAX, compared stage by stage.

The torch side is built from ``transformers``' LLaMA and CLIP modules and plain torch, over the source's files as PyTorch's
own readers give them and over the source's own ``config.json`` and ``adapter_config.json``: of this package it uses the
names under which a layout keeps its parts, and the sizes and the dtype that the conversion arrived at. The JAX side is the
converted folder and the model that runs everywhere else. Both compute in float32, and both hold one decoder layer at a time,
so a model of any size fits.

LLaVA loads its base in one dtype, the decoder's, however a CLIP beside it is stored; so does the conversion, and so does
torch here. Where the conversion has another than the decoder's, torch keeps what is stored, and rounding shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.processing.images import load_image
from chatpose_jax.processing.processor import Encoded
from chatpose_jax.settings import one_line
from chatpose_jax.verify.jax_model import JaxModel
from chatpose_jax.verify.torch_model import TorchModel
from chatpose_jax.weights.folder import load_model_config, read_folder
from chatpose_jax.weights.plan import PARTS
from chatpose_jax.weights.sources import Source, open_sources
from chatpose_jax.weights.spec import SourceSpec

TEXT_PROMPT = "Show me someone who kneels."
IMAGE_PROMPT = "How does this person stand?"
_WHOLE = 1_500_000_000
"""Decoder parameters up to which all layers run by default; larger models are sampled."""
_SAMPLE = 3
_POSE_SLACK = 10.0
"""Gram-Schmidt of two columns enlarges what differs in them, the more the smaller the angle between them."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One stage of one prompt: the largest magnitude on the torch side, and the differences between the two sides."""

    prompt: str
    stage: str
    largest: float
    maximum: float
    mean: float
    slack: float = 1.0
    """What the stage itself makes of differences before it: as often the tolerance is allowed."""

    @property
    def relative(self) -> float:
        """The largest difference over the largest value (over 1 where values are smaller)."""
        return self.maximum / max(self.largest, 1.0)

    def within(self, tolerance: float) -> bool:
        return self.relative <= tolerance * self.slack  # false for NaN

    @classmethod
    def of(cls, prompt: str, stage: str, expected: Any, found: Any, slack: float = 1.0) -> Difference:
        expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
        if expected.shape != found.shape:
            raise UserError(f"{stage}: torch gives {expected.shape}, JAX {found.shape}; these are two different models")
        delta = np.abs(expected - found)
        return cls(prompt, stage, float(np.abs(expected).max()), float(delta.max()), float(delta.mean()), slack)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation, encoded once for both sides; ``pixels`` (I, H, W, 3)."""

    name: str
    encoded: Encoded
    picture: Image.Image | None = None

    __repr__ = one_line

    @property
    def ids(self) -> np.ndarray:
        return self.encoded.input_ids

    @property
    def pixels(self) -> np.ndarray | None:
        return np.stack(self.encoded.images) if self.encoded.images else None


class Comparison(NamedTuple):
    """What ``verify`` finds. stages: in the order of the model, computed as they are taken. left_out: parts of the converted folder
    that nothing given here holds, or that torch cannot run, so that they are not compared."""

    stages: Iterator[Difference]
    left_out: tuple[str, ...]


def verify(
    source: SourceSpec | str | Path,
    converted: str | Path,
    *,
    layers: int | None = None,
    prompts: Sequence[str] = (),
    images: Sequence[str | Path] = (),
) -> Comparison:
    """Runs prompts through both sides, and compares stage by stage.

    With all layers, each side carries its own hidden states to the end. With a sample of them, every layer gets torch's
    states on both sides, so a fault shows in the layer that has it.

    Args:
        source: as ``convert`` took it. Only files, ``lora_alpha``, ``layout``, ``head`` and ``image_fit`` matter here.
        converted: the model folder that ``convert`` wrote.
        layers: how many decoder layers run, spread from the first to the last; default all, or 3 of a large model.
        prompts: texts to ask; default one.
        images: pictures, each asked about in a prompt of its own; default two of noise, a wide and a tall one.

    Raises:
        UserError: torch or transformers' torch modules are not installed; files that cannot be read; two models of
            different shapes.
    """
    spec, folder = SourceSpec.of(source), Path(converted)
    sources, config = open_sources(spec), load_model_config(folder, spec.head)
    peer, ours = TorchModel(sources, config, spec), JaxModel(folder, config)
    left_out = _uncompared(sources, folder)
    if not peer.poses_known and any("pose_head" in source.layout.parts for source in sources):
        left_out.append("pose_head")
    side = config.vision.image_size
    spoken = [*prompts] or [TEXT_PROMPT]
    shown: list[Any] = [*images] or [_noise(side, 3 * side), _noise(2 * side + 1, side)]
    batch = [_encode(peer, ours, f"text {i + 1}", text) for i, text in enumerate(spoken)]
    if peer.sees:
        batch += [_encode(peer, ours, f"image {i + 1}", IMAGE_PROMPT, image) for i, image in enumerate(shown)]
    return Comparison(_stages(peer, ours, batch, _sample(config, layers)), tuple(left_out))


def _stages(peer: TorchModel, ours: JaxModel, batch: Sequence[Prompt], chosen: Sequence[int]) -> Iterator[Difference]:
    sampled = len(chosen) < ours.config.text.num_layers
    states = []
    for prompt in batch:
        features = expected = None
        if prompt.pixels is not None:
            seen = peer.pixels(prompt.picture)[None]
            yield Difference.of(prompt.name, "pixels", seen, prompt.pixels)
            expected, features = peer.features(seen), ours.features(prompt.pixels)
            if peer.projects:
                yield Difference.of(prompt.name, "image features", expected, features)
            else:  # the conversion has made a projector up: from there on both sides go on with what it gives
                yield Difference.of(prompt.name, "vision tower", expected, ours.tower(prompt.pixels))
                expected = features
        states.append((peer.embed(prompt.ids, expected), ours.embed(prompt.ids, features)))
        yield Difference.of(prompt.name, "embeddings", *states[-1])
    for layer in chosen:
        run_peer, run_ours = peer.layer(layer), ours.layer(layer)
        for number, (prompt, (expected, found)) in enumerate(zip(batch, states)):
            if sampled:
                found = expected
            states[number] = run_peer(expected), run_ours(found)
            yield Difference.of(prompt.name, f"layer {layer}", *states[number])
    for prompt, (expected, found) in zip(batch, states):
        if sampled:
            found = expected
        hidden = peer.norm(expected), ours.norm(found)
        yield Difference.of(prompt.name, "final norm", *hidden)
        logits = peer.logits(hidden[0])
        yield Difference.of(prompt.name, "logits", logits, ours.logits(hidden[1])[:, : logits.shape[1]])
        if peer.poses_known and len(prompt.encoded.pose_positions):
            before = prompt.encoded.pose_positions - 1
            matrices = peer.poses(hidden[0][before]), ours.poses(hidden[1][before])
            yield Difference.of(prompt.name, "poses", *matrices, slack=_POSE_SLACK)


def _sample(config: ModelConfig, layers: int | None) -> list[int]:
    count, text = config.text.num_layers, config.text
    if layers is None:
        size = count * (4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size)
        layers = count if size <= _WHOLE else _SAMPLE
    if not 1 <= layers <= count:
        raise UserError(f"--layers {layers}: the decoder has {count} layers; expected 1 to {count}")
    return sorted({round(place) for place in np.linspace(0, count - 1, layers)})


def _uncompared(sources: Sequence[Source], converted: Path) -> list[str]:
    """Parts that the conversion neither finds in these sources nor has made up itself."""
    made_up = read_folder(converted).get("provenance", {}).get("initialised", [])
    here = {part for source in sources for part in source.layout.parts}
    return [part for part in PARTS if part not in {*here, *made_up}]


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _encode(peer: TorchModel, ours: JaxModel, name: str, text: str, image: Any = None) -> Prompt:
    image = None if image is None else load_image(image)  # opened alike for both sides, prepared by each
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    # A source without a row for the pose token cannot be asked for what follows one.
    answer = "It is <POSE>." if ours.config.pose_token_id < peer.rows else "It is this."
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [*content, {"type": "text", "text": text}]},
        {"role": "assistant", "content": answer},
    ]
    return Prompt(name, ours.processor.encode(messages, add_generation_prompt=False), image)

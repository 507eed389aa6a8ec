"""Verification of a conversion: the same prompts through PyTorch and through JAX, compared stage by stage.

The torch side uses the modules that ``transformers`` has for the language model and the vision tower, its tokenizers, and plain torch. PyTorch's own
readers load the source's files; the settings come from the source's own ``config.json`` and ``adapter_config.json``. From this package it takes only
the families and the tensor names of the layout, and the sizes and the dtype of the conversion. The JAX side is the converted folder in the model that
chat and training use. Both compute in float32 and hold one decoder layer at a time, so a model of any size fits.

LLaVA loads its base in one dtype, the decoder's, whatever the dtype of its CLIP files. The conversion and the torch side do the same. If the
conversion has another dtype than the decoder's, torch keeps the stored one, and the comparison shows the rounding.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.processing.images import load_image
from chatpose_jax.processing.processor import Encoded
from chatpose_jax.processing.tokenizer import TOKENIZER_FILES
from chatpose_jax.settings import one_line
from chatpose_jax.storage import Location, location
from chatpose_jax.verify.jax_model import JaxModel
from chatpose_jax.verify.torch_model import TorchModel
from chatpose_jax.verify.torch_tokens import CONVERSATIONS, TEXTS, TorchTokens
from chatpose_jax.weights.folder import load_model_config, read_folder
from chatpose_jax.weights.infer import tokenizer_source
from chatpose_jax.weights.plan import PARTS
from chatpose_jax.weights.sources import Source, open_sources
from chatpose_jax.weights.spec import SourceSpec

TEXT_PROMPT = "Show me someone who kneels."
IMAGE_PROMPT = "How does this person stand?"
_WHOLE = 1_500_000_000
"""Largest number of decoder parameters for which all layers run by default. Of larger models a sample of layers runs."""
_SAMPLE = 3
_POSE_SLACK = 10.0
"""Gram-Schmidt of two columns amplifies differences; a small angle between the columns amplifies them more."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One stage of one prompt: the largest magnitude on the torch side, and the differences between the two sides."""

    prompt: str
    stage: str
    largest: float
    maximum: float
    mean: float
    slack: float = 1.0
    """Factor on the tolerance: how much the stage itself may amplify the differences of earlier stages."""

    @property
    def relative(self) -> float:
        """The largest difference divided by the largest value, or by 1 if that is smaller."""
        return self.maximum / max(self.largest, 1.0)

    def within(self, tolerance: float) -> bool:
        return self.relative <= tolerance * self.slack  # false for NaN

    @classmethod
    def of(cls, prompt: str, stage: str, expected: Any, found: Any, slack: float = 1.0) -> Difference:
        expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
        if expected.shape != found.shape:
            raise UserError(
                f"{stage}: torch gives {expected.shape}, JAX {found.shape}; the source and the folder are different models"
            )
        delta = np.abs(expected - found)
        return cls(prompt, stage, float(np.abs(expected).max()), float(delta.max()), float(delta.mean()), slack)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation that is encoded once for both sides. pixels: (I, H, W, 3)."""

    name: str
    encoded: Encoded
    image: Image.Image | None = None

    __repr__ = one_line

    @property
    def ids(self) -> np.ndarray:
        return self.encoded.input_ids

    @property
    def pixels(self) -> np.ndarray | None:
        return np.stack(self.encoded.images) if self.encoded.images else None


class Comparison(NamedTuple):
    """The result of ``verify``.

    stages: in the order of the model; each is computed when it is taken.
    left_out: parts of the converted folder that are not compared, because no given source has them or torch cannot run them.
    quantize: ``model.quantize`` of the folder. Unless "none", the projections of the source's layers are rounded to the same codes, and what that
        costs does not show.
    """

    stages: Iterator[Difference]
    left_out: tuple[str, ...]
    quantize: str = "none"


def verify(
    source: SourceSpec | str | Path,
    converted: str | os.PathLike[str],
    *,
    layers: int | None = None,
    prompts: Sequence[str] = (),
    images: Sequence[str | Path] = (),
) -> Comparison:
    """Runs prompts through both sides and compares them stage by stage.

    With all layers, each side uses its own hidden states to the end. With a sample of layers, every layer gets torch's hidden states on both
    sides, so a difference shows in the layer that causes it.

    Args:
        source: the source that ``convert`` read. Only files, ``lora_alpha``, ``layout``, ``backbone``, ``head``, ``image_fit`` and
            whether a template was chosen are used here.
        converted: the model folder that ``convert`` wrote.
        layers: number of decoder layers to run, spread from the first to the last; default: all, or 3 of a large model.
        prompts: texts to ask; by default one.
        images: images, each asked about in its own prompt; by default two of noise, a wide and a tall one.

    Raises:
        UserError: torch or transformers' torch modules are not installed, files cannot be read, or the two models have
            different shapes.
    """
    spec, folder = SourceSpec.of(source), location(converted)
    sources, config = open_sources(spec), load_model_config(folder, spec.head)
    peer, ours = TorchModel(sources, config, spec), JaxModel(folder, config)
    left_out = _uncompared(sources, folder, config)
    if not peer.poses_known and any("pose_head" in source.layout.parts for source in sources):
        left_out.append("pose_head")
    side = config.image_size
    spoken = [*prompts] or [TEXT_PROMPT]
    shown: list[Any] = [*images] or [_noise(side, 3 * side), _noise(2 * side + 1, side)]
    batch = [_encode(peer, ours, f"text {i + 1}", text) for i, text in enumerate(spoken)]
    if peer.sees:
        batch += [_encode(peer, ours, f"image {i + 1}", IMAGE_PROMPT, image) for i, image in enumerate(shown)]
    tokens = _tokens(ours, sources, spec)
    stages = itertools.chain(tokens, _stages(peer, ours, batch, _sample(config, layers)))
    return Comparison(stages, tuple(left_out), config.quantize)


def _tokens(ours: JaxModel, sources: Sequence[Source], spec: SourceSpec) -> list[Difference]:
    """Ids of texts, and of conversations by the source's chat template: how many differ. Empty if no tokenizer lies beside the weights.

    Of a tokenizer in LLaMA's layout only texts are compared, because programs disagree about the space beside a control token. A template that was
    chosen with ``--template`` is not compared.
    """
    folder = Path(spec.tokenizer) if spec.tokenizer else tokenizer_source(sources).checkpoint.folder
    if not folder.is_dir() or not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        return []
    peer, processor = TorchTokens(folder), ours.processor
    found = [
        _unequal(f"tokens {number}", "text", peer.text(text), processor.tokenizer.encode(text))
        for number, text in enumerate(TEXTS, 1)
    ]
    if spec.template is not None or spec.ignore_chat_template or processor.tokenizer.spaced:
        return found
    for number, messages in enumerate(CONVERSATIONS, 1):
        if (expected := peer.conversation(messages)) is not None:
            ids = processor.encode(messages).input_ids.tolist()
            found.append(_unequal(f"tokens {number}", "conversation", expected, ids))
    return found


def _unequal(prompt: str, stage: str, expected: Sequence[int], found: Sequence[int]) -> Difference:
    """The number of ids that differ, as a difference of numbers that must be 0."""
    wrong = sum(a != b for a, b in itertools.zip_longest(expected, found))
    return Difference(prompt, stage, 1.0, float(wrong), wrong / max(len(expected), 1))


def _stages(peer: TorchModel, ours: JaxModel, batch: Sequence[Prompt], chosen: Sequence[int]) -> Iterator[Difference]:
    sampled = len(chosen) < ours.config.text.num_layers
    states = []
    for prompt in batch:
        features = expected = None
        if prompt.pixels is not None:
            seen = peer.pixels(prompt.image)[None]
            yield Difference.of(prompt.name, "pixels", seen, prompt.pixels)
            expected, features = peer.features(seen), ours.features(prompt.pixels)
            if peer.projects:
                yield Difference.of(prompt.name, "image features", expected, features)
            else:  # the conversion initialised the projector: from here both sides use its output
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


def _uncompared(sources: Sequence[Source], converted: Location, config: ModelConfig) -> list[str]:
    """Parts of the conversion that neither come from these sources nor were initialised."""
    made_up = read_folder(converted).get("provenance", {}).get("initialised", [])
    here = {part for source in sources for part in source.layout.parts}
    absent = {"vision", "projector"} if config.vision is None else set()
    return [part for part in PARTS if part not in {*here, *made_up, *absent}]


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _encode(peer: TorchModel, ours: JaxModel, name: str, text: str, image: Any = None) -> Prompt:
    image = None if image is None else load_image(image)  # loaded once for both sides; each side preprocesses it
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    # A source without a row for the pose token cannot run the tokens after it.
    answer = "It is <POSE>." if ours.config.pose_token_id < peer.rows else "It is this."
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [*content, {"type": "text", "text": text}]},
        {"role": "assistant", "content": answer},
    ]
    return Prompt(name, ours.processor.encode(messages, add_generation_prompt=False), image)

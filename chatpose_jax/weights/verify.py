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

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from chatpose_jax.errors import UserError
from chatpose_jax.models.attention import attention
from chatpose_jax.models.chatpose import bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.decoder import rotary
from chatpose_jax.models.heads.base import States
from chatpose_jax.processing.images import load_image
from chatpose_jax.processing.processor import Encoded, Processor
from chatpose_jax.settings import one_line
from chatpose_jax.weights.adapters import TOKEN_ROWS
from chatpose_jax.weights.arrays import Stored
from chatpose_jax.weights.folder import PARAMS, TOKENIZER, load_config, read_folder
from chatpose_jax.weights.paths import nested
from chatpose_jax.weights.plan import PARTS
from chatpose_jax.weights.readers import TensorEntry
from chatpose_jax.weights.sources import Source, open_sources

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


def verify(
    source: str | Path,
    converted: str | Path,
    *,
    vision: str | Path | None = None,
    projector: str | Path | None = None,
    adapter: str | Path | None = None,
    lora_alpha: float | None = None,
    layout: str | None = None,
    layers: int | None = None,
    prompts: Sequence[str] = (),
    images: Sequence[str | Path] = (),
    image_fit: str | None = None,
    left_out: list[str] | None = None,
) -> Iterator[Difference]:
    """Runs prompts through both sides and yields what differs, stage by stage.

    With all layers, each side carries its own hidden states to the end. With a sample of them, every layer gets torch's
    states on both sides, so a fault shows in the layer that has it.

    Args:
        source, vision, projector, adapter, lora_alpha, layout, image_fit: as ``convert`` took them.
        converted: the model folder that ``convert`` wrote.
        layers: how many decoder layers run, spread from the first to the last; default all, or 3 of a large model.
        prompts: texts to ask; default one.
        images: pictures, each asked about in a prompt of its own; default two of noise, a wide and a tall one.
        left_out: takes what the conversion had from a source that is not given here, so that nothing can be compared.

    Raises:
        UserError: torch or transformers' torch modules are not installed; files that cannot be read; two models of
            different shapes.
    """
    sources = open_sources(
        source, vision=vision, projector=projector, adapter=adapter, lora_alpha=lora_alpha, layout=layout
    )
    config = load_config(converted)
    peer = _Torch(sources, config, lora_alpha, image_fit)
    peer.tensors.given = peer.base.given = {
        Path(file) for file in (source, vision, projector, adapter) if file is not None
    }
    if left_out is not None:
        left_out += _uncompared(sources, Path(converted))
        if any(target.startswith("pose_head/") for target in peer.where) and not peer.poses_known:
            left_out.append("pose_head")
    ours = _Jax(Path(converted), config)
    spoken = [*prompts] or [TEXT_PROMPT]
    side = config.vision.image_size
    shown: list[Any] = [*images] or [_noise(side, 3 * side), _noise(2 * side + 1, side)]
    chosen = _sample(config, layers)
    batch = [_encode(peer, ours, f"text {i + 1}", text) for i, text in enumerate(spoken)]
    if peer.sees:
        batch += [_encode(peer, ours, f"image {i + 1}", IMAGE_PROMPT, image) for i, image in enumerate(shown)]
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
            if len(chosen) < config.text.num_layers:
                found = expected
            states[number] = run_peer(expected), run_ours(found)
            yield Difference.of(prompt.name, f"layer {layer}", *states[number])
    for prompt, (expected, found) in zip(batch, states):
        if len(chosen) < config.text.num_layers:
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


def _encode(peer: _Torch, ours: _Jax, name: str, text: str, image: Any = None) -> Prompt:
    image = None if image is None else load_image(image)  # opened alike for both sides, prepared by each
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    # A source without a row for the pose token cannot be asked for what follows one.
    answer = "It is <POSE>." if ours.config.pose_token_id < peer.rows else "It is this."
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [*content, {"type": "text", "text": text}]},
        {"role": "assistant", "content": answer},
    ]
    return Prompt(name, ours.processor.encode(messages, add_generation_prompt=False), image)


# ---------------------------------------------------------------------------------------------------------------- torch


class _Torch:
    """The source, run by torch in float32. Arrays come and go as numpy."""

    def __init__(
        self, sources: Sequence[Source], config: ModelConfig, lora_alpha: float | None, image_fit: str | None = None
    ):
        try:
            import torch
            from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig
            from transformers.models.llama import modeling_llama
        except ImportError as error:
            raise UserError(
                f"chatpose verify compares with PyTorch, which is not here ({error}): pip install '.[torch]' in the checkout"
            ) from None
        self.torch, self.llama, self.clip = torch, modeling_llama, CLIPVisionModel
        self.config = config
        self.where: dict[str, tuple[Source, str]] = {
            rule.target: (source, rule.source) for source in sources for rule in source.layout.rules
        }
        self.sources = sources
        self.lora_alpha, self.image_fit = lora_alpha, image_fit
        # Layers come from the main checkpoint; an adapter may bring an embedding of its own.
        norm = next(rule.source for rule in sources[0].layout.rules if rule.target == "decoder/norm/scale")
        self.decoder = norm.removesuffix("norm.weight")
        self.tensors = _TorchTensors(torch)
        stored = self.tensors.stored(sources[0], f"{self.decoder}layers.0.self_attn.q_proj.weight").dtype
        self.base = _TorchTensors(torch, stored if stored == getattr(torch, config.param_dtype) else None)
        main = sources[0].checkpoint.config()
        text = {**(main.get("text_config") or main), "model_type": "llama"}
        # Sizes, as the tensors show them; a config.json may leave them out.
        for name in ("hidden_size", "intermediate_size", "num_layers"):
            text[name.replace("num_layers", "num_hidden_layers")] = getattr(config.text, name)
        self.text = LlamaConfig.from_dict(text)
        self.text._attn_implementation = "eager"
        self.sees = "vision/class_embedding" in self.where
        self.projects = "projector/fc1/kernel" in self.where
        self.poses_known = config.head.name == "mlp" and "pose_head/fc1/kernel" in self.where
        if self.sees:
            self.vision = CLIPVisionConfig.from_dict(self._vision_settings())
            self.vision._attn_implementation = "eager"

    @property
    def rows(self) -> int:
        """Rows of the source's embedding."""
        source, name = self.where["decoder/embed_tokens/embedding"]
        return source.checkpoint.tensors[name].shape[0]

    def _vision_settings(self) -> dict[str, Any]:
        settings = self.where["vision/class_embedding"][0].checkpoint.config()
        settings = settings.get("vision_config") or (settings if "patch_size" in settings else {})
        sizes = dataclasses.asdict(self.config.vision)
        named = {name: sizes[name] for name in ("hidden_size", "intermediate_size", "image_size", "patch_size")}
        counts = {"num_hidden_layers": sizes["num_layers"], "num_attention_heads": sizes["num_heads"]}
        return {**counts, **settings, **named, "model_type": "clip_vision_model"}

    def _prefix(self, target: str, suffix: str) -> tuple[Source, str]:
        source, name = self.where[target]
        return source, name.removesuffix(suffix)

    def _load(self, module: Any, source: Source, prefix: str) -> Any:
        """The module with its state read from under ``prefix``; a tensor that is not there is an error of torch."""
        state = {name: self.base(source, prefix + name) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.eval()

    def pixels(self, image: Any) -> np.ndarray:
        """(S, S, 3) of a picture, by transformers' image processor with the settings beside the vision tower; in LLaVA's own
        layout padded before that, where ``image_aspect_ratio`` says so."""
        import transformers

        main, tower = self.sources[0], self.where["vision/class_embedding"][0]
        folder, family = tower.checkpoint.folder, main.layout.family
        name = "CLIPImageProcessor"
        settings: dict[str, Any] = {}
        if any((folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
            with contextlib.suppress(OSError):  # a processor_config.json that says nothing of pictures
                settings, _ = transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict(
                    str(folder)
                )
        if not settings:
            settings = dict.fromkeys(("size", "crop_size"), self.config.vision.image_size)
        aspect = None
        if family in ("llava_original", "vicuna"):
            # An adapter's before its base's, as LLaVA's own code loads them.
            told = [source.checkpoint.config() for source in sorted(self.sources, key=lambda each: not each.is_adapter)]
            aspect = next((config["image_aspect_ratio"] for config in told if "image_aspect_ratio" in config), None)
        if settings.get("image_processor_type", "").startswith("Llava") and family != "chatpose":
            name = "LlavaImageProcessor"
        if self.image_fit is not None or family in ("llava_original", "vicuna", "chatpose"):
            name, aspect = "CLIPImageProcessor", self.image_fit or aspect
        kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)  # Pillow's, as in 4.x
        settings = {key: value for key, value in settings.items() if not key.endswith(("_type", "_class"))}
        if aspect == "pad":
            # The filling up of LLaVA's own code: around the picture, in the mean colour.
            side = max(image.size)
            colour = tuple(int(255 * channel) for channel in settings.get("image_mean", kind().image_mean))
            square = Image.new("RGB", (side, side), colour)
            square.paste(image, tuple((side - length) // 2 for length in image.size))
            image = square
        return kind(**settings)(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """(I, H, W, 3) -> (I·N, D), CLIP's chosen hidden states, through the projector where the source has one."""
        torch = self.torch
        source, prefix = self._prefix("vision/class_embedding", "embeddings.class_embedding")
        tower = self._clip(source, prefix)
        with torch.no_grad():
            images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
            x = tower.pre_layrnorm(tower.embeddings(images))
            for block in tower.encoder.layers[: self.config.vision.num_used_layers]:
                x = block(x, None)
                x = x[0] if isinstance(x, tuple) else x
            if not self.projects:
                return x[:, 1:].flatten(0, 1).numpy()
            x = self._linear("projector/fc1", x[:, 1:], self.base)
            return self._linear("projector/fc2", torch.nn.functional.gelu(x), self.base).flatten(0, 1).numpy()

    def _clip(self, source: Source, prefix: str) -> Any:
        tower = self.clip(self.vision)
        tower = getattr(tower, "vision_model", tower)  # transformers 5 has no such level
        unused = tuple(
            f"encoder.layers.{i}." for i in range(self.config.vision.num_used_layers, len(tower.encoder.layers))
        )
        names = [name for name in tower.state_dict() if not name.startswith(("post_layernorm", *unused))]
        tower.load_state_dict({name: self.base(source, prefix + name) for name in names}, strict=False)
        return tower.eval()

    def _linear(self, target: str, x: Any, tensors: _TorchTensors) -> Any:
        source, prefix = self._prefix(f"{target}/kernel", "weight")
        weight, bias = (tensors(source, prefix + name) for name in ("weight", "bias"))
        return self.torch.nn.functional.linear(x, weight, bias)

    def embed(self, ids: np.ndarray, features: np.ndarray | None) -> np.ndarray:
        """(T,) -> (T, D)."""
        table = self._rows("decoder/embed_tokens/embedding")
        is_image = ids == self.config.image_token_id
        x = table[self.torch.from_numpy(np.where(is_image, 0, ids)).long()].numpy()
        if features is not None:
            x[is_image] = features
        return x

    def layer(self, number: int) -> Any:
        """A function (T, D) -> (T, D)."""
        torch = self.torch
        with torch.device("meta"):
            module = self.llama.LlamaDecoderLayer(self.text, 0)
        module = self._load(module, self.sources[0], f"{self.decoder}layers.{number}.")
        self._adapt(module, number)
        rotary_embedding = self.llama.LlamaRotaryEmbedding(self.text)

        @torch.no_grad()
        def run(x: np.ndarray) -> np.ndarray:
            hidden = torch.from_numpy(x.copy())[None]
            places = torch.arange(len(x))[None]
            mask = torch.full((len(x), len(x)), torch.finfo(torch.float32).min).triu(1)[None, None]
            angles = rotary_embedding(hidden, places)
            y = module(hidden, attention_mask=mask, position_ids=places, position_embeddings=angles)
            return (y[0] if isinstance(y, tuple) else y).reshape(x.shape).numpy()

        return run

    def _adapt(self, module: Any, number: int) -> None:
        """Adds alpha / rank · B A to every adapted weight (Hu et al. 2021), alpha / √rank · B A where peft's settings say rsLoRA
        (Kalajdzievski 2023)."""
        for target, (source, name) in self.where.items():
            if not (target.startswith("decoder/layers/") and target.endswith("/lora_a")):
                continue
            first = name.replace("{i}", str(number))
            if first not in source.checkpoint.tensors:
                continue  # peft has adapters where its file has them
            a, b = (self.tensors(source, each) for each in (first, first.replace("lora_A", "lora_B")))
            settings = _peft_settings(source)
            alpha = settings["lora_alpha"] if self.lora_alpha is None else self.lora_alpha
            scale = alpha / len(a) ** (0.5 if settings.get("use_rslora") else 1.0)
            block, projection = target.split("/")[2:4]
            linear = getattr(getattr(module, {"attn": "self_attn"}.get(block, block)), projection)
            linear.weight.data = linear.weight.data + scale * (b @ a)

    def _rows(self, target: str) -> Any:
        """A vocabulary table, with the rows that an adapter replaces."""
        first = self.config.text.base_vocab_size  # tokens from here on are never rounded
        table = self.torch.cat([self.base(*self.where[target])[:first], self.tensors(*self.where[target])[first:]])
        module = target.split("/")[1]
        for source in self.sources:
            ids = _peft_settings(source).get("trainable_token_indices") or {}
            ids = ids.get(module, []) if isinstance(ids, dict) else ids if module == "embed_tokens" else []
            name = next((name for name in source.shapes if name.endswith(module + TOKEN_ROWS)), None)
            if name is not None:
                rounded, exact = self.base(source, name), self.tensors(source, name)
                for place, id in enumerate(ids):
                    if id < len(table):
                        table[id] = (rounded if id < first else exact)[place]
        return table

    def norm(self, x: np.ndarray) -> np.ndarray:
        source, prefix = self._prefix("decoder/norm/scale", "weight")
        norm = self._load(self.llama.LlamaRMSNorm(x.shape[-1], eps=self.text.rms_norm_eps), source, prefix)
        with self.torch.no_grad():
            return norm(self.torch.from_numpy(x)).numpy()

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """(T, D) -> (T, rows)."""
        return self.torch.nn.functional.linear(
            self.torch.from_numpy(hidden), self._rows("decoder/lm_head/kernel")
        ).numpy()

    def poses(self, hidden: np.ndarray) -> np.ndarray:
        """(P, D) -> (P, J, 3, 3): two linears, then Gram-Schmidt of two columns (Zhou et al. 2019, section B)."""
        functional = self.torch.nn.functional
        x = self._linear("pose_head/fc1", self.torch.from_numpy(hidden), self.tensors)
        x = self._linear("pose_head/fc2", functional.relu(x), self.tensors).unflatten(-1, (-1, 6))
        first = functional.normalize(x[..., :3], dim=-1)
        second = x[..., 3:] - (first * x[..., 3:]).sum(-1, keepdim=True) * first
        second = functional.normalize(second, dim=-1)
        return self.torch.stack([first, second, self.torch.linalg.cross(first, second)], dim=-1).numpy()


def _peft_settings(source: Source) -> dict[str, Any]:
    """``adapter_config.json`` as it stands there, not as the conversion understood it."""
    file = source.checkpoint.folder / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


class _TorchTensors:
    """Tensors of a source as float32, by PyTorch's own readers; files are mapped, not loaded. dtype: what they are rounded to first."""

    def __init__(self, torch: Any, dtype: Any = None):
        self.torch, self.dtype = torch, dtype
        self.mapped: dict[Path, Mapping[str, Any]] = {}
        self.given: set[Path] = set()

    def __call__(self, source: Source, name: str) -> Any:
        tensor = self.stored(source, name).detach()
        return (tensor if self.dtype is None else tensor.to(self.dtype)).float()

    def stored(self, source: Source, name: str) -> Any:
        """As it stands in the file."""
        entry = source.checkpoint.tensors.get(name)
        if entry is None:
            raise UserError(
                f"{source.title}: no tensor {name!r}, which torch's module has; this layout is not verified"
            )
        file = self._file(source, entry)
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                if entry.name not in opened.keys():  # noqa: SIM118
                    raise UserError(
                        f"{file}: no tensor {entry.name!r}, which {entry.file.name} has: two sets of weights"
                    )
                return opened.get_tensor(entry.name)
        if file not in self.mapped:
            state = self.torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            while entry.name not in state:  # the wrappers that the reader sees through
                state = next((state[key] for key in ("state_dict", "model", "module") if key in state), None)
                if state is None:
                    raise UserError(
                        f"{file}: no tensor {entry.name!r}, which {entry.file.name} has: two sets of weights"
                    )
            self.mapped[file] = state
        return self.mapped[file][entry.name]

    def _file(self, source: Source, entry: TensorEntry) -> Path:
        """The file that transformers would take the tensor from, in its own order; the reader's for what transformers has no
        name for (adapters, projectors, a file that was given)."""
        from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

        folder, files = source.checkpoint.folder, source.checkpoint.files
        if entry.file in self.given:
            return entry.file
        known = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        if not all(re.fullmatch(r"(pytorch_)?model(-\d+-of-\d+)?\.(bin|safetensors)", file.name) for file in files):
            return entry.file
        first = next((folder / name for name in known if (folder / name).is_file()), None)
        if first is None:
            return entry.file
        if first.suffix != ".json":
            return first
        held = json.loads(first.read_text(encoding="utf-8"))["weight_map"]
        return folder / held[entry.name] if entry.name in held else entry.file


# ------------------------------------------------------------------------------------------------------------------ JAX


class _Jax:
    """The converted folder, run by the model's own modules in float32. Arrays come and go as numpy."""

    def __init__(self, folder: Path, config: ModelConfig):
        self.processor = Processor.load(folder / TOKENIZER, config)
        self.config = config.replace(dtype="float32", param_dtype="float32", scan_layers=True)
        text = dataclasses.replace(config.text, num_layers=1)
        self.single = self.config.replace(text=text, scan_layers=False)
        self.stored = Stored(folder / PARAMS)

    def _run(self, parts: Sequence[str], call: Any, *args: Any) -> np.ndarray:
        """``call(model, *args)`` over a model of which only the named parts are read."""
        params: dict[str, np.ndarray] = {}
        for part in parts:
            params |= {path: self._float(self.stored.read(path)) for path in self.stored.under(part)}
        with jax.default_matmul_precision("highest"):
            return np.asarray(
                jax.jit(lambda params, *args: call(bind(self.config, nested(params)), *args))(params, *args)
            )

    @staticmethod
    def _float(array: np.ndarray) -> np.ndarray:
        return array if array.dtype == np.int8 else array.astype(np.float32)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """(I, H, W, 3) -> (I·N, D), as the decoder takes them."""
        return self._run(("vision", "projector"), lambda model, x: model.encode_images(x)[0], pixels[None])

    def tower(self, pixels: np.ndarray) -> np.ndarray:
        """(I, H, W, 3) -> (I·N, D), before the projector."""
        return self._run(("vision",), lambda model, x: model.vision(x), pixels).reshape(
            -1, self.config.vision.hidden_size
        )

    def embed(self, ids: np.ndarray, features: np.ndarray | None) -> np.ndarray:
        rows = None if features is None else features[None]
        return self._run(("decoder/embed_tokens",), lambda model, ids: model.embed(ids[None], rows)[0], ids)

    def layer(self, number: int) -> Any:
        """A function (T, D) -> (T, D)."""
        prefix = "decoder/layers/"
        params = {
            path.replace(prefix, f"{prefix}0/", 1): self._float(self.stored.read(path, number))
            for path in self.stored.under(prefix)
        }

        def run(x: np.ndarray) -> np.ndarray:
            with jax.default_matmul_precision("highest"):
                return np.asarray(_layer(self.single, params, x))

        return run

    def norm(self, x: np.ndarray) -> np.ndarray:
        return self._run(("decoder/norm",), lambda model, x: model.decoder.norm(x), x)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return self._run(("decoder/lm_head",), lambda model, x: model.logits(x), hidden)

    def poses(self, hidden: np.ndarray) -> np.ndarray:
        return self._run(
            ("pose_head",), lambda model, x: model.poses(States(x[None]), jax.random.key(0)).rotations[0], hidden
        )


@functools.partial(jax.jit, static_argnums=0)
def _layer(config: ModelConfig, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    model = bind(config, nested(params))
    length = x.shape[0]
    angles = rotary(jnp.arange(length)[None], config.text.head_dim, config.text.rope_theta)
    mask = jnp.tri(length, dtype=bool)[None]
    y, _ = model.decoder.layers[0](x[None], angles, functools.partial(attention, mask=mask))
    return y[0]

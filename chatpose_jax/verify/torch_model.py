"""The PyTorch side of ``verify``: the source's own files, in float32."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.quantize import QUANTIZATIONS, dequantize
from chatpose_jax.weights import pose_head
from chatpose_jax.weights.adapters import TOKEN_ROWS
from chatpose_jax.weights.readers import TensorEntry
from chatpose_jax.weights.sources import Source
from chatpose_jax.weights.spec import SourceSpec

_NOT_SETTINGS = ("model_type", "dtype", "torch_dtype")
"""Keys of a configuration that say nothing of what it computes."""


class TorchModel:
    """The source, run by torch in float32. Inputs and outputs are NumPy arrays."""

    def __init__(self, sources: Sequence[Source], config: ModelConfig, spec: SourceSpec):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"chatpose verify needs PyTorch, which is not installed ({error}): pip install '.[torch]' in the checkout"
            ) from None
        self.torch = torch
        self.config = config
        self.where: dict[str, tuple[Source, str]] = {
            rule.target: (source, rule.source)
            for source in sources
            for rule in source.layout.rules
            if rule.sources(1)[0] in source.checkpoint.tensors or "/lora_" in rule.target
        }
        self.sources, self.spec = sources, spec
        # Layers come from the main checkpoint; an adapter may have its own embedding.
        norm = next(rule.source for rule in sources[0].layout.rules if rule.target == "decoder/norm/scale")
        self.decoder = norm.removesuffix("norm.weight")
        self.tensors = _TorchTensors(torch, spec)
        stored = self.tensors.stored(sources[0], f"{self.decoder}layers.0.self_attn.q_proj.weight").dtype
        self.base = _TorchTensors(torch, spec, stored if stored == getattr(torch, config.param_dtype) else None)
        self.base.mapped = self.tensors.mapped
        language = sources[0].layout.language
        assert language is not None
        main = sources[0].checkpoint.config()
        # Sizes come from tensor shapes, because config.json may omit them.
        text = {
            **{name: value for name, value in (main.get("text_config") or main).items() if name not in _NOT_SETTINGS},
            **{name: getattr(config.text, name) for name in ("hidden_size", "intermediate_size")},
            "num_hidden_layers": config.text.num_layers,
        }
        self.text = transformers.AutoConfig.for_model(language.model_types[0], **text)
        self.text._attn_implementation = "eager"
        with torch.device("meta"):
            # One layer of the class that transformers has for this model; the weights of each layer are put into it.
            one = transformers.AutoModel.from_config(_shortened(self.text))
        self.block, self.final_norm, self.angles = one.layers[0], one.norm, type(one.rotary_emb)(self.text)
        self.sees = "vision/position_embedding" in self.where
        self.projects = "projector/fc1/kernel" in self.where
        self.poses_known = pose_head.rotation_of(config.head) == "6d" and "pose_head/fc1/kernel" in self.where
        if self.sees:
            self.vision = self._vision_config(main)
            self.tower_class = transformers.AutoModel

    @property
    def rows(self) -> int:
        """Number of rows of the source's embedding."""
        source, name = self.where["decoder/embed_tokens/embedding"]
        return source.checkpoint.tensors[name].shape[0]

    def _vision_config(self, main: Mapping[str, Any]) -> Any:
        """The configuration of the tower, with the layers up to the one that the source's settings select."""
        from transformers import AutoConfig

        source, tower = self.where["vision/position_embedding"][0], self.config.vision
        assert tower is not None and source.layout.tower is not None
        settings = source.checkpoint.config()
        settings = settings.get("vision_config") or (settings if "patch_size" in settings else {})
        sizes = dataclasses.asdict(tower)
        named = {name: sizes[name] for name in ("hidden_size", "intermediate_size", "image_size", "patch_size")}
        select = next(
            (main[key] for key in ("vision_feature_layer", "mm_vision_select_layer") if key in main), tower.select_layer
        )
        kept = {
            name: value
            for name, value in settings.items()
            if name not in ("num_hidden_layers", "vision_use_head", *_NOT_SETTINGS)
        }
        config = AutoConfig.for_model(
            source.layout.tower.model_types[0],
            **{
                "num_attention_heads": tower.num_heads,
                **kept,
                **named,
                "num_hidden_layers": tower.num_layers + select + 1,
            },
        )
        config._attn_implementation = "eager"
        return config

    def _prefix(self, target: str, suffix: str) -> tuple[Source, str]:
        source, name = self.where[target]
        return source, name.removesuffix(suffix)

    def _load(self, module: Any, source: Source, prefix: str) -> Any:
        """The module with the state read from ``prefix``. torch raises an error for a missing tensor."""
        state = {name: self.base(source, prefix + name) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.eval()

    def pixels(self, image: Any) -> np.ndarray:
        """Preprocesses an image to (S, S, 3), by transformers' image processor with the settings beside the vision tower. Of a processor that takes
        several views of an image, the view of the whole is taken.

        In LLaVA's own layout the image is first padded or stretched, as ``image_aspect_ratio`` says; so it is for ``--image-fit``.
        """
        import transformers

        folder, family = self.where["vision/position_embedding"][0].checkpoint.folder, self.sources[0].layout.family
        settings: dict[str, Any] = {}
        if any((folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
            reader = transformers.image_processing_base.ImageProcessingMixin
            with contextlib.suppress(OSError):  # a processor_config.json without image settings
                settings, _ = reader.get_image_processor_dict(str(folder))
        size, siglip = self.vision.image_size, self.vision.model_type == "siglip_vision_model"
        plain = "SiglipImageProcessor" if siglip else "CLIPImageProcessor"
        named = settings.get("image_processor_type", plain).removesuffix("Fast").removesuffix("Pil")
        settings = settings or (
            {"size": {"height": size, "width": size}} if siglip else {"size": size, "crop_size": size}
        )
        fit: Any = self.spec.image_fit
        if family in ("llava_original", "vicuna") and fit is None:
            # An adapter's settings come before its base's, as in LLaVA's own code.
            told = [source.checkpoint.config() for source in sorted(self.sources, key=lambda each: not each.is_adapter)]
            fit = next((config["image_aspect_ratio"] for config in told if "image_aspect_ratio" in config), None)
        if fit is not None or family in ("llava_original", "vicuna", "chatpose"):
            named = plain
        if fit == "pad":
            # Padding as in LLaVA's own code: around the image, in the mean colour.
            side = max(image.size)
            mean = settings.get("image_mean") or _processor(plain).image_mean
            square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
            square.paste(image, tuple((side - length) // 2 for length in image.size))
            image = square
        elif fit in ("stretch", "anyres"):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        elif fit == "crop" and siglip:
            named, settings = "CLIPImageProcessor", {**_half(), "size": size, "crop_size": size}
        kept = {key: value for key, value in settings.items() if not key.endswith(("_type", "_class"))}
        several = named == "LlavaOnevisionImageProcessor"  # which gives an image alone another view
        given = [[image, image]] if several else image
        found = _processor(named, **kept)(given, return_tensors="np")["pixel_values"][0]
        return (found[0] if found.ndim == 4 else found).transpose(1, 2, 0)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """The tower's selected hidden states, projected if the source has a projector, with its newline: (I, H, W, 3) -> (I·N, D)."""
        torch = self.torch
        tower = self._tower()
        with torch.no_grad():
            images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
            x = tower.embeddings(images)
            if hasattr(tower, "pre_layrnorm"):
                x = tower.pre_layrnorm(x)
            for block in tower.encoder.layers:
                x = block(x, None)
                x = x[0] if isinstance(x, tuple) else x
            if hasattr(tower.embeddings, "class_embedding"):
                x = x[:, 1:]
            if not self.projects:
                return x.flatten(0, 1).numpy()
            x = self._linear("projector/fc1", x, self.base)
            x = self._linear("projector/fc2", torch.nn.functional.gelu(x), self.base)
            if "projector/newline" in self.where:
                newline = self.base(*self.where["projector/newline"])
                x = torch.cat([x, newline.expand(len(x), 1, -1)], dim=1)
            return x.flatten(0, 1).numpy()

    def _tower(self) -> Any:
        source, prefix = self._prefix("vision/position_embedding", "embeddings.position_embedding.weight")
        tower = self.tower_class.from_config(self.vision)
        tower = getattr(tower, "vision_model", tower)  # transformers 5 has no such attribute
        names = [name for name in tower.state_dict() if not name.startswith(("post_layernorm", "head"))]
        tower.load_state_dict({name: self.base(source, prefix + name) for name in names}, strict=False, assign=True)
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
        module = self._load(copy.deepcopy(self.block), self.sources[0], f"{self.decoder}layers.{number}.")
        self._quantize(module)
        self._adapt(module, number)

        @torch.no_grad()
        def run(x: np.ndarray) -> np.ndarray:
            hidden = torch.from_numpy(x.copy())[None]
            places = torch.arange(len(x))[None]
            mask = torch.full((len(x), len(x)), torch.finfo(torch.float32).min).triu(1)[None, None]
            angles = self.angles(hidden, places)
            y = module(hidden, attention_mask=mask, position_ids=places, position_embeddings=angles)
            return (y[0] if isinstance(y, tuple) else y).reshape(x.shape).numpy()

        return run

    def _quantize(self, module: Any) -> None:
        """Replaces the weights of the projections by the values that codes for them stand for, if the folder holds codes. They are computed as by the
        conversion from values in the dtype of its base, so that what is left is what it did wrong.
        """
        if (quantization := QUANTIZATIONS.get(self.config.quantize)) is None:
            return
        dtype = getattr(self.torch, self.config.param_dtype)
        for linear in module.modules():
            if isinstance(linear, self.torch.nn.Linear):
                kernel = linear.weight.data.T.to(dtype).float().numpy()
                linear.weight.data = self.torch.from_numpy(dequantize(*quantization(kernel)).T.copy())

    def _adapt(self, module: Any, number: int) -> None:
        """Adds alpha / rank · B A to every adapted weight (Hu et al. 2021), or alpha / √rank · B A if peft's settings ask for rsLoRA (Kalajdzievski
        2023).
        """
        for target, (source, name) in self.where.items():
            if not (target.startswith("decoder/layers/") and target.endswith("/lora_a")):
                continue
            first = name.replace("{i}", str(number))
            if first not in source.checkpoint.tensors:
                continue  # as in peft: only layers in the file have adapters
            a, b = (self.tensors(source, each) for each in (first, first.replace("lora_A", "lora_B")))
            settings = _peft_settings(source)
            alpha = settings["lora_alpha"] if self.spec.lora_alpha is None else self.spec.lora_alpha
            scale = alpha / len(a) ** (0.5 if settings.get("use_rslora") else 1.0)
            block, projection = target.split("/")[2:4]
            linear = getattr(getattr(module, {"attn": "self_attn"}.get(block, block)), projection)
            linear.weight.data = linear.weight.data + scale * (b @ a)

    def _rows(self, target: str) -> Any:
        """A vocabulary table. Rows that an adapter trained replace those of the base."""
        first = self.config.text.base_vocab_size  # rows from here on are never rounded
        table = self.torch.cat([self.base(*self.where[target])[:first], self.tensors(*self.where[target])[first:]])
        module = target.split("/")[1]
        for source in self.sources:
            ids = _peft_settings(source).get("trainable_token_indices") or {}
            ids = ids.get(module, []) if isinstance(ids, dict) else ids if module == "embed_tokens" else []
            name = next((name for name in source.checkpoint.tensors if name.endswith(module + TOKEN_ROWS)), None)
            if name is not None:
                rounded, exact = self.base(source, name), self.tensors(source, name)
                for place, id in enumerate(ids):
                    if id < len(table):
                        table[id] = (rounded if id < first else exact)[place]
        return table

    def norm(self, x: np.ndarray) -> np.ndarray:
        source, prefix = self._prefix("decoder/norm/scale", "weight")
        norm = self._load(copy.deepcopy(self.final_norm), source, prefix)
        with self.torch.no_grad():
            return norm(self.torch.from_numpy(x)).numpy()

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """(T, D) -> (T, rows). A source without a LM head has tied weights: it is the embedding."""
        head = "decoder/lm_head/kernel"
        table = self._rows(head if head in self.where else "decoder/embed_tokens/embedding")
        return self.torch.nn.functional.linear(self.torch.from_numpy(hidden), table).numpy()

    def poses(self, hidden: np.ndarray) -> np.ndarray:
        """(P, D) -> (P, J, 3, 3): two linears, then Gram-Schmidt of two columns (Zhou et al. 2019, section B)."""
        functional = self.torch.nn.functional
        x = self._linear("pose_head/fc1", self.torch.from_numpy(hidden), self.tensors)
        x = self._linear("pose_head/fc2", functional.relu(x), self.tensors).unflatten(-1, (-1, 6))
        first = functional.normalize(x[..., :3], dim=-1)
        second = x[..., 3:] - (first * x[..., 3:]).sum(-1, keepdim=True) * first
        second = functional.normalize(second, dim=-1)
        return self.torch.stack([first, second, self.torch.linalg.cross(first, second)], dim=-1).numpy()


def _processor(name: str, **settings: Any) -> Any:
    """An image processor of transformers, in the version that uses Pillow, as 4.x does."""
    import transformers

    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**settings)


def _half() -> dict[str, Any]:
    return {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _shortened(config: Any) -> Any:
    """The same settings with one layer."""
    short = copy.deepcopy(config)
    short.num_hidden_layers = 1
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:1]
    return short


def _peft_settings(source: Source) -> dict[str, Any]:
    """``adapter_config.json``, read independently of the conversion."""
    file = source.checkpoint.folder / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


class _TorchTensors:
    """Tensors of a source as float32, by PyTorch's own readers; files are memory-mapped. dtype: the dtype that they are rounded to first."""

    def __init__(self, torch: Any, spec: SourceSpec, dtype: Any = None):
        self.torch, self.dtype, self.given = torch, dtype, set(spec.given.values())
        self.mapped: dict[Path, Mapping[str, Any]] = {}

    def __call__(self, source: Source, name: str) -> Any:
        tensor = self.stored(source, name).detach()
        return (tensor if self.dtype is None else tensor.to(self.dtype)).float()

    def stored(self, source: Source, name: str) -> Any:
        """The tensor as stored in the file."""
        from safetensors import SafetensorError, safe_open

        entry = source.checkpoint.tensors.get(name)
        if entry is None:
            raise UserError(
                f"{source.title}: no tensor {name!r}, which torch's module needs; chatpose verify does not support this layout"
            )
        file = self._file(source, entry)
        if file.suffix == ".gguf":
            return self._gguf(file)[name]
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    return opened.get_tensor(entry.name)
            if file not in self.mapped:
                state = self.torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                while entry.name not in state:  # remove wrapper prefixes, as the reader does
                    state = next(state[key] for key in ("state_dict", "model", "module") if key in state)
                self.mapped[file] = state
            return self.mapped[file][entry.name]
        except (SafetensorError, KeyError, StopIteration):
            raise UserError(
                f"{file}: no tensor {entry.name!r}, which {entry.file.name} has; the folder has two sets of weights: remove one"
            ) from None

    def _gguf(self, file: Path) -> Mapping[str, Any]:
        """The tensors of a GGUF file as transformers dequantises them; the whole model at once."""
        from transformers import AutoModelForCausalLM

        if file not in self.mapped:
            settings = {"gguf_file": file.name, "dtype": self.torch.float32}
            self.mapped[file] = AutoModelForCausalLM.from_pretrained(file.parent, **settings).state_dict()
        return self.mapped[file]

    def _file(self, source: Source, entry: TensorEntry) -> Path:
        """The file from which transformers would read the tensor, in its own order of preference. Tensors that transformers has no name for
        (adapters, projectors, a file that was given) come from the reader's file.
        """
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

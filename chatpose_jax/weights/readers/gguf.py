"""A language model in a GGUF file as a ``Checkpoint``: with the names, the order of rows, and the ``config.json`` of transformers."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.weights.readers.checkpoint import Checkpoint
from chatpose_jax.weights.readers.gguf_file import GGUFHeader, GGUFTensor, Value, read_gguf_header, shown
from chatpose_jax.weights.readers.gguf_tokenizer import tokenizer_files

# Names of modules in the file → in transformers.
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_FACTORS = "rope_freqs.weight"
"""What llama.cpp divides each frequency of RoPE by: it stores Llama 3's scaling in no other way."""
# Keys of the architecture → keys of config.json, for whole numbers that every file has.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
# Other keys of the architecture that are followed.
_READ = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "vocab_size",
}
# Keys that would change the model, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.finetuned": (False, True),  # says where a scaling comes from
    "tensor_data_layout": ("Meta AI original pth",),  # the order of rows that ``gguf_permuted`` describes
    "use_parallel_residual": (False,),
}
_SCALINGS = [
    {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": context}
    for context in (8192, 4096, 16384, 32768)
]
"""Settings of Llama 3's scaling besides its factor. All of Meta's models have the first."""


@dataclasses.dataclass(frozen=True, repr=False)
class GGUFCheckpoint(Checkpoint):
    """The language model in a GGUF file. ``folder`` is the file itself, which holds the configuration and the tokenizer too."""

    header: GGUFHeader = dataclasses.field(default_factory=lambda: GGUFHeader({}, {}))

    @property
    def dtype(self) -> np.dtype:
        """bfloat16 if anything is quantised, because its values are no longer exact; else the dtype of most bytes."""
        quantised = any(entry.stored != entry.dtype.name for entry in self.tensors.values())
        return np.dtype(ml_dtypes.bfloat16) if quantised else super().dtype

    def config(self) -> dict[str, Any]:
        """``config.json`` of the model, for its family. Raises UserError for a value that this program does not follow."""
        return _Settings(self.folder, self.header).config()

    def tokenizer_files(self) -> dict[str, bytes]:
        return dict(self._tokenizer_files)

    @functools.cached_property
    def _tokenizer_files(self) -> dict[str, bytes]:
        return tokenizer_files(self.folder, self.header.metadata)


def open_gguf(path: Path) -> GGUFCheckpoint:
    """Opens a language model in a GGUF file. Only its header is read.

    Raises UserError: what ``read_gguf_header`` raises; a part of a file that was split; an adapter, a vision tower, or an architecture that no
    family has.
    """
    header = read_gguf_header(path)
    settings = _Settings(path, header)
    family, heads = settings.family, settings.heads()
    tensors: dict[str, GGUFTensor] = {}
    for name, entry in header.tensors.items():
        if name == _FACTORS:
            continue
        there = translate(name)
        if there in tensors:
            raise UserError(
                f"{path}: tensors {tensors[there].name!r} and {name!r} are both {there!r}; the file is damaged"
            )
        count = next((heads[kind] for kind in "qk" if f".{kind}_proj." in there), 0) if family.gguf_permuted else 0
        if count and entry.shape[0] % (2 * count):
            raise UserError(
                f"{path}: tensor {name!r} of shape {entry.shape} does not hold {count} heads of even size; the file is damaged"
            )
        tensors[there] = dataclasses.replace(entry, name=there, heads=count)
    if not tensors:
        raise UserError(f"{path}: contains no tensors, only a vocabulary; expected a model")
    return GGUFCheckpoint(path, (path,), tensors, header=header)


def translate(name: str) -> str:
    """The name in transformers of a tensor; a name that is not known stays."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _MODULES:
        return name
    layer = "" if match[1] is None else f"model.layers.{int(match[1])}."
    return f"{layer}{_MODULES[match[2]]}.{match[3]}"


class _Settings:
    """The metadata of a model, read as the settings of its family."""

    def __init__(self, path: Path, header: GGUFHeader):
        from chatpose_jax.weights.backbones import LANGUAGES

        self.path, self.header, self.metadata = path, header, header.metadata
        for key, allowed, what in (
            ("general.type", ("model",), "not a language model"),
            (
                "split.count",
                (0, 1),
                "one part of a model; join the parts with llama.cpp: llama-gguf-split --merge FIRST OUT",
            ),
        ):
            if key in self.metadata and not _among(self.metadata[key], allowed):
                raise UserError(f"{path}: {key}={shown(self.metadata[key])}: {what}")
        self.architecture = self.metadata.get("general.architecture")
        found = [family for family in LANGUAGES.values() if _among(self.architecture, family.gguf)]
        if not found:
            known = ", ".join(dict.fromkeys(name for family in LANGUAGES.values() for name in family.gguf))
            raise UserError(
                f"{path}: general.architecture={shown(self.architecture)} is not supported; expected one of {known}"
            )
        self.family = found[0]

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number. Raises UserError if it is missing and there is no default."""
        value = self.metadata.get(self.key(name), default)
        if value is None:
            raise UserError(f"{self.path}: {self.key(name)} is missing; the file is incomplete; convert it again")
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UserError(
                f"{self.path}: {self.key(name)}={shown(value)}; expected one whole number from 1 to 2^31 - 1 for all layers"
            )
        return value

    def real(self, name: str, default: float) -> float:
        """A positive number, in its shortest decimal form: 1e-05, not the 9.999999747378752e-06 of float32."""
        value = self.metadata.get(self.key(name), default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise UserError(f"{self.path}: {self.key(name)}={shown(value)}; expected a positive number")
        return float(str(np.float32(value)))

    def heads(self) -> dict[str, int]:
        """The number of heads of q and k."""
        heads = self.size("attention.head_count")
        return {"q": heads, "k": self.size("attention.head_count_kv", heads)}

    def config(self) -> dict[str, Any]:
        self._demand_followed()
        heads, width = self.heads(), self.size("embedding_length")
        head_dim = self.size("attention.key_length", width // heads["q"])
        for name in ("attention.value_length", "rope.dimension_count"):
            if self.size(name, head_dim) != head_dim:
                raise UserError(
                    f"{self.path}: {self.key(name)}={self.size(name)} is not supported; expected {head_dim}, the size of a head"
                )
        embedding = self.header.tensors.get("token_embd.weight")
        if embedding is None:
            raise UserError(f"{self.path}: no tensor token_embd.weight; expected a complete language model")
        rows = embedding.shape[0]
        if self.size("vocab_size", rows) != rows:
            raise UserError(
                f"{self.path}: {self.key('vocab_size')}={self.size('vocab_size')}, but token_embd.weight has {rows} rows; the file is damaged"
            )
        theta = self.real("rope.freq_base", 10000.0)
        ids = {f"{name}_token_id": self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
        return {
            "architectures": [self.family.architecture],
            "model_type": self.family.model_types[0],
            **{ours: self.size(theirs) for theirs, ours in _SIZES.items()},
            "num_key_value_heads": heads["k"],
            "head_dim": head_dim,
            "vocab_size": rows,
            "hidden_act": "silu",
            "attention_bias": "blk.0.attn_q.bias" in self.header.tensors,
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_theta": theta,
            "rope_scaling": self._scaling(theta, head_dim),
            "tie_word_embeddings": "output.weight" not in self.header.tensors,
            **{name: id for name, id in ids.items() if type(id) is int and 0 <= id < rows},
        }

    def _demand_followed(self) -> None:
        """Raises UserError for a key of the architecture that is not known and may change the model."""
        checked = ("attention.value_length", "rope.dimension_count", "rope.scaling.original_context_length")
        for key, value in self.metadata.items():
            name = key.removeprefix(f"{self.architecture}.")
            if name == key or name in (*_SIZES, *_READ, *checked):
                continue
            if name not in _NEUTRAL or not _among(value, _NEUTRAL[name]):
                expected = f"; expected {_NEUTRAL[name][0]!r}" if name in _NEUTRAL else ""
                raise UserError(f"{self.path}: {key}={shown(value)} is not supported{expected}")

    def _scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        """Llama 3's scaling of RoPE, found from the factors that it gives; ``None`` without factors."""
        entry = self.header.tensors.get(_FACTORS)
        if entry is None:
            return None
        if entry.shape != (head_dim // 2,) or entry.stored != "float32":
            raise UserError(
                f"{self.path}: {_FACTORS} is {entry.stored} of shape {entry.shape}; expected float32 of shape {(head_dim // 2,)}"
            )
        factors = entry.read()
        if (factors == 1).all():
            return None
        for settings in _SCALINGS:
            scaling: dict[str, Any] = {"rope_type": "llama3", "factor": float(factors.max()), **settings}
            if np.allclose(factors, _llama3_factors(theta, head_dim, scaling), rtol=1e-5, atol=0):
                return scaling
        raise UserError(
            f"{self.path}: {_FACTORS} holds other factors than Llama 3's scaling of RoPE gives ({shown(factors[:3])} … {shown(factors[-3:])}); "
            "this is not supported"
        )


_IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _llama3_factors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by: 1 for short waves, ``factor`` for long ones, and a mean between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    with np.errstate(all="ignore"):  # a damaged file may have any base and factor
        wave = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        share = np.clip((scaling["original_max_position_embeddings"] / wave - low) / (high - low), 0, 1)
        return 1 / ((1 - share) / scaling["factor"] + share)


def _among(value: Value | None, allowed: tuple[Any, ...]) -> bool:
    """Whether a value of the metadata is one of some. Unlike ``in`` it takes arrays, and 1 for no truth value."""
    return any(type(value) is type(each) and value == each for each in allowed)

"""Model configuration: frozen dataclasses, their JSON form, and the presets.

Everything here is plain data: importing it costs no JAX. A preset becomes shapes, weights or a batch in ``chatpose_jax.models.chatpose``
(``abstract_params``, ``init_params``, ``fake_batch``).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from chatpose_jax.errors import UserError
from chatpose_jax.settings import check_types, did_you_mean, require

DType = Literal["float32", "bfloat16", "float16"]
LoRATarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision transformer with pre-LN blocks: CLIP by default, or SigLIP. Its features are the hidden states after ``num_layers + select_layer + 1``
    blocks, without the class token.

    image_size: side of the square input, in pixels. What ``patch_size`` leaves over at the right and at the bottom is not seen (in SigLIP, 6 of
        384 pixels).
    hidden_size: width of the residual stream; ``num_heads`` divides it.
    intermediate_size: width inside the MLP.
    num_layers: blocks of the published tower, including those after ``select_layer``, which never run.
    num_heads: attention heads of a block.
    select_layer: the block whose output is used, counted from the end: -1 is the last, -2 the one before it (LLaVA-1.5).
    layer_norm_eps: added to the variance in LayerNorm.
    activation: of the MLP; CLIP has "quick_gelu", SigLIP "gelu_tanh".
    class_token: whether a learned token stands before the patches, as in CLIP.
    pre_norm: whether a LayerNorm follows the embeddings, as in CLIP.
    patch_bias: whether the patch embedding has a bias, as in SigLIP.
    backbone: the family in ``weights.backbones``, by which an export names tensors and settings. It changes no computation.
    """

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    select_layer: int = -2
    layer_norm_eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu_tanh"] = "quick_gelu"
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    backbone: str = "clip"

    def __post_init__(self) -> None:
        check_types(self, "model.vision")
        sizes = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        require(self, "model.vision", "at least 1", lambda value: value >= 1, *sizes)
        require(self, "model.vision", "positive", lambda value: value > 0, "layer_norm_eps")
        if self.image_size < self.patch_size:
            raise UserError(
                f"model.vision.patch_size={self.patch_size} must not exceed model.vision.image_size={self.image_size}"
            )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.vision.num_heads={self.num_heads} must divide model.vision.hidden_size={self.hidden_size}"
            )
        if not -self.num_layers <= self.select_layer <= -1:
            raise UserError(
                f"model.vision.select_layer={self.select_layer} must lie between -{self.num_layers} (the first block) and -1 (the last)"
            )

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_used_layers(self) -> int:
        """Blocks that run. The rest of the tower has no effect and is never allocated."""
        return self.num_layers + self.select_layer + 1


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches RoPE beyond the context that it was pretrained with: wavelengths longer than ``original_context / low_frequency`` grow
    by ``factor``, those shorter than ``original_context / high_frequency`` stay, those between are interpolated.

    Source: ``rope_type: "llama3"`` of transformers, whose names are ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
    ``original_max_position_embeddings``.
    """

    factor: float = 8.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        check_types(self, "model.text.rope_scaling")
        require(self, "model.text.rope_scaling", "at least 1", lambda value: value >= 1, "factor", "original_context")
        require(self, "model.text.rope_scaling", "positive", lambda value: value > 0, "low_frequency")
        if self.high_frequency <= self.low_frequency:
            raise UserError(
                f"model.text.rope_scaling.high_frequency={self.high_frequency} must exceed low_frequency={self.low_frequency}"
            )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Decoder of LLaMA and its relatives (pre-RMSNorm, RoPE, SwiGLU, grouped-query attention).

    vocab_size: rows of embedding and LM head, including added ones.
    base_vocab_size: rows of the base vocabulary. Later rows are separate parameters, so that new tokens can train while the base is frozen.
    hidden_size: width of the residual stream.
    intermediate_size: width inside the MLP.
    num_layers: decoder blocks.
    num_heads: query heads of a block; ``num_kv_heads``, of keys and values, divides it.
    num_kv_heads: equal to ``num_heads`` in LLaMA-1 and -2 of 7B and 13B; fewer share keys and values.
    head_dim: width of a head, even (RoPE turns pairs).
    rms_norm_eps: added to the mean square in RMSNorm.
    rope_theta: base of RoPE's wavelengths.
    rope_scaling: as in Llama 3.1 and later; None for plain RoPE.
    tied: the LM head is the transposed embedding, in memory, on disk and in training, for added rows too.
    qkv_bias: biases on queries, keys and values, as in Qwen2.
    qk_norm: RMSNorm on each head of queries and keys before RoPE, as in Qwen3.
    max_position_embeddings: the longest conversation in tokens, including images and answer.
    backbone: the family in ``weights.backbones``, by which an export names tensors and settings. It changes no computation.
    """

    vocab_size: int = 32001
    base_vocab_size: int = 32000
    hidden_size: int = 5120
    intermediate_size: int = 13824
    num_layers: int = 40
    num_heads: int = 40
    num_kv_heads: int = 40
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 4096
    backbone: str = "llama2"

    def __post_init__(self) -> None:
        check_types(self, "model.text")
        sizes = ("base_vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        require(
            self, "model.text", "at least 1", lambda value: value >= 1, *sizes, "vocab_size", "max_position_embeddings"
        )
        require(self, "model.text", "positive", lambda value: value > 0, "rms_norm_eps", "rope_theta")
        require(self, "model.text", "even and at least 2", lambda value: value >= 2 and value % 2 == 0, "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.text.num_kv_heads={self.num_kv_heads} must divide model.text.num_heads={self.num_heads}"
            )
        if self.base_vocab_size > self.vocab_size:
            raise UserError(
                f"model.text.base_vocab_size={self.base_vocab_size} must not exceed model.text.vocab_size={self.vocab_size}"
            )

    @property
    def num_added_tokens(self) -> int:
        """Rows after the base vocabulary."""
        return self.vocab_size - self.base_vocab_size


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on decoder projections; output is scaled by ``alpha / rank`` (Hu et al. 2021, section 4.1).

    rank, alpha: r and α of the paper.
    dropout: on the adapters' input, while training.
    targets: the projections of a block that have adapters.
    last_layers: only so many blocks at the end have adapters; None for all. Their arrays then have a row for each of these blocks. Where nothing
        before these blocks trains, the blocks before them run without a gradient.
    """

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    targets: tuple[LoRATarget, ...] = ("q_proj", "v_proj")
    last_layers: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "model.lora")
        require(self, "model.lora", "at least 1, or None", lambda value: value is None or value >= 1, "last_layers")
        require(self, "model.lora", "at least 1", lambda value: value >= 1, "rank")
        require(self, "model.lora", "positive", lambda value: value > 0, "alpha")
        require(self, "model.lora", "at least 0 and less than 1", lambda value: 0 <= value < 1, "dropout")

    @property
    def scale(self) -> float:
        """α / r."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Pose head. ``models.heads`` finds the class by ``name``; ``options`` are keyword arguments of its constructor."""

    name: str = "mlp"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        expected = 'model.head.options: expected rows of (name, value), such as (("hidden", 64),), each value a number, text or a tuple of them'
        rows = self.options
        if not isinstance(rows, tuple) or not all(
            isinstance(row, tuple) and len(row) == 2 and isinstance(row[0], str) for row in rows
        ):
            raise UserError(f"{expected}; found {rows!r:.100}")
        check_types(self, "model.head")
        try:
            hash(self)  # a configuration is a key of caches
        except TypeError:
            raise UserError(f"{expected}; found {rows!r:.100}") from None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The complete ChatPose model: vision tower, projector, decoder, adapters, pose head, and the token ids that the model needs to know.

    ``vision`` is None for a model without images: it has neither tower nor projector. ``image_newline``: a learned embedding follows the patches
    of each image, as in LLaVA-1.6 and LLaVA-OneVision.
    ``image_token_id`` may be negative, because some vocabularies (CHATPOSE-V0) have no row for the image placeholder; so may ``bos_token_id``, where
    the tokenizer has no such token (Qwen), and ``eos_token_id``: answers then end only at their maximum length.
    ``other_eos_token_ids``: ids that end an answer as well. The model's template never writes them, but its base may (Llama 3, Qwen).
    ``scan_layers`` stacks the layers of vision tower and decoder and scans over them (for training). Unrolled layers decode faster.
    """

    vision: VisionConfig | None = VisionConfig()
    image_newline: bool = False
    text: TextConfig = TextConfig()
    lora: LoRAConfig | None = LoRAConfig()
    head: HeadConfig = HeadConfig()
    pose_token_id: int = 32000
    image_token_id: int = -200
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    other_eos_token_ids: tuple[int, ...] = ()
    scan_layers: bool = True
    dtype: DType = "bfloat16"
    """Compute dtype of matmuls and activations; norms, softmax, RoPE and the pose head run in float32."""
    param_dtype: DType = "bfloat16"
    """Storage dtype of the base; LoRA, the added token rows and the head are always float32."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """How the projections of the decoder layers are stored: as ``param_dtype``, in int8 with one scale for each output channel, or in int4 with one
    for each output channel and 128 inputs (``models.quantize``). Quantised ones never train. Adapters do."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Implementation of the decoder's attention; see ``models.attention``."""

    def __post_init__(self) -> None:
        check_types(self, "model")
        rows = self.text.vocab_size
        known, any_or_none = ("pose_token_id", "pad_token_id"), ("image_token_id", "bos_token_id", "eos_token_id")
        require(self, "model", f"an id of the vocabulary of {rows} rows", lambda value: 0 <= value < rows, *known)
        require(self, "model", f"negative or less than {rows}", lambda value: value < rows, *any_or_none)
        if not all(0 <= id < rows for id in self.other_eos_token_ids):
            raise UserError(
                f"model.other_eos_token_ids must be ids of the vocabulary of {rows} rows, found {self.other_eos_token_ids}"
            )
        layers = self.text.num_layers
        if self.lora is not None and (self.lora.last_layers or 0) > layers:
            raise UserError(
                f"model.lora.last_layers={self.lora.last_layers} must not exceed model.text.num_layers={layers}"
            )
        if self.vision is None and self.image_newline:
            raise UserError(
                "model.image_newline needs images, and model.vision is none: set model.image_newline to False"
            )

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """All ids that end an answer. One that is negative never occurs."""
        return (self.eos_token_id, *self.other_eos_token_ids)

    @property
    def leading_layers(self) -> int:
        """Decoder blocks before the first one that has adapters; 0 for a model without adapters."""
        return 0 if self.lora is None else self.text.num_layers - (self.lora.last_layers or self.text.num_layers)

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels; 0 for a model without images."""
        return 0 if self.vision is None else self.vision.image_size

    @property
    def image_tokens(self) -> int:
        """Tokens that an image takes in the decoder; 0 for a model without images."""
        return 0 if self.vision is None else self.vision.num_patches + self.image_newline

    def to_json(self) -> dict[str, Any]:
        """A nested dict of JSON values. ``from_json`` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """Raises a UserError that names an unknown key, or a value of the wrong type or out of range."""
        return _from_dict(cls, data, "model")

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)


_NESTED: dict[tuple[type, str], type] = {
    (ModelConfig, "vision"): VisionConfig,
    (ModelConfig, "text"): TextConfig,
    (ModelConfig, "lora"): LoRAConfig,
    (ModelConfig, "head"): HeadConfig,
    (TextConfig, "rope_scaling"): RopeScaling,
}


def _from_dict(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a table of settings, found {type(data).__name__}")
    if cls is HeadConfig and "num_joints" in data:  # folders of earlier versions, where every head had 24
        if data["num_joints"] != 24:
            raise UserError(
                f"{where}.num_joints={data['num_joints']!r}: the number of joints now belongs to the head; only 24 can be read here"
            )
        data = {key: value for key, value in data.items() if key != "num_joints"}
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - known):
        near = did_you_mean(unknown[0], known) or f"; the settings are {', '.join(sorted(known))}"
        raise UserError(f"{where}: unknown setting {unknown[0]!r}{near}")
    values = {}
    for key, value in data.items():
        if value is not None and (nested := _NESTED.get((cls, key))):
            value = _from_dict(nested, value, f"{where}.{key}")
        else:
            value = frozen(value)
        values[key] = value
    return cls(**values)


def frozen(value: Any) -> Any:
    """A JSON value with its lists as tuples. The caller checks the items."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def _tiny() -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            image_size=64, patch_size=16, hidden_size=128, intermediate_size=512, num_layers=3, num_heads=4
        ),
        text=TextConfig(
            vocab_size=1026,
            base_vocab_size=1024,
            hidden_size=128,
            intermediate_size=384,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            max_position_embeddings=1024,
        ),
        lora=LoRAConfig(rank=8, alpha=16.0, dropout=0.0),
        pose_token_id=1024,
        image_token_id=1025,
        dtype="float32",
        param_dtype="float32",
    )


_7B = TextConfig(hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32)

PRESETS: dict[str, ModelConfig] = {
    "chatpose_13b": ModelConfig(),
    "chatpose_7b": ModelConfig(text=_7B),
    "tiny": _tiny(),
}


def preset(name: str) -> ModelConfig:
    """The named preset. Raises a UserError that lists the names for any other name."""
    if name not in PRESETS:
        raise UserError(f"no model preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]

"""Small random checkpoints in every layout, made with transformers and torch, of natural scale (activations neither
vanish nor blow up).

Each maker writes a folder with weights, ``config.json`` and the tiny tokenizer, and returns the torch model(s) to
compare with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from chatpose_jax.processing.tokenizer import TextTokenizer

Names = Literal["4", "5", "state_dict", "4_state_dict"]
Format = Literal["safetensors", "bin"]

VOCAB = 1024
POSE_ID, IMAGE_ID = 1024, 1025


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the small models; heads are 64 wide in the tower, as in CLIP."""

    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 160
    layers: int = 3
    rows: int = VOCAB + 2
    vision_width: int = 128
    vision_layers: int = 4
    image: int = 28
    patch: int = 7


def llama_config(sizes: Sizes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=sizes.rows,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )


def clip_config(sizes: Sizes) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=2 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_width // 64,
        image_size=sizes.image,
        patch_size=sizes.patch,
    )


def siglip_config(sizes: Sizes, head: bool = False) -> SiglipVisionConfig:
    """Two pixels are left over at the right and at the bottom, as six are in so400m-patch14-384."""
    return SiglipVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=2 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_width // 64,
        image_size=sizes.image + 2,
        patch_size=sizes.patch,
        vision_use_head=head,
    )


def qwen2_config(sizes: Sizes, tied: bool = False) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=sizes.rows,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of standard deviation 1/sqrt(fan_in); norms near one, biases and embeddings small but not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "embed" not in name.rsplit(".", 2)[-2]:
            value = noise * parameter[0].numel() ** -0.5
        elif name.endswith("norm.weight") or "layernorm" in name or "layer_norm" in name or "layrnorm" in name:
            value = (1.0 if name.endswith("weight") else 0.0) + 0.1 * noise
        else:
            value = noise * (0.02 if parameter.ndim == 1 else 0.5)
        parameter.data.copy_(value)
    return module.eval()


def write_tokenizer(folder: Path, *, pose: str | None = "<POSE>") -> None:
    """The package's tiny tokenizer: 1024 pieces, the pose token as 1024, ``<image>`` as 1025; or without the two
    (``pose=None``).
    """
    data = json.loads((resources.files("chatpose_jax.processing") / "data/tiny_tokenizer/tokenizer.json").read_text())
    kept = [token for token in data["added_tokens"] if token["id"] < VOCAB or pose is not None]
    for token in kept:
        token["content"] = pose if token["content"] == "<POSE>" else token["content"]
    (folder / "tokenizer.json").write_text(json.dumps(data | {"added_tokens": kept}))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_sentencepiece(folder: Path, added: dict[str, int], *, fast: bool = False) -> None:
    """The same ids from a SentencePiece model of 1024 pieces, as LLaMA's releases have it: ``tokenizer.model`` and
    ``added_tokens.json`` (CHATPOSE-V0); with ``fast`` also ``tokenizer.json`` and the tokens in ``tokenizer_config.json``,
    as transformers 4.37 saves them (LLaVA for transformers).
    """
    (folder / "tokenizer.json").unlink(missing_ok=True)
    text = (Path(__file__).parents[2] / "LICENSE").read_text().splitlines()
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=VOCAB, byte_fallback=True,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", split_digits=True,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2, num_threads=1,
        )  # fmt: skip
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if not fast:
        return
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {id: {"content": token, **flags} for token, id in {"<unk>": 0, "<s>": 1, "</s>": 2, **added}.items()}
    settings["added_tokens_decoder"] = {str(id): token for id, token in tokens.items()}
    data = json.loads(TextTokenizer.read(folder).backend.to_str())
    data["added_tokens"] = [{"id": id, **token} for id, token in tokens.items()]
    data["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    data["pre_tokenizer"] = None
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_state(folder: Path, state: dict[str, torch.Tensor], fmt: Format = "safetensors", shards: int = 1) -> None:
    """Writes a state dict as one file, or as shards with an index."""
    state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    names = list(state)
    stem, suffix = ("model", "safetensors") if fmt == "safetensors" else ("pytorch_model", "bin")
    if shards == 1:
        files = {f"{stem}.{suffix}": names}
    else:
        files = {f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}": names[i::shards] for i in range(shards)}
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    for file, held in files.items():
        part = {name: state[name] for name in held}
        if fmt == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, default=str))


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def make_llava_transformers(
    folder: Path,
    names: Names = "5",
    fmt: Format = "safetensors",
    *,
    sizes: Sizes = Sizes(),
    dtype: torch.dtype = torch.float32,
    pose: str | None = "<POSE>",
    shards: int = 1,
    image_token_id: int = IMAGE_ID,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """LLaVA-1.5 for transformers; with ``names="5"`` and safetensors, ``save_pretrained`` itself writes it."""
    _fresh(folder)
    config = LlavaConfig(
        text_config=llama_config(sizes),
        vision_config=clip_config(sizes),
        image_token_index=image_token_id,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config)
    randomise(model, seed)
    model = model.to(dtype)
    if names == "5" and fmt == "safetensors":
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "50GB")
    else:
        state = dict(model.state_dict())
        if names != "state_dict":
            state = {transformers_name(name, names): tensor for name, tensor in state.items()}
        write_state(folder, state, fmt, shards)
        model.config.save_pretrained(folder)
    write_tokenizer(folder, pose=pose)
    return model


def make_llava_next(
    folder: Path, names: Names = "5", *, sizes: Sizes = Sizes(), dtype: torch.dtype = torch.float32, seed: int = 0
) -> LlavaNextForConditionalGeneration:
    """LLaVA-1.6 for transformers."""
    size = sizes.image
    config = LlavaNextConfig(
        text_config=llama_config(sizes),
        vision_config=clip_config(sizes),
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=[[size, 2 * size], [2 * size, size]],
    )
    return _written(folder, LlavaNextForConditionalGeneration(config), names, dtype, seed)


def make_llava_onevision(
    folder: Path,
    names: Names = "5",
    *,
    sizes: Sizes = Sizes(),
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    head: bool = False,
    seed: int = 0,
) -> LlavaOnevisionForConditionalGeneration:
    """LLaVA-OneVision for transformers: SigLIP and Qwen2."""
    vision = siglip_config(sizes, head)
    size = vision.image_size
    config = LlavaOnevisionConfig(
        text_config=qwen2_config(sizes, tied),
        vision_config=vision,
        image_token_index=IMAGE_ID,
        video_token_index=sizes.rows + 1,
        image_grid_pinpoints=[[size, 2 * size], [2 * size, size]],
        tie_word_embeddings=tied,
    )
    return _written(folder, LlavaOnevisionForConditionalGeneration(config), names, dtype, seed)


def _written(folder: Path, model: Any, names: Names, dtype: torch.dtype, seed: int) -> Any:
    """A model of a newline, whose value is as large as an embedding."""
    _fresh(folder)
    randomise(model, seed)
    model.model.image_newline.data *= 25
    model = model.to(dtype)
    if names == "5":
        model.save_pretrained(folder)
    else:
        state = dict(model.state_dict())
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        renamed = {name if names == "state_dict" else transformers_name(name, names): state[name] for name in state}
        write_state(folder, renamed)
        model.config.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def make_siglip(folder: Path, *, sizes: Sizes = Sizes(), seed: int = 0) -> SiglipModel:
    """SigLIP as Google released it: two towers in one file, with the pooling heads. Its file has the names of 4.x and 5.x."""
    _fresh(folder)
    text = SiglipTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=siglip_config(sizes, head=True)))
    randomise(model, seed)
    model.save_pretrained(folder)
    return model


def transformers_name(name: str, names: Names) -> str:
    """A name of the 5.x ``state_dict()`` as files of 4.x or 5.x, or a ``state_dict()`` of 4.52 to 4.57, have it."""
    if names == "4_state_dict":
        return name.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)
    if name.startswith("lm_head."):
        return "language_model." + name
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if names == "4":
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


class PoseProjection(torch.nn.Module):
    """The torch side of CHATPOSE-V0's additions to LLaMA: projector and ``text_hidden_fcs``."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.mm_projector = torch.nn.Sequential(
            torch.nn.Linear(sizes.vision_width, width), torch.nn.GELU(), torch.nn.Linear(width, width)
        )
        head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 144))
        self.text_hidden_fcs = torch.nn.ModuleList([head])


@dataclasses.dataclass(frozen=True)
class FlatModels:
    """The torch modules behind a checkpoint in LLaVA's original names."""

    llama: LlamaForCausalLM
    clip: CLIPVisionModel
    extra: PoseProjection


def _flat_models(sizes: Sizes, dtype: torch.dtype, seed: int) -> FlatModels:
    llama, clip, extra = (
        LlamaForCausalLM(llama_config(sizes)),
        CLIPVisionModel(clip_config(sizes)),
        PoseProjection(sizes),
    )
    for offset, module in enumerate((llama, clip, extra)):
        randomise(module, seed + offset)
    return FlatModels(llama.to(dtype), clip.to(dtype), extra.to(dtype))


def _flat_config(sizes: Sizes, **extra: Any) -> dict[str, Any]:
    return llama_config(sizes).to_dict() | {
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": sizes.vision_width,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        **extra,
    }


def clip_state(clip: CLIPVisionModel, prefix: str) -> dict[str, torch.Tensor]:
    """CLIP's vision tower under the names of its released file, whichever way this transformers spells them."""
    return {prefix + name.removeprefix("vision_model."): tensor for name, tensor in clip.state_dict().items()}


def make_clip(folder: Path, clip: CLIPVisionModel, *, fmt: Format = "bin", with_text: bool = True) -> None:
    """CLIP as OpenAI released it: two towers in one file."""
    _fresh(folder)
    state = clip_state(clip, "vision_model.")
    state["vision_model.embeddings.position_ids"] = torch.arange(
        state["vision_model.embeddings.position_embedding.weight"].shape[0]
    )[None]
    if with_text:
        state |= {
            "text_model.final_layer_norm.weight": torch.ones(8),
            "text_projection.weight": torch.ones(4, 8),
            "visual_projection.weight": torch.ones(4, 8),
            "logit_scale": torch.tensor(2.6592),
        }
    write_state(folder, state, fmt)
    write_config(folder, {"model_type": "clip", "vision_config": clip.config.to_dict()})


def make_llava_original(
    folder: Path,
    fmt: Format = "bin",
    *,
    tower: bool = True,
    projector: Literal["inside", "beside"] = "inside",
    sizes: Sizes = Sizes(rows=VOCAB),
    dtype: torch.dtype = torch.float32,
    shards: int = 2,
    pose: str | None = None,
    seed: int = 0,
) -> FlatModels:
    """LLaVA-1.5 in its original layout; without ``tower`` CLIP must be written beside it with ``make_clip``."""
    _fresh(folder)
    models = _flat_models(sizes, dtype, seed)
    state = dict(models.llama.state_dict())
    rows = {f"model.mm_projector.{name}": tensor for name, tensor in models.extra.mm_projector.state_dict().items()}
    if projector == "inside":
        state |= rows
    else:
        torch.save(rows, folder / "mm_projector.bin")
    if tower:
        state |= clip_state(models.clip, "model.vision_tower.vision_tower.vision_model.")
    write_state(folder, state, fmt, shards)
    write_config(folder, _flat_config(sizes))
    write_tokenizer(folder, pose=pose)
    return models


def make_chatpose(
    folder: Path,
    clip_folder: Path,
    fmt: Format = "bin",
    *,
    sizes: Sizes = Sizes(rows=VOCAB + 2),
    dtype: torch.dtype = torch.float32,
    shards: int = 2,
    seed: int = 0,
) -> FlatModels:
    """CHATPOSE-V0: merged decoder, ``[SEG]``, ``text_hidden_fcs``, buffers of RoPE and SMPL-X, no vision tower; and
    CLIP in its own folder.
    """
    _fresh(folder)
    models = _flat_models(sizes, dtype, seed)
    state = dict(models.llama.state_dict()) | {
        f"model.{name}": tensor for name, tensor in models.extra.state_dict().items()
    }
    head_dim = sizes.width // sizes.heads
    for layer in range(sizes.layers):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 10000.0 ** (
            -torch.arange(0, head_dim, 2) / head_dim
        )
    state["model.smplx.v_template"] = torch.zeros(10, 3)
    write_state(folder, state, fmt, shards)
    write_config(folder, _flat_config(sizes, model_type="llava"))
    write_tokenizer(folder, pose="[SEG]")
    make_clip(clip_folder, models.clip)
    return models


def make_vicuna(
    folder: Path, fmt: Format = "bin", *, sizes: Sizes = Sizes(rows=VOCAB), seed: int = 0
) -> LlamaForCausalLM:
    """A LLaMA alone."""
    _fresh(folder)
    model = _flat_models(sizes, torch.float32, seed).llama
    write_state(folder, dict(model.state_dict()), fmt)
    write_config(folder, model.config.to_dict())
    write_tokenizer(folder, pose=None)
    return model

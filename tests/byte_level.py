"""Small byte-level tokenizers, laid out as those of GPT-2, SmolLM2, Llama 3 and Qwen, and learnt from this project's licence."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from chatpose_jax.models.config import ModelConfig, TextConfig, VisionConfig
from chatpose_jax.processing.processor import ModelIds, Processor
from chatpose_jax.processing.tokenizer import TextTokenizer, json_bytes

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THINK = ("<think>", "</think>")
# As transformers writes them for these families.
LLAMA3_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")


def _bytes(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated", invert=False), _bytes(False)])


# name -> pre-tokenizer, normaliser, control tokens, whether these are inside the base vocabulary, names of the settings
KINDS: Mapping[str, tuple[Any, Any, tuple[str, ...], bool, dict[str, str]]] = {
    "gpt2": (
        _bytes(True),
        None,
        CHATML,
        False,
        {"bos_token": CHATML[0], "eos_token": CHATML[0]},
    ),
    "smollm2": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes(True)]),
        None,
        (*CHATML, "<repo_name>", "jupyter"),
        True,
        {"bos_token": CHATML[1], "eos_token": CHATML[2], "pad_token": CHATML[2], "unk_token": CHATML[0]},
    ),
    "llama3": (
        _split(LLAMA3_REGEX),
        None,
        LLAMA3,
        False,
        {"bos_token": LLAMA3[0], "eos_token": LLAMA3[4]},
    ),
    "qwen": (
        _split(QWEN_REGEX),
        normalizers.NFC(),
        (*CHATML, *THINK, "<image>"),
        False,
        {"eos_token": CHATML[2], "pad_token": CHATML[0]},
    ),
}


@functools.cache
def backend(kind: str, pose: bool = True) -> tokenizers.Tokenizer:
    """A tokenizer of 700 pieces with its control tokens, and ``<POSE>`` behind them."""
    before, normaliser, control, inside, _ = KINDS[kind]
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoders.ByteLevel()
    if normaliser is not None:
        tokenizer.normalizer = normaliser
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(control) if inside else [],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = (Path(__file__).parents[1] / "LICENSE").read_text().splitlines(keepends=True)
    tokenizer.train_from_iterator(
        [*text, *50 * ["10 200 3000 isn't we'll naïve Zürich 日本語 🙂 \n\n  </s> <|im_ im_end|>\n"]], trainer
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=name not in THINK) for name in control])
    if kind == "llama3":  # writes BOS
        pairs = [(LLAMA3[0], tokenizer.token_to_id(LLAMA3[0]))]
        single = f"{LLAMA3[0]} $A"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=pairs
        )
    if pose:
        tokenizer.add_tokens([AddedToken("<POSE>", normalized=False, special=True)])
    return tokenizer


def settings(kind: str) -> dict[str, Any]:
    """The content of its ``tokenizer_config.json``."""
    family = {"qwen": "Qwen2Tokenizer", "smollm2": "GPT2Tokenizer", "gpt2": "GPT2Tokenizer"}
    return {"tokenizer_class": family.get(kind, "PreTrainedTokenizerFast"), "add_prefix_space": False, **KINDS[kind][4]}


def files(kind: str, pose: bool = True, **more: Any) -> dict[str, bytes]:
    """Its files, as transformers writes them. more: further settings."""
    return {
        "tokenizer.json": backend(kind, pose).to_str().encode(),
        "tokenizer_config.json": json_bytes(settings(kind) | more),
    }


@functools.cache
def text_tokenizer(kind: str) -> TextTokenizer:
    return TextTokenizer(backend(kind), kind, files(kind))


def model_config(kind: str, template: str, images: bool = True) -> ModelConfig:
    """A small model for the tokenizer, with images of 2 x 2 patches or none."""
    tokenizer = text_tokenizer(kind)
    end = "<|eot_id|>" if template.startswith("llama3") else "<|im_end|>"
    text = TextConfig(
        vocab_size=tokenizer.size,
        base_vocab_size=tokenizer.size - 1,
        hidden_size=64,
        num_heads=2,
        num_kv_heads=2,
        max_position_embeddings=512,
    )
    return ModelConfig(
        vision=VisionConfig(image_size=28) if images else None,
        text=text,
        pose_token_id=tokenizer.size - 1,
        image_token_id=tokenizer.control.get("<image>", -200),
        bos_token_id=-1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_token_id=tokenizer.control[end],
    )


def processor(kind: str, template: str, images: bool = True) -> Processor:
    return Processor(text_tokenizer(kind), ModelIds.of(model_config(kind, template, images)), template)


def write(folder: Path, kind: str, pose: bool = True, **more: Any) -> None:
    """Writes its files. more: further settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files(kind, pose, **more).items():
        (folder / name).write_bytes(content)


def fast_json(kind: str) -> dict[str, Any]:
    """A fresh copy of its ``tokenizer.json``, to be changed."""
    return json.loads(backend(kind).to_str())

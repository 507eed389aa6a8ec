"""Small GGUF files, written with the package ``gguf`` as llama.cpp's converter writes them: its names, its order of rows, its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PLAIN = ("<think>", "</think>")
"""Added tokens that Qwen3 does not call special."""
Types = gguf.GGMLQuantizationType
# Where the float16 scales of a block lie, in bytes.
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp stores the rows of LLaMA's q and k: j and j + D/2 of each head side by side."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def random_blocks(rng: np.random.Generator, kind: str, shape: Sequence[int]) -> np.ndarray:
    """Random bytes of a quantised matrix with finite scales around 0.01, as uint8."""
    size, nbytes = gguf.GGML_QUANT_SIZES[Types[kind]]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // size, nbytes), dtype=np.uint8)
    for place in SCALES[kind]:
        scales = rng.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Values in a type that the package can quantise."""
    return gguf.quantize(np.ascontiguousarray(values, np.float32), Types[kind])


def add(writer: gguf.GGUFWriter, name: str, data: np.ndarray, kind: str) -> None:
    writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else Types[kind])


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path,
    model: Any,
    tokenizer: Mapping[str, Any],
    kind: Callable[[str, np.ndarray], str] = lambda name, values: "F32",
    metadata: Mapping[str, Any] = {},
) -> dict[str, str]:
    """Writes a LLaMA, Qwen2 or Qwen3 of transformers. kind: its tensors' types. metadata: more values, or ``None`` to leave one out.

    Returns the names in transformers of what was written, and their types.
    """
    config, arch = model.config, model.config.model_type
    rope = config.rope_parameters
    values: dict[str, Any] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        "general.file_type": 0,
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if arch == "llama":
        values |= {"llama.vocab_size": config.vocab_size, "llama.rope.dimension_count": head_dim}
    if arch == "qwen3":
        values |= {"qwen3.attention.key_length": head_dim, "qwen3.attention.value_length": head_dim}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**values, **tokenizer, **metadata}.items():
        if value is not None:
            _add_value(writer, key, value)
    kinds = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            array = permuted(array, heads)
        stem, _, last = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            stem = f"blk.{layer}.{NAMES[stem]}"
        else:
            stem = NAMES[stem]
        kinds[name] = kind(name, array) if array.ndim > 1 else "F32"
        add(writer, f"{stem}.{last}", stored(array, kinds[name]), kinds[name])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    finish(writer)
    return kinds


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """As llama.cpp's converter computes them, one frequency at a time."""
    factors = []
    for exponent in range(0, head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (exponent / head_dim)
        context, low, high = (
            rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        if wave < context / high:
            factors.append(1)
        elif wave > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)


def byte_level(pre: str, control: Sequence[str], size: int = 512, *, first: bool = False) -> tokenizers.Tokenizer:
    """A byte-level tokenizer trained on the licence, whose text is split as the models with this ``tokenizer.ggml.pre`` split it. first: its control
    tokens have the first ids, as in SmolLM2; else the last, as in Llama 3 and Qwen.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    elif pre == "gpt-2":
        tokenizer.pre_tokenizer = whole
    else:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        split = pre_tokenizers.Split(tokenizers.Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated")
        parts = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, parts])
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - (0 if first else len(control)),
        special_tokens=list(control) if first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    tokenizer.train_from_iterator([text, text.upper(), "1999 2024 12 123 1234 3.14 10,000"], trainer)
    tokenizer.add_special_tokens([token for token in control if token not in PLAIN])
    tokenizer.add_tokens([token for token in control if token in PLAIN])
    return tokenizer


def byte_level_metadata(tokenizer: tokenizers.Tokenizer, pre: str, rows: int, **special: Any) -> dict[str, Any]:
    """Its metadata. rows: of the embedding. special: values of ``tokenizer.ggml.``."""
    data = json.loads(tokenizer.to_str())
    tokens = {id: token for token, id in tokenizer.get_vocab().items()}
    added = {token["id"]: 3 if token["special"] else 4 for token in data["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens.get(id, f"[PAD{id}]") for id in range(rows)],
        "tokenizer.ggml.token_type": [added.get(id, 1 if id in tokens else 5) for id in range(rows)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in data["model"]["merges"]],
        **{f"tokenizer.ggml.{key}": value for key, value in special.items()},
    }

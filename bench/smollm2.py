"""The real SmolLM2-135M: a LoRA step against torch + peft, and greedy decoding against transformers, each program in its faster dtype.

Step: rank 16 on all linear layers, 8 rows of 96 tokens, AdamW, clipping; ours is ``chatpose_jax.train.step``. Decoding: prompts of 64 tokens and 64
new ones, 1 and 8 rows; theirs is ``generate`` with its default cache. Both programs run in float32 and in bfloat16, all four in turn, in one
process. A round's ratio is the time of theirs in its faster dtype / the time of ours in its faster dtype: above 1, ours is faster. Losses must agree,
and in float32 all tokens.

    python bench/smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf [--rounds 5] [--only step decode-1] [--json smollm2.json]

The model is a GGUF file (``pip install gguf``) or a folder that transformers reads, such as one of ``chatpose export --format transformers``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import torch
from decoder import cores, random_ids
from llama import our_params
from lora_step import CLIP, RATE, jax_step
from transformers import AutoModelForCausalLM, LlamaConfig

from chatpose_jax.generate import generate
from chatpose_jax.models.config import LoRAConfig, ModelConfig, TextConfig
from chatpose_jax.train.allocator import keep_freed_memory

DTYPES = ("float32", "bfloat16")
LORA = LoRAConfig(
    rank=16,
    alpha=32.0,
    dropout=0.0,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
ROWS, TOKENS = 8, 96
PROMPT, NEW = 64, 64
CASES = ("step", "decode-1", "decode-8")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest difference of the losses of the first two steps; bfloat16 rounds them to about 1 in 256."""


def load(path: Path, dtype: str) -> Any:
    """transformers' model of a GGUF file or a folder."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype)).eval()


def text_config(config: LlamaConfig) -> TextConfig:
    return TextConfig(
        vocab_size=config.vocab_size,
        base_vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        max_position_embeddings=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
    )


def our_config(text: TextConfig, dtype: str, lora: LoRAConfig | None = None) -> ModelConfig:
    return ModelConfig(
        vision=None,
        text=text,
        lora=lora,
        pose_token_id=text.vocab_size - 1,
        eos_token_id=-1,
        scan_layers=False,
        dtype=dtype,
        param_dtype=dtype,
    )


def steps(path: Path, dtype: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """One step of ours, and one of peft's; each returns its loss."""
    base = load(path, dtype)
    text = text_config(base.config)
    settings = peft.LoraConfig(
        r=LORA.rank, lora_alpha=int(LORA.alpha), lora_dropout=0.0, target_modules=list(LORA.targets)
    )
    model = peft.get_peft_model(base, settings).train()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    ids = random_ids(ROWS, TOKENS, text.vocab_size)
    tokens = torch.from_numpy(ids).long()

    def theirs() -> float:
        optimizer.zero_grad()
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        return loss.item()

    ours = jax_step(our_config(text, dtype, LORA), ids, model)
    losses = [(ours(), theirs()) for _ in range(2)]
    gap = max(abs(a - b) for a, b in losses)
    if gap > TOLERANCE[dtype]:
        raise SystemExit(f"{dtype}: the losses differ by {gap:.2g}: {losses}")
    return ours, theirs


def decoders(path: Path, dtype: str, rows: int) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Ours and transformers' greedy answers (rows, NEW) to the same prompts."""
    model = load(path, dtype)
    model.generation_config.eos_token_id = None  # all write the same count of tokens
    text = text_config(model.config)
    config = our_config(text, dtype)
    params = jax.block_until_ready(our_params(model, config))
    ids = random_ids(rows, PROMPT, text.vocab_size)
    tensor = torch.from_numpy(ids).long()

    def ours() -> np.ndarray:
        return np.stack(generate(config, params, list(ids), max_new_tokens=NEW).tokens)

    @torch.inference_mode()
    def theirs() -> np.ndarray:
        output = model.generate(
            tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=NEW, do_sample=False, use_cache=True
        )
        return output[:, PROMPT:].numpy()

    same = float((ours() == theirs()).mean())
    if dtype == "float32" and same < 1:
        raise SystemExit(f"only {same:.0%} of the tokens are those of transformers")
    return ours, theirs


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call, and the processor seconds of this process meanwhile."""
    before, start = os.times(), time.perf_counter()
    function()
    seconds, after = time.perf_counter() - start, os.times()
    return seconds, after.user + after.system - before.user - before.system


def compare(case: str, path: Path, rounds: int) -> dict[str, Any]:
    """Times all four in turn; prints a row for each dtype and one for the faster dtypes."""
    pairs = {dtype: steps(path, dtype) if case == "step" else decoders(path, dtype, int(case[7:])) for dtype in DTYPES}
    gc.collect()
    calls = {(side, dtype): pairs[dtype][i] for dtype in DTYPES for i, side in enumerate(("ours", "theirs"))}
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in sorted(calls, reverse=turn % 2 == 1):
            taken[name].append(timed(calls[name]))

    def middle(name: tuple[str, str], which: int) -> float:
        return statistics.median(entry[which] for entry in taken[name])

    fastest = {side: min(DTYPES, key=lambda dtype: middle((side, dtype), 0)) for side in ("ours", "theirs")}
    ours, theirs = (taken[side, fastest[side]] for side in ("ours", "theirs"))
    ratios = sorted(b[0] / a[0] for a, b in zip(ours, theirs))
    for dtype in DTYPES:
        cells = [f"{middle((side, dtype), 0):.2f} s ({middle((side, dtype), 1):.2f})" for side in ("ours", "theirs")]
        print(f"| {case} | {dtype} | {' | '.join(cells)} | |", flush=True)
    print(
        f"| {case} | {fastest['ours']}, {fastest['theirs']} | | "
        f"| **{statistics.median(ratios):.2f}** ({ratios[0]:.2f}–{ratios[-1]:.2f}) |",
        flush=True,
    )
    return {
        "case": case, "ratios": ratios, "fastest": fastest,
        "seconds": {f"{side} {dtype}": times for (side, dtype), times in taken.items()},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file, or a folder that transformers reads")
    parser.add_argument("--rounds", type=int, default=5, help="how often each of the four is timed")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--json", help="file to write all times to")
    args = parser.parse_args(argv)
    torch.set_num_threads(cores())
    keep_freed_memory()  # for both, as chatpose train does it
    print("| case | dtype (ours, theirs) | ours: seconds (of processors) | theirs | theirs / ours (lowest–highest) |")
    print("|" + "---|" * 5)
    rows = [compare(case, args.model, args.rounds) for case in args.only]
    if args.json:
        machine = {"machine": platform.processor(), "cores": cores()}
        Path(args.json).write_text(json.dumps({**machine, "rows": rows}, indent=2))
    return rows


if __name__ == "__main__":
    main()

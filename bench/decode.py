"""Greedy decoding: tokens a second of ``chatpose_jax.generate`` against transformers' ``generate`` (sdpa).

Both write the same count of tokens from the same random LLaMA (322 M parameters) and prompt; prefill is inside the
clock, compilation is not. The ratio is torch time / JAX time of interleaved pairs: above 1, JAX is faster.

    python bench/decode.py [--preset small] [--want 5] [--only float32-64-1] [--json decode.json]
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from decoder import SIZES, cores, our_config, random_ids
from llama import our_params, torch_llama
from pairs import paired

from chatpose_jax.generate import generate

CASES = ((64, 48, 1), (640, 32, 1), (64, 32, 8), (640, 32, 8))
"""(prompt, new tokens, batch)"""


def contenders(
    text: Any, prompt: int, new: int, batch: int, model: Any, params: Any, config: Any
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Two functions that return the (batch, new) tokens of JAX and of torch."""
    ids = random_ids(batch, prompt, text.vocab_size)

    def ours() -> np.ndarray:
        return np.stack(generate(config, params, list(ids), max_new_tokens=new).tokens)

    tensor = torch.from_numpy(ids).long()

    @torch.inference_mode()
    def theirs() -> np.ndarray:
        output = model.generate(
            tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=new, do_sample=False, use_cache=True
        )
        return output[:, prompt:].numpy()

    return ours, theirs


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("full", "small"), default="full")
    parser.add_argument("--want", type=int, default=5, help="pairs to keep for each case")
    parser.add_argument("--tries", type=int, default=20, help="pairs to time at most")
    parser.add_argument(
        "--patience", type=float, default=20, help="seconds to wait for a quiet moment before each pair"
    )
    parser.add_argument("--only", help="one case, such as float32-64-1")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args(argv)
    torch.set_num_threads(cores())
    text, rows = SIZES[args.preset], []
    print("| dtype | prompt/new/batch | JAX tok/s | torch tok/s | torch / JAX time | spread | pairs | same tokens |")
    print("|" + "---|" * 8)
    for dtype in ("float32", "bfloat16"):
        cases = [case for case in CASES if args.only in (None, f"{dtype}-{case[0]}-{case[2]}")]
        if not cases:
            continue
        model, config = torch_llama(text, dtype), our_config(text, dtype, scan=False)
        params = jax.block_until_ready(our_params(model, config))
        for prompt, new, batch in cases:
            ours, theirs = contenders(text, prompt, new, batch, model, params, config)
            same = float((ours() == theirs()).mean())
            result = paired(theirs, ours, want=args.want, tries=args.tries, patience=args.patience)
            slow, fast = result.spread
            row = {
                "dtype": dtype, "prompt": prompt, "new": new, "batch": batch, "same_tokens": same,
                "torch_seconds": result.best[0], "jax_seconds": result.best[1],
                "ratio": result.ratio, "spread": [slow, fast], "pairs": len(result.pairs), "quiet": result.tried > 0,
            }  # fmt: skip
            rows.append(row)
            rates = (f"{batch * new / seconds:.1f}" for seconds in reversed(result.best))
            quiet = "" if row["quiet"] else " (none quiet)"
            print(
                f"| {dtype} | {prompt}/{new}/{batch} | {' | '.join(rates)} | **{result.ratio:.2f}** "
                f"| {slow:.2f}–{fast:.2f} | {row['pairs']}{quiet} | {same:.0%} |",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(
            json.dumps({"machine": platform.processor(), "cores": cores(), "rows": rows}, indent=2)
        )
    return rows


if __name__ == "__main__":
    main()

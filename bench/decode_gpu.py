"""Greedy decoding of 13B on one GPU: milliseconds a token beside what the memory's bandwidth allows, and beside transformers (sdpa).

The bound is the time in which the card reads all weights and the rows' keys and values once, at its maker's bandwidth. Prefill and
compilation are timed apart. JAX is ``chatpose_jax.generate`` with unrolled layers, as ``chatpose_jax.load`` runs it; transformers is
``generate`` with its default cache. Weights are random. ``--only`` runs one of the two, with the same arguments on the same card.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python bench/decode_gpu.py [--batch 1 16] [--quantize int8] [--json decode.json]
    python bench/decode_gpu.py --preset small                  # on any machine: shows that it works
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from decoder import SIZES, card, our_config, peak_memory, random_ids, random_params, write

from chatpose_jax.generate import generate_stream
from chatpose_jax.models.config import TextConfig
from chatpose_jax.train.flops import decode_cost

Run = Callable[[int, int, int], tuple[float, float]]
"""(batch, prompt, new) -> seconds until the first token, and seconds of each of the others."""


def ours(text: TextConfig, quantize: str) -> Run:
    """This project's loop: it hands out the first token, then all others at once."""
    config = our_config(text, "bfloat16", scan=False).replace(quantize=quantize)
    params = jax.block_until_ready(random_params(config))

    def run(batch: int, prompt: int, new: int) -> tuple[float, float]:
        ids = list(random_ids(batch, prompt, text.vocab_size))
        begin = time.perf_counter()
        pieces = generate_stream(config, params, ids, max_new_tokens=new, stream_every=new)
        next(pieces)
        first = time.perf_counter()
        count = sum(piece.shape[1] for piece, _ in pieces)
        assert count == new - 1, count
        return first - begin, (time.perf_counter() - first) / count

    return run


def theirs(text: TextConfig) -> Run:
    """transformers' ``generate``: the time of one token, and that of each more."""
    import torch
    from llama import llama_on_card

    model = llama_on_card(text).eval()

    @torch.inference_mode()
    def seconds(ids: Any, new: int) -> float:
        begin = time.perf_counter()
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True)
        assert output.shape[1] == ids.shape[1] + new
        output.cpu()
        return time.perf_counter() - begin

    def run(batch: int, prompt: int, new: int) -> tuple[float, float]:
        ids = torch.from_numpy(random_ids(batch, prompt, text.vocab_size)).long().to(model.device)
        first = seconds(ids, 1)
        return first, max(seconds(ids, new) - first, 0.0) / (new - 1)

    return run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("13b", "small"), default="13b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=600)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantize", default="none", help="model.quantize of the JAX model")
    parser.add_argument("--only", choices=("jax", "torch"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.preset == "small":
        args.prompt, args.new = min(args.prompt, 40), min(args.new, 16)
    text = SIZES[args.preset]
    device, chip = card()
    # With torch alone JAX only does sums of the bound, and must not take the card's memory.
    config = our_config(text, "bfloat16", scan=False).replace(quantize=args.quantize)
    result: dict[str, Any] = {
        "device": device, "preset": args.preset, "prompt": args.prompt, "new": args.new, "quantize": args.quantize, "rows": [],
    }  # fmt: skip
    makers = {"torch": lambda: theirs(text), "jax": lambda: ours(text, args.quantize)}
    print(f"{device}, prompt {args.prompt}, {args.new} new tokens, base {args.quantize}", flush=True)
    for name in [args.only] if args.only else ["torch", "jax"]:
        run = makers[name]()
        for batch in args.batch:
            cost = decode_cost(config, batch, args.prompt + args.new // 2)
            bound = None if chip is None else (cost.weights + cost.activations) / chip.bandwidth
            begin = time.perf_counter()
            run(batch, args.prompt, args.new)  # compiles
            warm = time.perf_counter() - begin
            runs = [run(batch, args.prompt, args.new) for _ in range(args.repeats)]
            first, each = (statistics.median(values) for values in zip(*runs))
            row = {
                "program": name, "batch": batch, "prefill_seconds": first, "token_seconds": each,
                "token_seconds_of_runs": [each for _, each in runs], "tokens_per_second": batch / each,
                "bound_seconds": bound, "warm_up_seconds": warm, "peak_bytes": peak_memory() if name == "jax" else None,
            }  # fmt: skip
            result["rows"].append(row)
            write(args.json, result)
            share = "" if bound is None else f"  {100 * bound / each:.0f} % of the bound of {1000 * bound:.2f} ms"
            print(
                f"{name:6} batch {batch:<3} {1000 * each:8.2f} ms a token  {batch / each:9,.1f} tokens/s{share}  "
                f"prefill {1000 * first:.0f} ms  (warm-up {warm:.0f} s)",
                flush=True,
            )
        del run
    return result


if __name__ == "__main__":
    main()

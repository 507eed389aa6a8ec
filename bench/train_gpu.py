"""One 13B LoRA training step on one GPU (rank 128 on q and v, dropout 0.05, AdamW, bfloat16) against torch + peft on the same card.

torch runs SDPA attention with gradient checkpointing and fused AdamW; JAX is ``chatpose_jax.train.step`` with the remat
policy given. Both see the same ids; weights are random, so the losses say only that both train. The two take turns in one
process and never stand in memory together; ``--only`` runs one of them. Model FLOPs count what LoRA needs: 4 for each parameter
and token, and attention (``chatpose_jax.train.flops``); recomputation is not useful work. ``bound_seconds`` is the time of all
products of the JAX step, recomputed ones too, at the maker's peak.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python bench/train_gpu.py --batch 16 --remat full [--json gpu.json]
    python bench/train_gpu.py --preset small --steps 2        # on any machine: shows that it works
    JAX_PLATFORMS=cpu python bench/train_gpu.py --only plan --card h200   # what `chatpose plan` says of this step's memory
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from decoder import SIZES, card, our_config, peak_memory, random_ids, random_params, write

from chatpose_jax.models.config import LoRAConfig, TextConfig
from chatpose_jax.models.remat import POLICIES
from chatpose_jax.train.chips import CHIPS, GiB, chip_of
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.flops import train_cost
from chatpose_jax.train.step import init_state, make_step
from chatpose_jax.train.trainable import Rule
from smpl_jax.pose import complete, unmeasured

PRESETS = {"13b": LoRAConfig(), "small": LoRAConfig(rank=4, alpha=8.0)}
RATE = 1e-4


def torch_step(text: TextConfig, lora: LoRAConfig, ids: np.ndarray) -> Callable[[], float]:
    """A function that takes one step of peft's model and returns the loss."""
    import peft
    import torch
    from llama import llama_on_card

    base = llama_on_card(text)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapters = peft.LoraConfig(
        r=lora.rank, lora_alpha=int(lora.alpha), lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    model = peft.get_peft_model(base, adapters).train()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, fused=base.device.type == "cuda")
    tokens = torch.from_numpy(ids).long().to(base.device)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return loss.item()

    return step


def torch_memory() -> float | None:
    """Most bytes that torch had in use since the last call, and what it holds for nothing given back."""
    import torch

    if not torch.cuda.is_available():
        return None
    most = float(torch.cuda.max_memory_allocated())
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


def jax_step(
    text: TextConfig, lora: LoRAConfig, ids: np.ndarray, settings: TrainConfig, quantize: str
) -> Callable[[], float]:
    """The same for this project's step."""
    config = our_config(text, "bfloat16", scan=True, lora=lora).replace(quantize=quantize)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "pose_index": np.zeros((len(ids), 1), np.int32),
        "poses": complete(unmeasured((len(ids), 1))),
        "pose_mask": np.zeros((len(ids), 1), bool),
    }
    params = random_params(config)
    state, frozen = init_state(settings, params)
    update = make_step(config, settings, params)
    held = [state]

    def step() -> float:
        held[0], metrics = update(held[0], frozen, batch)
        return float(metrics["text"])

    return step


def planned(
    text: TextConfig, lora: LoRAConfig, settings: TrainConfig, length: int, target: str, quantize: str
) -> dict[str, Any]:
    """What ``chatpose plan`` says of this project's step on ``target``."""
    from chatpose_jax.planning.plan import describe_plan, plan_training
    from chatpose_jax.planning.targets import parse

    config = our_config(text, "bfloat16", scan=True, lora=lora).replace(quantize=quantize)
    plan = plan_training(config, settings, parse(target), (1, 1, 1), length, images=0)
    print(describe_plan(plan), flush=True)
    return plan.to_json()


def timed(step: Callable[[], float], steps: int) -> tuple[float, list[float], list[float]]:
    """Seconds of the first step, with compilation; seconds and losses of ``steps`` steps after the second (autotuning)."""
    begin = time.perf_counter()
    losses = [step()]
    first = time.perf_counter() - begin
    losses.append(step())
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    return first, seconds, losses


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="13b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--remat", choices=tuple(POLICIES), default="full")
    parser.add_argument("--quantize", default="none", help="model.quantize of the JAX step")
    parser.add_argument("--card", choices=(*CHIPS, "cpu"), help="whose peak the MFU is taken of; by default this one")
    parser.add_argument("--only", choices=("jax", "torch", "plan"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    text, lora = SIZES[args.preset], PRESETS[args.preset]
    if args.preset == "small":
        args.length = min(args.length, 64)
    ids = random_ids(args.batch, args.length, text.vocab_size)
    settings = TrainConfig(
        batch_size=args.batch,
        accumulate=1,
        learning_rate=RATE,
        warmup_steps=0,
        final_lr_ratio=1.0,
        trainable=(Rule(".*/lora_[ab]", 1.0), Rule(".*", None)),
        remat=args.remat,
    )
    chip = args.card or chip_of(jax.devices()[0].device_kind)
    cost = train_cost(our_config(text, "bfloat16", scan=True, lora=lora), settings, args.batch, args.length, images=0)
    peak = None if chip in (None, "cpu") else CHIPS[chip].flops
    result: dict[str, Any] = {
        "device": card()[0], "card": chip, "preset": args.preset, "batch": args.batch, "length": args.length,
        "remat": args.remat, "quantize": args.quantize, "flops": dataclasses.asdict(cost),
        "bound_seconds": peak and cost.hardware / peak,
    }  # fmt: skip
    if args.only == "plan":
        jax.config.update("jax_enable_compilation_cache", False)  # another machine's program cannot be loaded from it
        target = "cpu:1" if chip in (None, "cpu") else chip
        result["plan"] = planned(text, lora, settings, args.length, target, args.quantize)
        write(args.json, result)
        return result
    makers = {
        "torch": lambda: torch_step(text, lora, ids),
        "jax": lambda: jax_step(text, lora, ids, settings, args.quantize),
    }
    print(f"{result['device']}, {args.batch} × {args.length} tokens, remat {args.remat}, base {args.quantize}")
    for name in [args.only] if args.only else ["torch", "jax"]:
        first, seconds, losses = timed(makers[name](), args.steps)
        memory = torch_memory() if name == "torch" else peak_memory()
        gc.collect()
        median = statistics.median(seconds)
        rate, mfu = args.batch * args.length / median, None if peak is None else cost.useful / median / peak
        result[name] = {
            "first_step": first, "seconds": seconds, "losses": losses, "tokens_per_second": rate, "mfu": mfu,
            "peak_bytes": memory,
        }  # fmt: skip
        write(args.json, result)
        print(
            f"{name:6} {median:8.3f} s a step ({min(seconds):.3f}–{max(seconds):.3f}; the first {first:.0f} s)  {rate:10,.0f} tokens/s  "
            + (f"LoRA-MFU {100 * mfu:.1f} % of one {chip}  " if mfu is not None else "")
            + (f"peak {memory / GiB:.2f} GiB  " if memory is not None else "")
            + f"loss {losses[0]:.3f} → {losses[-1]:.3f}",
            flush=True,
        )
    if not args.only:
        result["ratio"] = result["jax"]["tokens_per_second"] / result["torch"]["tokens_per_second"]
        print(f"torch time / JAX time: {result['ratio']:.2f}")
        write(args.json, result)
    return result


if __name__ == "__main__":
    main()

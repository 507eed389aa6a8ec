"""One 13B LoRA training step on one GPU (rank 128 on q and v, dropout 0.05, AdamW, bfloat16) against torch + peft on the same card.

torch runs SDPA attention with gradient checkpointing and fused AdamW; JAX is ``chatpose_jax.train.step`` with the remat
policy given. Both see the same ids; weights are random, so the losses say only that both train. The two take turns in one
process and never stand in memory together. Model FLOPs count what LoRA needs: 4 for each parameter and token, and attention
(``chatpose_jax.train.flops``); recomputation is not useful work.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python bench/train_gpu.py --batch 16 --remat full [--json gpu.json]
    python bench/train_gpu.py --preset small --steps 2        # on any machine: shows that it works
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import torch
from llama import SIZES, our_config, random_ids
from transformers import LlamaConfig, LlamaForCausalLM

from chatpose_jax.models.chatpose import init_params
from chatpose_jax.models.config import LoRAConfig, TextConfig
from chatpose_jax.models.remat import POLICIES
from chatpose_jax.train.chips import CHIPS
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.flops import train_cost
from chatpose_jax.train.step import init_state, make_step
from chatpose_jax.train.trainable import Rule
from smpl_jax.pose import complete, unmeasured

PRESETS = {
    "13b": (TextConfig(vocab_size=32000), LoRAConfig()),
    "small": (SIZES["small"], LoRAConfig(rank=4, alpha=8.0)),
}
RATE = 1e-4


def torch_step(text: TextConfig, lora: LoRAConfig, ids: np.ndarray) -> Callable[[], float]:
    """A function that takes one step of peft's model and returns the loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        rms_norm_eps=text.rms_norm_eps,
        max_position_embeddings=text.max_position_embeddings,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):  # 13B parameters are made where they stay
            base = LlamaForCausalLM(settings)
    finally:
        torch.set_default_dtype(torch.float32)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapters = peft.LoraConfig(
        r=lora.rank, lora_alpha=int(lora.alpha), lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    model = peft.get_peft_model(base, adapters).train()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, fused=device == "cuda")
    tokens = torch.from_numpy(ids).long().to(device)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return loss.item()

    return step


def jax_step(text: TextConfig, lora: LoRAConfig, ids: np.ndarray, settings: TrainConfig) -> Callable[[], float]:
    """The same for this project's step."""
    config = our_config(text, "bfloat16", scan=True, lora=lora)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "pose_index": np.zeros((len(ids), 1), np.int32),
        "poses": complete(unmeasured((len(ids), 1))),
        "pose_mask": np.zeros((len(ids), 1), bool),
    }
    params = init_params(config, jax.random.key(0))
    state, frozen = init_state(settings, params)
    update = make_step(config, settings, params)
    held = [state]

    def step() -> float:
        held[0], metrics = update(held[0], frozen, batch)
        return float(metrics["text"])

    return step


def timed(step: Callable[[], float], steps: int) -> tuple[list[float], list[float]]:
    """Seconds and losses of ``steps`` steps, the first two apart (compilation, autotuning) left out of the seconds."""
    losses = [step(), step()]
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    return seconds, losses


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="13b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--remat", choices=tuple(POLICIES), default="full")
    parser.add_argument("--card", choices=tuple(CHIPS), default="h200", help="whose peak the MFU is taken of")
    parser.add_argument("--only", choices=("jax", "torch"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    text, lora = PRESETS[args.preset]
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
    cost = train_cost(our_config(text, "bfloat16", scan=True, lora=lora), settings, args.batch, args.length, images=0)
    makers = {
        "torch": lambda: torch_step(text, lora, ids),
        "jax": lambda: jax_step(text, lora, ids, settings),
    }
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else jax.devices()[0].device_kind,
        "preset": args.preset, "batch": args.batch, "length": args.length, "remat": args.remat,
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "peft": peft.__version__},
        "flops": dataclasses.asdict(cost),
    }  # fmt: skip
    print(f"{result['device']}, {args.batch} × {args.length} tokens, remat {args.remat}")
    for name in [args.only] if args.only else ["torch", "jax"]:
        seconds, losses = timed(makers[name](), args.steps)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        median = statistics.median(seconds)
        rate, mfu = args.batch * args.length / median, cost.useful / median / CHIPS[args.card].flops
        result[name] = {"seconds": seconds, "losses": losses, "tokens_per_second": rate, "mfu": mfu}
        print(
            f"{name:6} {median:8.3f} s a step ({min(seconds):.3f}–{max(seconds):.3f})  {rate:10,.0f} tokens/s  "
            f"LoRA-MFU {100 * mfu:.1f} % of one {args.card}  loss {losses[0]:.3f} → {losses[-1]:.3f}",
            flush=True,
        )
    if not args.only:
        result["ratio"] = result["jax"]["tokens_per_second"] / result["torch"]["tokens_per_second"]
        print(f"torch time / JAX time: {result['ratio']:.2f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()

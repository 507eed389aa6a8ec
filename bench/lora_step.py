"""One LoRA training step (rank 16 on q and v, AdamW, cross-entropy) against torch + peft, with and without rematerialisation.

Both train the same random LLaMA (322 M parameters) on the same batch; their losses over the first three steps must agree
before anything is timed. The ratio is torch time / JAX time of interleaved pairs: above 1, JAX is faster. The JAX step is
``chatpose_jax.train.step``, with all that it does besides: accuracy, clipping (torch clips too), the check of finite numbers.
Layers are unrolled or scanned as ``layers`` says.

    python bench/lora_step.py [--preset small] [--want 3] [--only bfloat16-remat-scan] [--json lora.json]
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from decoder import SIZES, cores, our_config, random_ids
from llama import our_params, torch_llama
from pairs import paired

from chatpose_jax.models.config import LoRAConfig, ModelConfig
from chatpose_jax.train.allocator import keep_freed_memory
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.layout import lay_out
from chatpose_jax.train.step import init_state, make_step
from chatpose_jax.train.trainable import Rule
from smpl_jax.pose import complete, unmeasured

RATE = 1e-3
CLIP = 1.0
LORA = LoRAConfig(rank=16, alpha=32.0, dropout=0.0)
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest difference of the losses of the first steps; bfloat16 rounds them to about 1 in 256."""


def torch_step(text: Any, dtype: str, remat: bool, ids: np.ndarray) -> tuple[Any, Callable[[], float]]:
    """The peft model, and a function that takes one step and returns its loss."""
    base = torch_llama(text, dtype)
    settings = peft.LoraConfig(
        r=LORA.rank, lora_alpha=int(LORA.alpha), lora_dropout=0.0, target_modules=list(LORA.targets)
    )
    if remat:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(base, settings).train()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    tokens = torch.from_numpy(ids).long()

    def step() -> float:
        optimizer.zero_grad()
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        return loss.item()

    return model, step


def jax_step(config: ModelConfig, ids: np.ndarray, model: Any, remat: bool = False) -> Callable[[], float]:
    """The same for JAX, from the same weights; layers lie as ``config`` says."""
    settings = TrainConfig(
        batch_size=len(ids),
        accumulate=1,
        learning_rate=RATE,
        warmup_steps=0,
        final_lr_ratio=1.0,  # a constant rate, as torch's
        grad_clip=CLIP,
        lambda_pose=0.0,
        trainable=(Rule(".*/lora_[ab]", 1.0), Rule(".*", None)),
        remat="full" if remat else "none",
    )
    batch = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "labels": ids,
        "pose_index": np.zeros((len(ids), 1), np.int32),
        "poses": complete(unmeasured((len(ids), 1))),
        "pose_mask": np.zeros((len(ids), 1), bool),
    }
    params = our_params(model, config.replace(scan_layers=True))
    state, frozen = init_state(settings, params)
    update = make_step(config, settings, params)
    held, frozen = [state], lay_out(frozen, config, consume=True)

    def step() -> float:
        held[0], metrics = update(held[0], frozen, batch)
        return float(metrics["text"])

    return step


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("full", "small"), default="full")
    parser.add_argument("--tokens", type=int, help="tokens of each of the two rows; fewer where the peer takes minutes")
    parser.add_argument("--want", type=int, default=3, help="pairs to keep for each case")
    parser.add_argument("--tries", type=int, default=12, help="pairs to time at most")
    parser.add_argument(
        "--patience", type=float, default=20, help="seconds to wait for a quiet moment before each pair"
    )
    parser.add_argument("--only", help="one case, such as bfloat16-remat-scan or float32-plain-loop")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args(argv)
    torch.set_num_threads(cores())
    keep_freed_memory()  # for both, as chatpose train does it
    text, rows = SIZES[args.preset], []
    ids = random_ids(2, args.tokens or {"full": 256, "small": 32}[args.preset], text.vocab_size)
    print("| dtype | remat | layers | JAX s | torch s | torch / JAX time | spread | pairs | losses of 3 steps |")
    print("|" + "---|" * 9)
    for dtype in ("float32", "bfloat16"):
        for remat in (False, True):
            for scan in (False, True):
                name = f"{dtype}-{'remat' if remat else 'plain'}-{'scan' if scan else 'loop'}"
                if args.only not in (None, name):
                    continue
                model, theirs = torch_step(text, dtype, remat, ids)
                ours = jax_step(our_config(text, dtype, scan=scan, lora=LORA), ids, model, remat)
                losses = [(ours(), theirs()) for _ in range(3)]
                gap = max(abs(a - b) for a, b in losses)
                if gap > TOLERANCE[dtype]:
                    raise SystemExit(f"{name}: the losses differ by {gap:.2g}: {losses}")
                result = paired(theirs, ours, want=args.want, tries=args.tries, patience=args.patience)
                slow, fast = result.spread
                row = {
                    "dtype": dtype, "remat": remat, "scan": scan, "losses": losses,
                    "torch_seconds": result.best[0], "jax_seconds": result.best[1],
                    "ratio": result.ratio, "spread": [slow, fast], "pairs": len(result.pairs), "quiet": result.tried > 0,
                }  # fmt: skip
                rows.append(row)
                quiet = "" if row["quiet"] else " (none quiet)"
                print(
                    f"| {dtype} | {'yes' if remat else 'no'} | {'scanned' if scan else 'unrolled'} "
                    f"| {result.best[1]:.2f} | {result.best[0]:.2f} | **{result.ratio:.2f}** | {slow:.2f}–{fast:.2f} "
                    f"| {row['pairs']}{quiet} | within {gap:.1g} |",
                    flush=True,
                )
    if args.json:
        Path(args.json).write_text(
            json.dumps({"machine": platform.processor(), "cores": cores(), "rows": rows}, indent=2)
        )
    return rows


if __name__ == "__main__":
    main()

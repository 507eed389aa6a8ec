"""A LoRA step of SmolLM2-135M's shape: layers scanned or unrolled, and adapters on the last layers alone, with and without kept states.

python bench/layers.py                          # every row, each in a process of its own, for its peak memory
python bench/layers.py --rows unrolled --dtype float32

The weights are random, which takes as long. Times of the processor count all threads of the process; on a busy machine they say more than the clock.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

ROWS = ("scanned", "unrolled", "scanned-last", "unrolled-last", "kept")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def measure(name: str, dtype: str, batch: int, length: int, last: int, steps: int, remat: str) -> str:
    from chatpose_jax.train.allocator import keep_freed_memory

    keep_freed_memory()
    import jax

    from chatpose_jax.models.chatpose import abstract_params, fake_batch, init_params
    from chatpose_jax.models.config import LoRAConfig, ModelConfig, TextConfig
    from chatpose_jax.train.config import TrainConfig
    from chatpose_jax.train.kept import KeptStates
    from chatpose_jax.train.layout import lay_out
    from chatpose_jax.train.step import init_state, make_step
    from chatpose_jax.train.trainable import PAPER

    text = TextConfig(
        vocab_size=49153, base_vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
        head_dim=64, rope_theta=1e5, max_position_embeddings=8192, tied=True,
    )  # fmt: skip
    behind = name.endswith("last") or name == "kept"
    lora = LoRAConfig(rank=16, alpha=32.0, dropout=0.0, targets=TARGETS, last_layers=last if behind else None)
    stacked = ModelConfig(vision=None, text=text, lora=lora, pose_token_id=49152, dtype=dtype, param_dtype=dtype)
    config = stacked.replace(scan_layers=name.startswith("scanned"))
    rules = tuple(rule for rule in PAPER if not behind or "embed_tokens" not in rule.pattern)
    settings = TrainConfig(batch_size=batch, accumulate=1, remat=remat, trainable=rules)
    state, frozen = init_state(settings, init_params(stacked, jax.random.key(0)))
    frozen = lay_out(frozen, config, consume=True)
    step = make_step(config, settings, abstract_params(stacked))
    kept = KeptStates(config, settings, frozen, None) if name == "kept" else None
    data, clock, busy = fake_batch(config, batch, length), [], []
    for _ in range(steps + 1):
        begin, work = time.perf_counter(), time.process_time()
        state, metrics = step(state, frozen, data if kept is None else kept(data))
        jax.block_until_ready(metrics)
        clock.append(time.perf_counter() - begin)
        busy.append(time.process_time() - work)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"| {name} | {dtype} | {clock[0]:.0f} | {min(clock[1:]):.2f} | {statistics.median(clock[1:]):.2f} | "
        f"{min(busy[1:]):.2f} | {memory:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--last", type=int, default=10, help="layers with adapters in the last three rows")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--one", action="store_true", help="measure in this process")
    args = parser.parse_args()
    if args.one:
        print(measure(args.rows[0], args.dtype[0], args.batch, args.length, args.last, args.steps, args.remat))
        return
    print(
        "| layers | dtype | first step s | least s | median s | least s of the processor | peak GiB |\n|---|---|---|---|---|---|---|"
    )
    for dtype in args.dtype:
        for name in args.rows:
            numbers = {
                "batch": args.batch,
                "length": args.length,
                "last": args.last,
                "steps": args.steps,
                "remat": args.remat,
            }
            words = [str(word) for key, value in numbers.items() for word in (f"--{key}", value)]
            command = [sys.executable, __file__, "--one", "--rows", name, "--dtype", dtype, *words]
            done = subprocess.run(command, capture_output=True, text=True)
            print(done.stdout.strip() or f"{name} {dtype} failed: {done.stderr[-500:]}", flush=True)


if __name__ == "__main__":
    main()

"""``chatpose train``: the command line and the exit status of ``train.run``."""

from __future__ import annotations

import argparse
import sys

from chatpose_jax.cli.compiled import keep_compiled, no_other_caches
from chatpose_jax.cli.flags import add_config, address, head_flag
from chatpose_jax.errors import UserError
from chatpose_jax.storage import reachable
from chatpose_jax.train import hosts
from chatpose_jax.train.allocator import cpu_only, keep_freed_memory
from chatpose_jax.train.run import run_training
from chatpose_jax.train.run_config import load_config
from chatpose_jax.train.trainer import Interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose train``."""
    add_config(parser, "tiny")
    parser.add_argument(
        "--out",
        required=True,
        type=address,
        help="run folder, on a disk or a bucket (gs://…, s3://…): checkpoints/, tensorboard/, metrics.jsonl, model/",
    )
    parser.add_argument(
        "--init",
        type=address,
        help="model folder to start from (chatpose convert writes one); its towers replace the configuration's, "
        "model.lora and model.head set adapters and pose head",
    )
    parser.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="trace this many steps into OUT/profile"
    )
    several = parser.add_argument_group(
        "several processes", "detected on Cloud TPU, GKE and SLURM; elsewhere give all three options to each process"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address on which process 0 listens")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")


def run(args: argparse.Namespace) -> int:
    """Trains. Exit status: 0 when complete, ``hosts.STOPPED`` (143) when a signal stopped it, ``hosts.LOST`` (75) when another process is gone.
    The same command resumes from either. Raises ``hosts.Fault`` (1) when the file system fails during the run.
    """
    if cpu_only():
        keep_freed_memory()
    config = load_config(args.config, args.overrides)
    with hosts.restartable(args.out, starting=True), reachable(args.out):
        a_file = args.out.exists() and not args.out.is_dir()
    if a_file:
        raise UserError(f"--out {args.out} is a file: expected a folder, which is made where there is none")
    no_other_caches()
    others = hosts.find_processes(args.coordinator, args.num_processes, args.process_id)
    if others is None:
        keep_compiled()
    hosts.connect(others)
    try:
        with hosts.announced(ending), hosts.restartable(args.out, starting=True), hosts.together(args.out):
            out = run_training(config, args.out, init=args.init, profile=args.profile)
    except Interrupted as stop:
        if hosts.primary():
            print(f"\n{stop}", file=sys.stderr)
        return hosts.STOPPED
    hosts.say(
        f"model folder: {out}\nask it: chatpose chat {out}{head_flag(config.model.head.name)} "
        '--prompt "Someone kneels. Can you give the SMPL pose?"'
    )
    return 0


def ending() -> str:
    """The message after a Ctrl-C when there is nothing to save."""
    return "ending after the computation under way"

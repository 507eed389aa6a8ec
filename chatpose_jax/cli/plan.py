"""``chatpose plan``: does a step fit a machine, and how fast could it be? It is compiled here; the machine need not be present."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from chatpose_jax.cli.flags import add_config, read_mesh
from chatpose_jax.errors import UserError
from chatpose_jax.train.config import MeshConfig
from chatpose_jax.train.run_config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose plan``."""
    add_config(parser, "chatpose_13b", "train.remat=save_qkv")
    parser.add_argument(
        "--target",
        required=True,
        help="v5e-16, v5p-128, v4-32, v6e-8 as Google names slices, or chip:topology (v5e:4x4, v5p:4x4x4); h100, h200, a100 (80 GB), "
        "a100-40, l4, a10g, rtx4090, rtx3090, rtx3060, rtx4060 with :COUNT for more than one; cpu:8; "
        "*N after any of them for N slices (v5e:8x8*2) or N machines (h100:8*4)",
    )
    parser.add_argument(
        "--batch", type=int, help="rows of a step, by default the configuration's; with --decode, conversations (1)"
    )
    parser.add_argument("--length", type=int, help="tokens of a row, including images; by default train.max_length")
    parser.add_argument(
        "--mesh",
        help="DATAxFSDPxTENSOR of a slice, such as 1x8x1; by default train.mesh if it is set and fits, else a mesh that suits the target",
    )
    parser.add_argument("--decode", action="store_true", help="one step of decoding instead of a training step")
    parser.add_argument(
        "--effort",
        type=float,
        help="how hard a TPU's compiler optimises: from -1 (the default, compiles fastest) to 0 (as in a run); "
        "newer compilers know only levels, and the plan says which was used",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit status 0 when it fits, 1 when it does not."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs, and a GPU's plugin without its GPU would fail
    jax.config.update("jax_enable_compilation_cache", False)  # a program for another machine cannot be loaded from it
    config = load_config(args.config, args.overrides)
    from chatpose_jax.planning.plan import describe_plan, mesh_sizes, plan_decoding, plan_training
    from chatpose_jax.planning.targets import EFFORT, parse

    target = parse(args.target)
    for name in ("batch", "length"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}")
    effort = EFFORT if args.effort is None else args.effort
    if not -1 <= effort <= 0:
        raise UserError(f"--effort must be from -1 to 0, found {effort}")
    train, length = config.train, args.length or config.train.max_length
    given = None if args.mesh is None else read_mesh(args.mesh)
    chips = target.chips // target.slices
    if given is not None and (min(given) < 1 or math.prod(given) != chips):
        raise UserError(
            f"--mesh {args.mesh}: a mesh of {' × '.join(map(str, given))} does not fit the {chips} chips of {target.one}"
        )
    if args.decode:
        batch = args.batch or 1
        sizes = given or mesh_sizes(target, config.model, batch, decode=True)
        plan = plan_decoding(config.model, target, sizes, batch, length, effort=effort)
    else:
        if args.batch is not None:
            train = dataclasses.replace(train, batch_size=args.batch, accumulate=1)
        if train.mesh.slices not in (-1, target.slices):
            raise UserError(
                f"train.mesh.slices={train.mesh.slices}: --target {target.name} has {target.slices}; name the chips of one slice "
                f"and *{train.mesh.slices} there, or leave the setting at -1"
            )
        asked = train.mesh != MeshConfig() or any(word.startswith("train.mesh.") for word in args.overrides)
        sizes = (
            given
            or (fitting(train.mesh, chips, target.slices) if asked else None)
            or mesh_sizes(target, config.model, train.batch_size)
        )
        plan = plan_training(config.model, train, target, sizes, length, effort=effort)
    if args.json is not None:
        args.json.write_text(json.dumps(plan.to_json(), indent=2) + "\n")
    print(describe_plan(plan))
    return 0 if plan.fits else 1


def fitting(mesh: MeshConfig, chips: int, slices: int = 1) -> tuple[int, int, int] | None:
    """(data, fsdp, tensor) of a run's mesh on slices of this number of chips; None if the mesh needs other numbers."""
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    given = math.prod(size for size in sizes if size != -1)
    data, fsdp, tensor = (chips // given if size == -1 else size for size in sizes)
    return (data, fsdp, tensor) if data * fsdp * tensor == chips and mesh.slices in (-1, slices) else None

"""Conversion of a large random checkpoint: seconds and MB/s beside a plain copy of its files, and peak resident memory.

    python bench/convert.py --preset chatpose_7b --layers 4
    python bench/convert.py --preset chatpose_13b --devices 8 --format bin

Writes a LLaVA-1.5 checkpoint of the preset's shapes (fewer layers, if asked) in shards, times a plain copy, then times
conversions in fresh processes. ``--devices`` adds a direct load onto that many fake devices, every matrix
sharded over its input axis.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHILD = """
import json, re, sys, time
from pathlib import Path
task, source, out, devices = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
import jax
from chatpose_jax.weights.convert import convert, load_source
def peak():  # of this process since exec; ru_maxrss would start from the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
before = peak()
start = time.perf_counter()
arrays = 0
if task == "load":
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    def shardings(path, shape):
        axes = [None] * len(shape)
        if len(shape) > 1 and shape[-2] % devices == 0:
            axes[-2] = "fsdp"
        return jax.sharding.NamedSharding(mesh, jax.P(*axes))
    plan, params = load_source(source, shardings=shardings)
    arrays = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
else:
    convert(source, out, hashes="hash" in task, compress="zstd" in task)
seconds, cpu = time.perf_counter() - start, time.process_time()
print(json.dumps({"seconds": seconds, "cpu": cpu, "start_mb": before, "peak_mb": peak(), "arrays_mb": arrays / 1e6}))
"""


def write_source(
    folder: Path, preset: str, layers: int | None, fmt: str, tokenizer: Path | None, shard_bytes: int
) -> int:
    """Writes the checkpoint in float16, as LLaVA-1.5 is stored; returns its bytes.

    Values repeat every 64 MiB, which no step here notices.
    """
    from flax.traverse_util import flatten_dict

    from chatpose_jax.models.chatpose import abstract_params
    from chatpose_jax.models.config import preset as named
    from chatpose_jax.weights.layouts import LAYOUTS

    config = named(preset)
    text = dataclasses.replace(config.text, num_layers=layers or config.text.num_layers)
    config = config.replace(text=text, lora=None)
    layout = next(layout for layout in LAYOUTS if layout.name == "llava_transformers_5")
    tree = flatten_dict(abstract_params(config), sep="/")
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in layout.rules:
        if rule.rows == "added":
            continue
        shape = tuple(tree[rule.target].shape[1:] if rule.stacked else tree[rule.target].shape)
        vision = rule.target.startswith("vision/")
        for name in rule.sources(config.vision.num_layers if vision else text.num_layers):
            shapes[name] = rule.transform.source_shape(shape)
    noise = (np.random.default_rng(0).standard_normal(32 << 20, dtype=np.float32) * 0.02).astype(np.float16)

    def random(count: int) -> np.ndarray:
        return noise[:count].copy() if count <= noise.size else np.resize(noise, count)

    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        size += 2 * math.prod(shape)
        shards[-1].append(name)
        if size > shard_bytes:
            shards.append([])
            size = 0
    shards = [shard for shard in shards if shard]
    suffix = "safetensors" if fmt == "safetensors" else "bin"
    stem = "model" if fmt == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, names in enumerate(shards):
        file = folder / f"{stem}-{number + 1:05d}-of-{len(shards):05d}.{suffix}"
        weight_map |= dict.fromkeys(names, file.name)
        arrays = {name: random(math.prod(shapes[name])).reshape(shapes[name]) for name in names}
        if fmt == "safetensors":
            from safetensors.numpy import save_file

            save_file(arrays, file)
        else:
            import torch

            torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    vision = config.vision
    settings = {
        "model_type": "llava",
        "image_token_index": -200,
        "text_config": {
            "num_attention_heads": text.num_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "max_position_embeddings": 4096,
        },
        "vision_config": {"num_attention_heads": vision.num_heads},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    source = tokenizer or Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tokenizer"
    shutil.copy(source / "tokenizer.model", folder)
    return sum(file.stat().st_size for file in folder.iterdir())


def child(task: str, source: Path, out: Path, devices: int) -> dict[str, float]:
    """Runs one task in a fresh process, so that its peak memory is its own."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} if devices > 1 else {}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, task, str(source), str(out), str(devices)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | flags,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="chatpose_7b")
    parser.add_argument("--layers", type=int, help="decoder layers; default the preset's")
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--devices", type=int, default=0, help="also load straight onto this many fake devices")
    parser.add_argument("--tasks", nargs="+", default=["plain", "hash", "zstd"], choices=("plain", "hash", "zstd"))
    parser.add_argument("--tokenizer", type=Path, help="folder with a 32 000-piece tokenizer.model")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        source, copy, out = root / "source", root / "copy", root / "out"
        source.mkdir()
        size = write_source(source, args.preset, args.layers, args.format, args.tokenizer, 2 << 30)
        print(f"{args.preset}, {args.layers or 'all'} layers, {args.format}: {size / 1e9:.2f} GB")
        os.sync()
        start, cpu = time.perf_counter(), time.process_time()
        shutil.copytree(source, copy)
        os.sync()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        shutil.rmtree(copy)
        print(
            f"{'task':<18}{'seconds':>9}{'CPU s':>8}{'MB/s':>7}{'x copy':>8}{'peak MB':>9}{'at start':>10}{'arrays':>8}"
        )
        print(f"{'copy and sync':<18}{seconds:>9.1f}{cpu:>8.1f}{size / seconds / 1e6:>7.0f}{1:>8.2f}")
        tasks = [(f"convert, {task}", task, 1) for task in args.tasks]
        tasks += [(f"load onto {args.devices}", "load", args.devices)] if args.devices else []
        for title, task, devices in tasks:
            result = child(task, source, out, devices)
            elapsed = result["seconds"]
            print(
                f"{title:<18}{elapsed:>9.1f}{result['cpu']:>8.1f}{size / elapsed / 1e6:>7.0f}{elapsed / seconds:>8.2f}"
                f"{result['peak_mb']:>9.0f}{result['start_mb']:>10.0f}{result['arrays_mb']:>8.0f}"
            )
            shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()

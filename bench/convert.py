"""Conversion of a large random checkpoint: seconds and MB/s beside a plain copy of its files, and peak resident memory.

    python bench/convert.py --size 7b --layers 4
    python bench/convert.py --size 13b --devices 1 8 --tasks hash shards

Writes a LLaVA-1.5 checkpoint of the size's shapes (fewer layers, if asked) in shards; then, for each number of fake devices,
times a plain copy and runs each task in a fresh process. Before each, the source is dropped from the page cache; each ends
when its files are on the disk (fsync).

    plain     convert, without hashes
    hash      convert, with SHA-256 of the source (the default of ``chatpose convert``)
    zstd      convert, compressed
    int8      convert with ``quantize="int8"``, without hashes
    int4      the same with ``quantize="int4"``
    shards    every device's part of every block onto its device, and dropped: what ``load`` does, without the memory of
              the devices, which on a CPU is the host's
    load      ``load_source``: the whole model onto the devices
    verify    ``chatpose verify`` of the source and what ``hash`` made of it (run before, without its time)
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
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.sharding import make_mesh, shardings
from chatpose_jax.weights.devices import device_parts
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.convert import convert, load_source
from chatpose_jax.weights.plan import plan_conversion
from chatpose_jax.weights.spec import SourceSpec
def status(name):  # of this process since exec; ru_maxrss would start from the parent's
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
before = status("VmRSS")
start, cpu = time.perf_counter(), time.process_time()
arrays = 0
if task == "load":
    plan, params = load_source(source, mesh=make_mesh(fsdp=devices))
    arrays = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
elif task == "shards":
    plan = plan_conversion(SourceSpec(source))
    placed = by_path(shardings(abstract_params(plan.config), make_mesh(fsdp=devices)))
    for path, leaf in plan.leaves.items():
        for parts in device_parts(leaf, placed[path]):
            del parts
elif task == "verify":
    from chatpose_jax.cli.main import main
    if main(["verify", source, out]):
        sys.exit("verify: the two sides differ")
else:
    spec = SourceSpec(source, quantize=task if task in ("int8", "int4") else "none")
    convert(spec, out, hashes=task == "hash", compress=task == "zstd")
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps(dict(seconds=seconds, cpu=cpu, start_mb=before, peak_mb=status("VmHWM"), arrays_mb=arrays / 1e6)))
"""
TASKS = ("plain", "hash", "zstd", "int8", "int4", "shards", "load", "verify")
SIZES = {"7b": "chatpose_7b", "13b": "chatpose_13b"}


def drop_from_cache(folder: Path) -> None:
    """A folder, or a file, leaves the page cache, so that every task reads the disk."""
    for file in [folder, *folder.rglob("*")]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_copy(source: Path, target: Path) -> None:
    """Copies a folder and waits until it is on the disk."""
    shutil.copytree(source, target)
    for file in target.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def write_source(
    folder: Path, preset: str, layers: int | None, fmt: str, tokenizer: Path | None, shard_bytes: int
) -> int:
    """Writes the checkpoint in float16, as LLaVA-1.5 is stored; returns its bytes.

    Values repeat, every 64 MiB within a tensor and from another place on in each; norms are near one.
    """
    from flax.traverse_util import flatten_dict

    from chatpose_jax.models.chatpose import abstract_params
    from chatpose_jax.models.config import preset as named
    from chatpose_jax.weights.layouts import layout_of

    config = named(preset)
    text = dataclasses.replace(config.text, num_layers=layers or config.text.num_layers)
    config = config.replace(text=text, lora=None)
    layout = layout_of("llava_transformers_5")
    tree = flatten_dict(abstract_params(config), sep="/")
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in layout.rules:
        if rule.rows == "added" or rule.target not in tree:
            continue
        shape = tuple(tree[rule.target].shape[1:] if rule.stacked else tree[rule.target].shape)
        vision = rule.target.startswith("vision/")
        for name in rule.sources(config.vision.num_layers if vision else text.num_layers):
            shapes[name] = rule.transform.source_shape(shape)
    noise = (np.random.default_rng(0).standard_normal(32 << 20, dtype=np.float32) * 0.02).astype(np.float16)

    starts = np.random.default_rng(1)

    def random(name: str) -> np.ndarray:
        values = np.empty(math.prod(shapes[name]), np.float16)
        start = int(starts.integers(noise.size))
        for place in range(0, values.size, noise.size):
            part = values[place : place + noise.size]
            first = part[: noise.size - start]
            first[...] = noise[start : start + first.size]
            part[first.size :] = noise[: part.size - first.size]
        if "norm" in name and name.endswith("weight"):
            values += np.float16(1)
        return values.reshape(shapes[name])

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
        arrays = {name: random(name) for name in names}
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
    run = subprocess.run(
        [sys.executable, "-c", CHILD, task, str(source), str(out), str(devices)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(run.stdout + run.stderr)
    *lines, result = run.stdout.splitlines()
    print(*lines, sep="\n", end="\n" if lines else "")
    return json.loads(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="decoder layers; default all")
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--devices", type=int, nargs="+", default=[1], help="fake devices of each process (default 1)")
    parser.add_argument("--tasks", nargs="+", default=["plain", "hash"], choices=TASKS)
    parser.add_argument("--repeat", type=int, default=1, help="rounds of copy and tasks")
    parser.add_argument("--tokenizer", type=Path, help="folder with a 32 000-piece tokenizer.model")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        source, copy, out = root / "source", root / "copy", root / "out"
        source.mkdir()
        size = write_source(source, SIZES[args.size], args.layers, args.format, args.tokenizer, 2 << 30)
        print(f"{args.size}, {args.layers or 'all'} layers, {args.format}: {size / 1e9:.2f} GB")
        print(
            f"{'devices':<9}{'task':<8}{'seconds':>9}{'CPU s':>8}{'MB/s':>7}{'x copy':>8}{'peak MB':>9}{'at start':>10}{'arrays':>8}"
        )
        for devices in args.devices * args.repeat:
            drop_from_cache(source)
            start, cpu = time.perf_counter(), time.process_time()
            plain_copy(source, copy)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            shutil.rmtree(copy)
            print(f"{'':<9}{'copy':<8}{seconds:>9.1f}{cpu:>8.1f}{size / seconds / 1e6:>7.0f}{1:>8.2f}", flush=True)
            for task in args.tasks:
                if task == "verify":
                    child("hash", source, out, devices)
                drop_from_cache(source)
                result = child(task, source, out, devices)
                elapsed = result["seconds"]
                print(
                    f"{devices:<9}{task:<8}{elapsed:>9.1f}{result['cpu']:>8.1f}{size / elapsed / 1e6:>7.0f}"
                    f"{elapsed / seconds:>8.2f}{result['peak_mb']:>9.0f}{result['start_mb']:>10.0f}{result['arrays_mb']:>8.0f}",
                    flush=True,
                )
                shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()

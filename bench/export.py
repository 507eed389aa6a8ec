"""Export of a large random model folder: seconds and MB/s beside a plain copy of the result, and peak resident memory.

    python bench/export.py --size 13b --layers 4

Writes a LLaVA-1.5 checkpoint and a PEFT adapter of the size's shapes (fewer layers, if asked), converts both, and runs each
task in a fresh process; the result of each must load as the source did.

    base      --format transformers --no-merge: the source again
    merged    --format transformers: adapters of rank 128 on q_proj and v_proj merged
    float32   the same with --dtype float32
    peft      --format peft: the adapters alone
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from convert import SIZES, drop_from_cache, plain_copy, write_source

CHILD = """
import json, re, sys, time
from pathlib import Path
task, folder, out = sys.argv[1:]
from chatpose_jax.weights.export import export
from chatpose_jax.weights.spec import SourceSpec
def status(name):  # of this process since exec; ru_maxrss would start from the parent's
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
before = status("VmRSS")
start, cpu = time.perf_counter(), time.process_time()
result = export(
    folder, out, "peft" if task == "peft" else "transformers",
    merge=task != "base", dtype="float32" if task == "float32" else None,
)
for name in result.files:
    with open(Path(out) / name, "rb") as file:
        import os
        os.fsync(file.fileno())
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps(dict(seconds=seconds, cpu=cpu, start_mb=before, peak_mb=status("VmHWM"), nbytes=result.nbytes)))
"""
TASKS = ("base", "merged", "float32", "peft")


def write_adapter(folder: Path, source: Path, rank: int = 128) -> None:
    """A random adapter over ``source``, in peft's names."""
    from safetensors.numpy import save_file

    from chatpose_jax.weights.sources import open_sources
    from chatpose_jax.weights.spec import SourceSpec

    (main,) = open_sources(SourceSpec(source))
    rng = np.random.default_rng(1)
    tensors = {}
    for name, shape in main.checkpoint.shapes.items():
        if "language_model" in name and name.endswith(("q_proj.weight", "v_proj.weight")):
            stem = "base_model.model." + name.removesuffix("weight")
            tensors[f"{stem}lora_A.weight"] = rng.standard_normal((rank, shape[1]), np.float32) * shape[1] ** -0.5
            tensors[f"{stem}lora_B.weight"] = rng.standard_normal((shape[0], rank), np.float32) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="decoder layers; default all")
    parser.add_argument("--tasks", nargs="+", default=["base", "merged", "peft"], choices=TASKS)
    parser.add_argument("--tokenizer", type=Path, help="folder with a 32 000-piece tokenizer.model")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    from chatpose_jax.weights.convert import convert
    from chatpose_jax.weights.spec import SourceSpec

    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        source, model, copy, out = root / "source", root / "model", root / "copy", root / "out"
        source.mkdir()
        size = write_source(source, SIZES[args.size], args.layers, "safetensors", args.tokenizer, 2 << 30)
        write_adapter(root / "adapter", source)
        convert(SourceSpec(source, adapter=root / "adapter"), model, hashes=False)
        print(f"{args.size}, {args.layers or 'all'} layers: {size / 1e9:.2f} GB")
        print(f"{'task':<10}{'GB':>7}{'seconds':>9}{'CPU s':>8}{'MB/s':>7}{'peak MB':>9}{'at start':>10}")
        drop_from_cache(source)
        start, cpu = time.perf_counter(), time.process_time()
        plain_copy(source, copy)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        shutil.rmtree(copy)
        print(f"{'copy':<10}{size / 1e9:>7.2f}{seconds:>9.1f}{cpu:>8.1f}{size / seconds / 1e6:>7.0f}", flush=True)
        for task in args.tasks:
            drop_from_cache(model)
            run = subprocess.run(
                [sys.executable, "-c", CHILD, task, str(model), str(out)],
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise SystemExit(run.stderr)
            r = json.loads(run.stdout.splitlines()[-1])
            print(
                f"{task:<10}{r['nbytes'] / 1e9:>7.2f}{r['seconds']:>9.1f}{r['cpu']:>8.1f}"
                f"{r['nbytes'] / r['seconds'] / 1e6:>7.0f}{r['peak_mb']:>9.0f}{r['start_mb']:>10.0f}",
                flush=True,
            )
            shutil.rmtree(out)


if __name__ == "__main__":
    main()

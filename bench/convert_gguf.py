"""``chatpose convert`` of a GGUF file: seconds beside a plain copy of the model folder that it makes, and peak resident memory.

    python bench/convert_gguf.py model.gguf
    python bench/convert_gguf.py --kind Q4_K Q6_K --layers 8
    python bench/convert_gguf.py --kind Q8_0 --layers 4 --dtype float32

Without a file, random blocks in the shapes of LLaMA-2-7B are written, with LLaMA's tokenizer from ``shared/data`` beside the checkout. By default
it has all of its 32 layers, which needs 32 GB of disk. With fewer layers the start of the program, some seconds that do not grow with the model,
weighs more.

The seconds are those of the whole command, from the start of Python to its end. The source is dropped from the page cache before it, and the result
is on the disk (fsync) at its end. The copy just after it is treated alike.
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
from convert import drop_from_cache

WIDTH, MLP, ROWS = 4096, 11008, 32000
SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}

COMMAND = """
import json, re, sys, time
from pathlib import Path
from chatpose_jax.cli.main import main
code = main(["convert", "--quiet", *sys.argv[1:]])
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(json.dumps(dict(cpu=time.process_time(), peak_mb=int(peak) * 1024 / 1e6)))
sys.exit(code)
"""


def write_llama(path: Path, kind: str, layers: int, tokenizer: Path) -> None:
    """Writes random blocks in the shapes of LLaMA-2-7B. A block repeats within a tensor, from another place on in each."""
    import gguf
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    ids = range(pieces.get_piece_size())
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(id) for id in ids])
    writer.add_token_scores([pieces.get_score(id) for id in ids])
    kinds = (
        2 if pieces.is_unknown(id) else 3 if pieces.is_control(id) else 6 if pieces.is_byte(id) else 1 for id in ids
    )
    writer.add_token_types(list(kinds))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    rng, number = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    size, nbytes = gguf.GGML_QUANT_SIZES[number]
    noise = rng.integers(0, 256, ((16 << 20) // nbytes, nbytes), dtype=np.uint8)
    for place in SCALES[kind]:
        noise[:, place : place + 2] = rng.uniform(1e-5, 1e-4, len(noise)).astype(np.float16)[:, None].view(np.uint8)

    def add(name: str, rows: int, columns: int) -> None:
        count = rows * columns // size
        blocks = np.tile(np.roll(noise, int(rng.integers(len(noise))), 0), (-(-count // len(noise)), 1))[:count]
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=number)

    add("token_embd", ROWS, WIDTH)
    add("output", ROWS, WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}", MLP, WIDTH)
        add(f"blk.{layer}.ffn_down", WIDTH, MLP)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copied(source: Path, target: Path) -> float:
    """Seconds to copy a folder until it is on the disk."""
    drop_from_cache(source)
    start = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    return time.perf_counter() - start


def converted(source: Path, out: Path, dtype: str | None) -> dict[str, float]:
    """Seconds, seconds of processors, and peak memory of the command, in a fresh process."""
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, str(source), str(out), *(["--dtype", dtype] if dtype else [])],
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if run.returncode:
        raise SystemExit(run.stdout + run.stderr)
    return {"seconds": seconds, **json.loads(run.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="a GGUF file; default: one is written")
    parser.add_argument("--kind", choices=SCALES, nargs="+", default=["Q4_K"])
    parser.add_argument("--layers", type=int, default=32, help="of the file that is written (default 32)")
    parser.add_argument("--dtype", help="of the result (default bfloat16)")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tokenizer",
    )
    args = parser.parse_args()
    print(
        f"{'file':<10}{'GB':>7}{'result GB':>11}{'copy s':>9}{'convert s':>11}{'x copy':>8}{'CPU s':>8}{'peak MB':>9}"
    )
    for kind in [""] if args.file else args.kind:
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            root = Path(temporary)
            source, out, copy = args.file or root / f"{kind}.gguf", root / "out", root / "copy"
            if not args.file:
                write_llama(source, kind, args.layers, args.tokenizer)
            for _ in range(args.repeat):
                drop_from_cache(source)
                result = converted(source, out, args.dtype)
                seconds = copied(out, copy)
                size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
                print(
                    f"{kind or source.suffix:<10}{source.stat().st_size / 1e9:>7.2f}{size / 1e9:>11.2f}{seconds:>9.1f}{result['seconds']:>11.1f}"
                    f"{result['seconds'] / seconds:>8.2f}{result['cpu']:>8.1f}{result['peak_mb']:>9.0f}",
                    flush=True,
                )
                shutil.rmtree(out)
                shutil.rmtree(copy)


if __name__ == "__main__":
    main()

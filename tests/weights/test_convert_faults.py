"""Faults of the world: killed, interrupted, a full disk, files cut off, changed or made to harm. One error, and no half folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from chatpose_jax.cli.main import main  # noqa: E402
from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.models.chatpose import abstract_params  # noqa: E402
from chatpose_jax.weights import leaves, stream  # noqa: E402
from chatpose_jax.weights.convert import convert, load_source  # noqa: E402
from chatpose_jax.weights.export import export  # noqa: E402
from chatpose_jax.weights.folder import load_model_config, load_params, read_folder  # noqa: E402
from chatpose_jax.weights.plan import plan_conversion  # noqa: E402
from chatpose_jax.weights.save import new_folder  # noqa: E402
from chatpose_jax.weights.spec import SourceSpec  # noqa: E402

from .sources import VOCAB, Sizes, make_llava_transformers, make_vicuna, sha256  # noqa: E402

# Converts its arguments, in small blocks; says so and waits on its standard input when half of the parameters are written.
CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
from chatpose_jax.weights import arrays
from chatpose_jax.weights.convert import convert
from chatpose_jax.weights.spec import SourceSpec
arrays._CHUNK, arrays._BLOCK, arrays._IN_FLIGHT = 2000, 5000, 9000
class Half:
    seen = 0
    def __init__(self, total=0, **kwargs): self.total = total
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def set_description(self, text): pass
    def reset(self): pass
    def update(self, count):
        before, self.seen = self.seen, self.seen + count
        if before < self.total / 2 <= self.seen:
            print("half", flush=True)
            sys.stdin.readline()
sys.modules["chatpose_jax.weights.convert"].tqdm = Half
try:
    convert(sys.argv[1], sys.argv[2])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA for transformers, three shards with an index; tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("llava") / "llava"
    make_llava_transformers(folder, "4", dtype=torch.bfloat16, shards=3)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def copy(llava: Path, tmp_path: Path) -> Path:
    shutil.copytree(llava, tmp_path / "src")
    return tmp_path / "src"


def assert_whole(source: Path, out: Path) -> None:
    plan, expected = load_source(source)
    found = load_params(out, abstract_params(plan.config))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_conversion_leaves_nothing_that_loads_and_runs_again(
    llava: Path, tmp_path: Path, end: signal.Signals
) -> None:
    out = tmp_path / "to" / "out"
    command = [sys.executable, "-c", CHILD, str(llava), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "half\n"
        partial = out.parent / ".out.partial"
        assert sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) > 10_000
        child.send_signal(end)
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write("\n")
            child.stdin.flush()
        code = child.wait()
    assert not out.exists()
    if end == signal.SIGINT:
        assert code == 130
        assert not list(out.parent.iterdir())
    else:
        assert code == -signal.SIGKILL
        for folder in (out, partial):
            with pytest.raises(UserError, match=r"no such folder|not a model folder"):
                load_model_config(folder)
    convert(llava, out)
    assert_whole(llava, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(llava: Path, small_disk: Path) -> None:
    """The parameters take 1.5 MB in bfloat16, twice that in float32."""
    with pytest.raises(UserError, match=r"the disk is full; the conversion needs [\d.e-]+ GB; nothing was left behind"):
        convert(SourceSpec(llava, dtype="float32"), small_disk / "out")
    assert not list(small_disk.iterdir())


def test_a_file_that_may_not_grow(llava: Path, tmp_path: Path) -> None:
    """A quota, here the process's own: the write fails in the middle of a data file."""
    program = (
        "import resource, sys\n"
        "from chatpose_jax.errors import UserError\n"
        "from chatpose_jax.weights.convert import convert\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    convert(sys.argv[1], sys.argv[2])\nexcept UserError as error:\n    sys.exit(f'one error: {error}')\n"
    )
    run = subprocess.run([sys.executable, "-c", program, llava, tmp_path / "out"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "one error: " in run.stderr
    assert "a file would pass the limit on file sizes" in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_truncated_shard(copy: Path, tmp_path: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"{shard.name}: cut off: tensor .* ends at byte \d+, the file has \d+; fetch"):
        convert(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_without_their_settings(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json beside"):
        convert(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_and_an_index_that_disagrees(copy: Path, tmp_path: Path) -> None:
    index = copy / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first, second, _ = sorted(file.name for file in copy.glob("*.safetensors"))
    name = next(name for name, file in whole["weight_map"].items() if file == first)
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {name: second}}))
    with pytest.raises(UserError, match=rf"says that {name} is in {second}, but it is in {first}"):
        convert(copy, tmp_path / "out")
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"lost.weight": second}}))
    with pytest.raises(UserError, match=r"lists 1 tensors that its files do not contain: lost\.weight"):
        convert(copy, tmp_path / "out")
    index.write_text(json.dumps(whole))
    (copy / second).unlink()
    with pytest.raises(UserError, match=rf"1 of the 3 files that it lists are missing: {second}"):
        convert(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def sums(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def write_sums(path: Path, table: dict[str, str]) -> Path:
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in table.items()))
    return path


def test_a_wrong_hash(copy: Path, tmp_path: Path) -> None:
    """In the list beside the weights, which is found by itself, and in one from elsewhere."""
    table = sums(copy)
    convert(copy, tmp_path / "good", hashes=write_sums(tmp_path / "list", table))
    record = read_folder(tmp_path / "good")["provenance"]["sources"][0]["files"]
    assert {file["name"]: file["sha256"] for file in record} == table

    shard = sorted(copy.glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    message = rf"{shard.name}: its SHA-256 is {sha256(shard)}, the list has {table[shard.name]}"
    with pytest.raises(UserError, match=message):
        convert(copy, tmp_path / "out", hashes=tmp_path / "list")
    write_sums(copy / "SHA256SUMS", table | {"README.md": "0" * 64})
    with pytest.raises(UserError, match=message):
        convert(copy, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"src", "good", "list"}
    convert(copy, tmp_path / "out", hashes=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not a hash  model.safetensors\n", "line 1: expected 64 hex digits and a file name"),
        ("0" * 64 + "  other.safetensors\n", "does not list model-00001-of-00003.safetensors"),
    ],
)
def test_lists_of_hashes_that_cannot_be_used(copy: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(UserError, match=message):
        convert(copy, tmp_path / "out", hashes=tmp_path / "list")
    options = ["convert", copy, tmp_path / "out", "--hashes", tmp_path / "list", "--no-hash"]
    with pytest.raises(SystemExit):
        main(list(map(str, options)))
    with pytest.raises(UserError, match="not readable as a list"):
        convert(copy, tmp_path / "out", hashes=tmp_path / "absent")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("config.json", {"text_config": "llama"}, "a setting in config.json has the wrong type"),
        ("config.json", {"text_config": {"num_attention_heads": 0}}, "a setting in config.json has the wrong type"),
        (
            "config.json",
            {"text_config": {"num_attention_heads": "many"}},
            "a setting in config.json has the wrong type",
        ),
        (
            "config.json",
            {"text_config": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_scaling": [1]}},
            "a setting in config.json has the wrong type",
        ),
        ("config.json", {"image_token_index": 1e999}, "a setting in config.json has the wrong type"),
        ("config.json", {"text_config": {"num_hidden_layers": 10**12}}, "num_hidden_layers=1000000000000"),
        ("added_tokens.json", {"<POSE>": None}, "the tokenizer's JSON files are not as transformers writes them"),
        ("added_tokens.json", {"<POSE>": "last"}, "the tokenizer's JSON files are not as transformers writes them"),
        ("tokenizer.json", {"model": [1]}, "the tokenizer's JSON files are not as transformers writes them"),
        (
            "tokenizer.json",
            {"added_tokens": [{"id": 7}]},
            "the tokenizer's JSON files are not as transformers writes them",
        ),
    ],
)
def test_settings_of_the_wrong_kind(copy: Path, tmp_path: Path, file: str, settings: Any, message: str) -> None:
    path = copy / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | settings))
    with pytest.raises(UserError, match=message):
        convert(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_replacing_never_leaves_half_a_folder(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the old folder is being deleted; and a new one that cannot take its place."""
    convert(llava, tmp_path / "out")

    def half(folder: Path, ignore_errors: bool = False) -> None:
        if (folder / "params").is_dir():
            (folder / "params").rename(tmp_path / "deleted")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            convert(llava, tmp_path / "out", overwrite=True)
    assert_whole(llava, tmp_path / "out")

    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        convert(llava, tmp_path / "out", overwrite=True)
    assert_whole(llava, tmp_path / "out")


def test_two_conversions_into_one_folder(llava: Path, tmp_path: Path) -> None:
    """The second is told who is at work, and touches nothing; export and training write by the same door."""
    command = [sys.executable, "-c", CHILD, str(llava), str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "half\n"
        with pytest.raises(UserError, match=rf"out: process {child.pid} on .* is writing it"):
            convert(llava, tmp_path / "out", overwrite=True)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.wait() == 0
    assert_whole(llava, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_appears_at_the_place_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("keep")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


UP = "language_model.model.layers.1.mlp.up_proj.weight"


def poison(folder: Path, value: float, tensor: str = UP, rows: slice = slice(3, 4)) -> None:
    """Writes a value into the first column of some rows of a tensor."""
    from safetensors.torch import load_file, save_file

    file = next(file for file in folder.glob("*.safetensors") if tensor in load_file(file))
    state = load_file(file)
    state[tensor].view(len(state[tensor]), -1)[rows, 0] = value
    save_file(state, file)


def test_values_beyond_float16_are_not_made_infinite(copy: Path, tmp_path: Path) -> None:
    poison(copy, 1e6)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: values beyond the range of float16"):
        convert(SourceSpec(copy, dtype="float16"), tmp_path / "half")
    convert(copy, tmp_path / "out")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: values beyond the range of float16"):
        export(tmp_path / "out", tmp_path / "half", "llava", dtype="float16")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_of_what_is_no_number(kind: Any, copy: Path, tmp_path: Path) -> None:
    poison(copy, float("nan"))
    with pytest.raises(UserError, match=rf"{UP}: 1 NaN in the first"):
        convert(SourceSpec(copy, quantize=kind), tmp_path / "out")
    with pytest.raises(UserError, match=r"decoder/layers/mlp/up_proj/kernel, layer 1: NaN or infinite values"):
        convert(SourceSpec(copy, quantize=kind, allow_nonfinite=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "said"), [("nan", "1 NaN"), ("-nan", "1 NaN"), ("inf", "1 infinite"), ("-inf", "1 infinite")]
)
@pytest.mark.parametrize(
    "name", [UP, "language_model.model.embed_tokens.weight", "multi_modal_projector.linear_1.bias"]
)
def test_what_is_no_number_is_refused(copy: Path, tmp_path: Path, name: str, value: str, said: str) -> None:
    """On the way to a folder and straight onto devices, also where the dtype changes."""
    poison(copy, float(value), name)
    for dtype in (None, "float16", "float32"):
        with pytest.raises(UserError, match=rf"^{name}: {said} in the first .* --allow-nonfinite"):
            convert(SourceSpec(copy, dtype=dtype), tmp_path / "out")
    with pytest.raises(UserError, match=rf"^{name}: {said} in the first"):
        load_source(copy)
    assert not (tmp_path / "out").exists()


def test_what_is_no_number_is_counted(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly, in every tensor, added rows and vision tower among them; and one line of the report says so."""
    head, patches = "language_model.lm_head.weight", "vision_tower.vision_model.embeddings.patch_embedding.weight"
    poison(copy, float("nan"))
    poison(
        copy, float("-inf"), head, rows=slice(1020, 1026)
    )  # six of the base vocabulary's last rows and the added ones
    poison(copy, float("nan"), patches, rows=slice(0, 3))
    poison(copy, float("inf"), UP, rows=slice(7, 9))
    expected = {UP: (1, 2), head: (0, 6), patches: (3, 0)}
    plan, _ = load_source(SourceSpec(copy, allow_nonfinite=True))
    assert plan.nonfinite.counts == expected
    assert main(["convert", str(copy), str(tmp_path / "out"), "--allow-nonfinite"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "not finite" in line)
    assert line.split(maxsplit=2)[2] == f"3 tensors: {head}: 6 infinite; {UP}: 1 NaN, 2 infinite; {patches}: 3 NaN"
    assert main(["convert", str(copy), str(tmp_path / "again")]) == 2
    assert "NaN" in capsys.readouterr().err


def test_rows_of_an_adapter_that_are_no_numbers(copy: Path, tmp_path: Path) -> None:
    """What is no tensor of the base is counted too."""
    from safetensors.torch import save_file

    rows = torch.full((1, 64), float("nan"))
    lora = {
        f"base_model.model.model.language_model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, 64)), ("B", (64, 2)))
        for layer in range(3)
    }
    name = "base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta"
    (tmp_path / "adapter").mkdir()
    save_file(lora | {name: rows}, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "trainable_token_indices": {"embed_tokens": [5]}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"^decoder/embed_tokens/embedding: 64 NaN"):
        convert(SourceSpec(copy, adapter=tmp_path / "adapter"), tmp_path / "out")


@pytest.mark.parametrize(
    ("stored", "dtype", "value", "message"),
    [
        (
            torch.float64,
            None,
            1e300,
            "values beyond the range of float32 \\(±3.40282e\\+38\\); no supported dtype can hold them",
        ),
        (
            torch.float32,
            "bfloat16",
            3.4e38,
            "values beyond the range of bfloat16 \\(±3.38953e\\+38\\); choose --dtype float32",
        ),
    ],
)
def test_no_cast_makes_values_infinite(
    tmp_path: Path, stored: Any, dtype: str | None, value: float, message: str
) -> None:
    make_llava_transformers(tmp_path / "src", "4", dtype=stored)
    poison(tmp_path / "src", value)
    with pytest.raises(UserError, match=rf"{UP}: {message}"):
        convert(SourceSpec(tmp_path / "src", dtype=dtype), tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_finite_is_what_numpy_calls_finite(dtype: str) -> None:
    """Over every word of 16 bits, and the edges of the larger floats."""
    if np.dtype(dtype).itemsize == 2:
        values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    else:
        ends, tiny = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
        values = np.array([0.0, -0.0, ends, -ends, tiny, -tiny, np.inf, -np.inf, np.nan, -np.nan], dtype)
    for value in values:
        assert leaves.all_finite(np.full((2, 3), value)) == math.isfinite(value)
        assert leaves.all_finite(np.full((4, 6), value)[::2, ::2].T) == math.isfinite(value)
    many = np.zeros(2 * leaves._PIECE, dtype)
    for place in (0, leaves._PIECE // many.itemsize, len(many) - 1):
        assert leaves.all_finite(many)
        many[place] = np.nan
        assert not leaves.all_finite(many)
        many[place] = 0
    assert leaves.all_finite(np.zeros((0, 3), dtype))


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_the_bars_clock_starts_with_the_bytes(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    """Not with the tokenizer, which takes longer: the first bytes would promise days. It ends at its total, in steps of a layer."""
    told: list[Any] = []

    class Bar(contextlib.nullcontext[Any]):
        def __init__(self, total: int, **settings: Any):
            super().__init__(self)
            told.append(total)

        def reset(self) -> None:
            told.append("reset")

        def set_description(self, text: str) -> None:
            pass

        def update(self, count: int) -> None:
            told.append(count)

    monkeypatch.setitem(convert.__globals__, "tqdm", Bar)
    monkeypatch.setitem(convert.__globals__, "write_processor", lambda *_: told.append("tokenizer"))
    convert(SourceSpec(copy, quantize=quantize), tmp_path / "out")
    total, *before, first = told[:4]
    assert before == ["tokenizer", "reset"]
    assert sum([first, *told[4:]]) == total


def test_scales_are_read_layer_by_layer(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale is small, what it is computed from is not: all layers at once would be minutes without a word."""
    monkeypatch.setattr(stream, "_CHUNK", 30_000)
    leaf = plan_conversion(SourceSpec(copy, quantize="int8")).leaves["decoder/layers/mlp/up_proj/kernel_scale"]
    assert leaf.nbytes < 30_000 < leaf.nbytes * leaf.cost == 2 * 3 * 64 * 160
    assert stream.chunk_shape(leaf) == (1, 160)


def test_no_descriptor_is_left_open(llava: Path, tmp_path: Path) -> None:
    convert(llava, tmp_path / "first")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else pytest.skip("no /proc")
    convert(llava, tmp_path / "second")
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_files_that_vanish_while_they_are_put_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tensorstore's lock files do."""
    (tmp_path / "data").write_bytes(b"x")
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(real(descriptor)))
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter([self / "lock", self / "data"]))
    stream._Settler(tmp_path).finish()
    assert len(synced) == 1


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    make_vicuna(tmp_path / "src", sizes=Sizes(rows=VOCAB + 2000))
    with pytest.raises(
        UserError, match=r"has 1024 tokens, the embedding 3024 rows, far more; this tokenizer belongs to"
    ):
        convert(SourceSpec(tmp_path / "src", init_missing=["vision", "projector"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_converted_already(llava: Path, tmp_path: Path) -> None:
    convert(llava, tmp_path / "out")
    with pytest.raises(
        UserError, match="is already a model folder; chatpose chat reads it, and chatpose export writes it"
    ):
        convert(tmp_path / "out", tmp_path / "again")
    with pytest.raises(UserError, match="--with-projector is only for --format peft"):
        export(tmp_path / "out", tmp_path / "hf", "transformers", with_projector=True)


def test_an_empty_safetensors_file(copy: Path, tmp_path: Path) -> None:
    next(copy.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(UserError, match="not a safetensors file: it has 0 bytes; fetch it again"):
        convert(copy, tmp_path / "out")

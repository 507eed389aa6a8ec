"""Model folders and exports in object stores: what a disk gives, the same bytes come back; and what happens when requests or processes fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import chatpose_jax  # noqa: E402
from chatpose_jax import locks  # noqa: E402
from chatpose_jax.cli.main import main  # noqa: E402
from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.models.chatpose import abstract_params, init_params  # noqa: E402
from chatpose_jax.models.config import preset  # noqa: E402
from chatpose_jax.processing.processor import Processor, tiny_processor  # noqa: E402
from chatpose_jax.storage import Location, copy_tree, location, tree, write_bytes  # noqa: E402
from chatpose_jax.weights import stream  # noqa: E402
from chatpose_jax.weights.convert import convert  # noqa: E402
from chatpose_jax.weights.export import export  # noqa: E402
from chatpose_jax.weights.folder import TOKENIZER, UNFINISHED, load_params, read_config, read_folder  # noqa: E402
from chatpose_jax.weights.paths import by_path  # noqa: E402
from chatpose_jax.weights.readers import TensorEntry  # noqa: E402
from chatpose_jax.weights.save import new_folder, save_folder  # noqa: E402
from chatpose_jax.weights.spec import SourceSpec  # noqa: E402

from .sources import make_llava_transformers  # noqa: E402


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "llava"
    make_llava_transformers(folder, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def converted(llava: Path) -> Path:
    convert(llava, llava.parent / "converted")
    return llava.parent / "converted"


def assert_same_model(found: Location, expected: Path) -> None:
    assert read_folder(found) == read_folder(expected)
    config = read_config(expected)
    wanted = by_path(load_params(expected, abstract_params(config)))
    held = by_path(load_params(found, abstract_params(config)))
    assert held.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(np.asarray(held[path]), np.asarray(array), err_msg=path)
    for part in ("tokenizer", "passengers"):
        assert tree(found / part) == tree(expected / part)
        for name in tree(expected / part):
            assert (found / part / name).read_bytes() == (expected / part / name).read_bytes()


def test_what_is_converted_into_a_bucket_is_what_a_disk_gets(
    bucket: Location, llava: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bucket / "models" / "small"
    assert main(["convert", str(llava), str(out), "--quiet"]) == 0
    assert_same_model(out, converted)
    assert not [name for name in tree(bucket) if name.endswith((UNFINISHED, ".lock"))]

    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert main(["inspect", str(converted)]) == 0
    assert shown.replace(str(out), "X") == capsys.readouterr().out.replace(str(converted), "X")
    assert main(["verify", str(llava), str(out), "--tolerance", "0.05", "--layers", "1"]) == 0
    assert "equal" in capsys.readouterr().out

    with pytest.raises(UserError, match=r"/models/small exists already; choose another folder, or add --overwrite"):
        convert(llava, out)
    convert(SourceSpec(llava, dtype="float32"), out, overwrite=True)
    assert read_config(out).param_dtype == "float32"
    assert sorted({name.split("/")[0] for name in tree(out)}) == ["config.json", "params", "passengers", "tokenizer"]


def test_an_export_into_a_bucket_and_from_one_is_that_of_a_disk(
    bucket: Location, converted: Path, tmp_path: Path
) -> None:
    copy_tree(converted, bucket / "model")
    expected = export(converted, tmp_path / "expected", "transformers", max_shard_size="100KB")
    assert len(expected.files) > 2
    found = export(str(bucket / "model"), str(bucket / "out"), "transformers", max_shard_size="100KB")
    assert found == expected
    assert tree(bucket / "out") == tree(tmp_path / "expected")
    for name in tree(tmp_path / "expected"):
        assert (bucket / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    with pytest.raises(UserError, match="out exists already"):
        export(converted, bucket / "out", "transformers")


def tiny_folder(path: Location) -> Any:
    config = preset("tiny")
    params = init_params(config, jax.random.key(0))
    save_folder(path, config, params, processor=tiny_processor(config))
    return params


def test_a_saved_model_is_loaded_and_answers(bucket: Location, capsys: pytest.CaptureFixture[str]) -> None:
    params = tiny_folder(bucket / "run" / "model")
    assert Processor.load(bucket / "run" / "model" / TOKENIZER, preset("tiny")).pose_token == "<POSE>"
    model = chatpose_jax.load(str(bucket / "run"))  # as of a training run: its model
    np.testing.assert_array_equal(
        by_path(load_params(bucket / "run" / "model", abstract_params(preset("tiny"))))["decoder/norm/scale"],
        by_path(params)["decoder/norm/scale"],
    )
    assert model.config.text.num_layers == preset("tiny").text.num_layers
    assert main(["chat", str(bucket / "run"), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["chat", "hdfs://host/model"])
    assert "argument model: hdfs://…: not an address that this program knows" in capsys.readouterr().err


@pytest.mark.slow
def test_requests_that_fail_change_nothing(
    bucket: Location, llava: Path, converted: Path, faults: Callable[..., int], tmp_path: Path
) -> None:
    faults(11)
    convert(llava, bucket / "model")
    assert_same_model(bucket / "model", converted)
    export(bucket / "model", bucket / "out", "llava")
    assert faults(0) >= 5
    export(converted, tmp_path / "expected", "llava")
    for name in tree(tmp_path / "expected"):
        assert (bucket / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


def test_a_conversion_that_fails_leaves_nothing(bucket: Location, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, real = [], TensorEntry.read

    def failing(self: TensorEntry, index: Any = None, **options: Any) -> np.ndarray:
        reads.append(self.name)
        if len(reads) > 20:
            raise RuntimeError("stopped")
        return real(self, index, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TensorEntry, "read", failing)
        with pytest.raises(RuntimeError, match="stopped"):
            convert(llava, bucket / "out")
    assert tree(bucket) == []


KILLED = """
import os, signal, sys
from chatpose_jax.weights import convert
def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
convert.write_passengers = die
convert.convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_what_a_killed_conversion_left_does_not_load_and_is_replaced(
    bucket: Location, llava: Path, converted: Path
) -> None:
    out = bucket / "out"
    child = subprocess.run([sys.executable, "-c", KILLED, str(llava), str(out)], capture_output=True, text=True)
    assert child.returncode == -9, child.stderr
    assert any(name.startswith("params/") for name in tree(out))
    with pytest.raises(UserError, match=r"out: incomplete model folder: it is still being written, or its writer died"):
        chatpose_jax.load(out)
    convert(llava, out)  # without --overwrite: nothing of worth is there
    assert_same_model(out, converted)


def test_folders_of_others_are_kept(bucket: Location, llava: Path) -> None:
    write_bytes(bucket / "mine" / "notes.txt", "keep")
    write_bytes(bucket / "foreign" / "config.json", json.dumps({"model_type": "llava"}))
    write_bytes(bucket / "foreign" / "model.safetensors", b"weights")
    for name in ("mine", "foreign"):
        with pytest.raises(UserError, match="exists and is not a model folder, so it is not overwritten"):
            convert(llava, bucket / name, overwrite=True)
    with pytest.raises(UserError, match="a PyTorch checkpoint, not a model folder; copy it to a disk and convert it"):
        read_folder(bucket / "foreign")
    assert tree(bucket) == ["foreign/config.json", "foreign/model.safetensors", "mine/notes.txt"]


def test_refusals(bucket: Location, llava: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/none: no such folder; expected a model folder"):
        chatpose_jax.load(bucket / "none")
    with pytest.raises(UserError, match="PyTorch weights are read from a disk; copy them there first"):
        convert(str(bucket / "source"), tmp_path / "out")
    with pytest.raises(UserError, match="PyTorch weights are read from a disk"):
        convert(SourceSpec(llava, vision=str(bucket / "clip")), tmp_path / "out")
    with pytest.raises(UserError, match=r"^\w+://tests: a whole bucket; name a folder in it"):
        convert(llava, bucket.parent)
    absent = location(f"{bucket.parent}-absent/x")
    with pytest.raises(UserError, match=r"-absent/x: (no such folder|the store cannot be reached)"):
        read_folder(absent)
    with pytest.raises(UserError, match=r"-absent/x: cannot be written"):
        convert(llava, absent)


def test_a_reader_meanwhile_sees_an_unfinished_folder(bucket: Location) -> None:
    with new_folder(bucket / "m") as folder:
        write_bytes(folder / "config.json", json.dumps({"format": "chatpose-jax", "version": 1, "model": {}}))
        with pytest.raises(UserError, match="still being written"):
            read_folder(bucket / "m")
        with pytest.raises(UserError, match="is writing it"), new_folder(bucket / "m", overwrite=True):
            pass
    assert tree(bucket) == ["m/config.json"]


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt])
def test_a_writer_whose_lock_another_one_has_leaves_that_ones_files(
    bucket: Location, monkeypatch: pytest.MonkeyPatch, ends: type[BaseException] | None
) -> None:
    monkeypatch.setattr(locks, "_REFRESH", 0.01)
    with pytest.raises(ends or locks.Locked), new_folder(bucket / "m") as folder:
        write_bytes(bucket / ".m.lock", json.dumps({"who": "another", "token": "x"}))
        write_bytes(folder / "params" / "0", "of the other one")
        time.sleep(0.5)
        if ends is not None:
            raise ends
    assert tree(bucket) == [".m.lock", f"m/{UNFINISHED}", "m/params/0"]


def test_blocks_are_written_as_they_are_read(bucket: Location, llava: Path, converted: Path, monkeypatch: Any) -> None:
    """Many small chunks, as a large model has."""
    monkeypatch.setattr(stream, "_CHUNK", 4000)
    monkeypatch.setattr(stream, "BLOCK", 8000)
    monkeypatch.setattr(stream, "_IN_FLIGHT", 100_000)
    convert(llava, bucket / "m")
    assert_same_model(bucket / "m", converted)

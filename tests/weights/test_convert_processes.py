"""Conversion by two processes, as on two hosts: together they write what one writes, and each reads only its share."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

torch = pytest.importorskip("torch")

from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.models.chatpose import abstract_params  # noqa: E402
from chatpose_jax.storage import Location, kvstore, tree  # noqa: E402
from chatpose_jax.weights.convert import load_source  # noqa: E402
from chatpose_jax.weights.folder import load_params, read_config, read_folder  # noqa: E402
from chatpose_jax.weights.paths import by_path  # noqa: E402

from ..conftest import enter_store  # noqa: E402
from .sources import make_llava_transformers, sha256  # noqa: E402

CHILD = """
import json, sys
from pathlib import Path
import jax
rank, address, source, folder, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5]
jax.distributed.initialize(address, num_processes=2, process_id=rank)
import numpy as np
from chatpose_jax.weights import stream
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.convert import convert, load_source
from chatpose_jax.weights.readers import TensorEntry
stream._CHUNK, stream.BLOCK = 4000, 8000
read, real = [0], TensorEntry.read
def counting(self, index=None, **options):
    values = real(self, index, **options)
    read[0] += values.nbytes
    return values
TensorEntry.read = counting
plan = convert(source, out)
written, read[0] = read[0], 0
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
_, params = load_source(source, mesh=mesh)
shards = {}
for path, array in by_path(params).items():
    for shard in array.addressable_shards:
        box = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape)]
        shards[json.dumps([path, box])] = np.asarray(shard.data)
np.savez(folder / f"{rank}.npz", **shards)
(folder / f"{rank}.json").write_text(json.dumps({"written": written, "loaded": read[0], "whole": plan.nbytes}))
"""


def free_address() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(params=["disk", "gs", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path, stores: dict, monkeypatch: pytest.MonkeyPatch) -> Location:
    """Where a model folder is written, alone in its own folder."""
    if request.param == "disk":
        return tmp_path / "made" / "out"
    return enter_store(request.param, stores, monkeypatch) / "out"


def first_complete(out: Location, children: list[subprocess.Popen[str]]) -> dict[str, np.ndarray]:
    """The parameters at the first moment at which a reader takes the folder for complete; none if all end before."""
    while True:
        ended = all(child.poll() is not None for child in children)
        try:
            config = read_config(out)
        except UserError as error:
            assert re.search("no such folder|still being written", str(error))
            if ended:
                return {}
            time.sleep(0.05)
            continue
        return {path: np.asarray(array) for path, array in by_path(load_params(out, abstract_params(config))).items()}


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path, out: Location) -> None:
    make_llava_transformers(tmp_path / "src", shards=3)
    address = free_address()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(rank), address, str(tmp_path / "src"), str(tmp_path), str(out)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        found = first_complete(out, children)
        errors = [child.communicate()[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)[-4000:]

    _, single = load_source(tmp_path / "src")
    expected = {path: np.asarray(array) for path, array in by_path(single).items()}
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    arrays = ts.KvStore.open({"driver": "ocdbt", "base": kvstore(out / "params")}).result()
    assert sum(key.endswith(b"/.zarray") for key in arrays.list().result()) == len(expected)
    assert {name.split("/")[0] for name in tree(out)} == {"config.json", "params", "passengers", "tokenizer"}
    assert tree(out.parent) == [f"out/{name}" for name in tree(out)]
    record = read_folder(out)["provenance"]["sources"][0]["files"]
    assert [file["sha256"] for file in record] == [sha256(tmp_path / "src" / file["name"]) for file in record]

    covered = dict.fromkeys(expected, 0)
    split = set()
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz", allow_pickle=False) as shards:
            for key in shards.files:
                path, box = json.loads(key)
                place = tuple(slice(start, stop) for start, stop in box)
                np.testing.assert_array_equal(shards[key], expected[path][place], err_msg=path)
                covered[path] += shards[key].size
                if shards[key].size < expected[path].size:
                    split.add(path)
    assert all(covered[path] >= array.size for path, array in expected.items())
    assert "decoder/layers/mlp/up_proj/kernel" in split

    counts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    whole = counts[0]["whole"]
    assert [count["loaded"] < 0.75 * whole for count in counts] == [True, True]
    # The first process also copies what the model does not use of its sources: here the tower's last block.
    assert counts[0]["written"] < 0.75 * whole
    assert counts[1]["written"] < 0.6 * whole


FAILING = """
import sys
import jax
rank, address, source, out, where = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5]
jax.distributed.initialize(address, num_processes=2, process_id=rank)
from chatpose_jax.errors import UserError
from chatpose_jax.weights.convert import convert
from chatpose_jax.weights.readers import TensorEntry
real = TensorEntry.read
def failing(self, index=None, **options):
    if ".layers.1." in self.name:
        raise OSError(5, "the disk of process 1 broke")
    return real(self, index, **options)
def refusing(plan, folder):
    raise UserError("process 0 wants another tokenizer")
if where == "reading" and rank == 1:
    TensorEntry.read = failing
if where == "opening" and rank == 1:
    source = out  # not there
try:
    if where == "finishing":
        convert.__globals__["write_processor"] = refusing
    convert(source, out)
except (UserError, OSError) as error:
    sys.exit(f"one error: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "at", "cause", "out"),
    [
        ("opening", 1, "no such file or folder", "disk"),
        ("finishing", 0, "process 0 wants another tokenizer", "disk"),
        ("reading", 1, "the disk of process 1 broke", "disk"),
        ("reading", 1, "the disk of process 1 broke", "gs"),
        ("reading", 1, "the disk of process 1 broke", "s3"),
    ],
    indirect=["out"],
)
def test_what_fails_in_one_process_ends_both(tmp_path: Path, where: str, at: int, cause: str, out: Location) -> None:
    """Neither waits for the other, both say why, nothing is left behind."""
    make_llava_transformers(tmp_path / "src")
    address = free_address()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, str(rank), address, str(tmp_path / "src"), str(out), where],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [child.communicate(timeout=120)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [1, 1], "\n".join(errors)[-4000:]
    assert cause in errors[at]
    assert f"one error: process {at} of 2 failed, so all end: " in errors[1 - at]
    assert cause in errors[1 - at]
    assert tree(out.parent) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"src", "made"}

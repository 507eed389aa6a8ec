"""Prepared folders in a bucket: written, read, checked and shown, also while requests fail. Emulators stand in for the stores."""

import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from chatpose_jax import storage
from chatpose_jax.cli.main import main
from chatpose_jax.data import datasets, lengths, shards, store
from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.config import DataConfig
from chatpose_jax.data.prepare import TooManyBroken, prepare
from chatpose_jax.data.prepared import Prepared
from chatpose_jax.data.sizes import measure
from chatpose_jax.data.sources import check_sources, examples
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from tests.data.toy_reader import TOY, write_words

HERE = Path(__file__).resolve().parent
ALLOWED = ["--allow", "leakage", "--allow", "frame"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(preset("tiny"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("original"), 6)


@pytest.fixture(scope="module")
def folder(source, processor, tmp_path_factory):
    """On a disk."""
    out = tmp_path_factory.mktemp("prepared") / "toy"
    sys.path.insert(0, str(HERE))
    prepare(TOY, source, out, processor=processor)
    sys.path.remove(str(HERE))
    return out


@pytest.fixture
def copy(bucket, folder):
    """The same, in a bucket."""
    storage.copy_tree(folder, bucket / "toy")
    return bucket / "toy"


@pytest.fixture
def requests(monkeypatch):
    """The ranges of each call that reads some."""
    calls, read = [], storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", lambda ranges: calls.extend([ranges] * bool(ranges)) or read(ranges))
    return calls


def contents(folder):
    return {name: (folder / name).read_bytes() for name in storage.tree(folder)}


def same_rows(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        assert (a.id, a.kind, a.group, a.messages) == (b.id, b.kind, b.group, b.messages)
        np.testing.assert_array_equal(a.poses.rotations, b.poses.rotations)


def same_batch(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_writes_the_bytes_of_a_disk(bucket, source, processor, folder, workers):
    prepare(TOY, source, bucket / "toy", processor=processor, workers=workers)
    assert contents(bucket / "toy") == contents(folder)
    before = contents(bucket / "toy")
    prepare(TOY, source, bucket / "toy", processor=processor)  # nothing is left to do
    assert contents(bucket / "toy") == before
    with pytest.raises(UserError, match=f"{bucket}/toy holds a data set with options .'variants': 2.*choose another"):
        prepare(TOY, source, bucket / "toy", processor=processor, options={"variants": 3})
    storage.write_bytes(bucket / "else" / "file", "x")
    with pytest.raises(UserError, match=r"else holds other files \(file\)"):
        prepare(TOY, source, bucket / "else", processor=processor)


def test_it_writes_while_requests_fail(bucket, faults, source, processor, folder):
    faults(7)
    prepare(TOY, source, bucket / "toy", processor=processor)
    assert faults(0) > 5
    assert contents(bucket / "toy") == contents(folder)


def test_the_same_call_continues_what_an_error_ended(bucket, source, processor, folder):
    with pytest.raises(TooManyBroken):
        prepare(TOY, source, bucket / "toy", processor=processor, max_broken=2)
    begun = contents(bucket / "toy")
    assert any(name.startswith(f"{store.WORK}/train/0000") for name in begun) and "dataset.json" not in begun
    with pytest.raises(UserError, match=r"holds the beginning of a data set with options .'seed': 0.*'seed': 1"):
        prepare(TOY, source, bucket / "toy", processor=processor, options={"seed": 1})
    assert contents(bucket / "toy") == begun
    prepare(TOY, source, bucket / "toy", processor=processor)
    assert contents(bucket / "toy") == contents(folder)


@pytest.mark.slow
def test_kills_lose_nothing(bucket, source, processor, folder):
    seed = random.randrange(1 << 30)
    draw, kills, done = random.Random(seed), 0, set()
    words = ["data", "prepare", TOY, "--source", source, "--out", bucket / "toy", "--workers", 1, "--quiet"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]), "TOY_PAUSE": "0.05"}
    command = [sys.executable, "-m", "chatpose_jax.cli.main", *map(str, words)]
    for number in range(3):
        process = subprocess.Popen(command, env=env)
        while process.poll() is None and not (bucket / "toy" / store.WORK / "train" / f"{number:05d}").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        done.add(len(storage.tree(bucket / "toy" / store.WORK)))
        with pytest.raises(UserError, match="toy is not complete: the same 'chatpose data prepare' that began it"):
            Prepared(bucket / "toy", "train")
    assert kills == 3 and len(done) == 3, (kills, done, seed)
    prepare(TOY, source, bucket / "toy", processor=processor)
    assert contents(bucket / "toy") == contents(folder), seed


def test_rows_are_those_of_a_disk(copy, folder, requests):
    rows, wanted = Prepared(copy, "train"), Prepared(folder, "train")
    assert rows.fingerprint == wanted.fingerprint
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    same_rows(rows.__getitems__(order), [wanted[number] for number in order])
    assert len(requests) == 1 and len(requests[0]) == len(rows.description["splits"]["train"]["shards"])
    same_rows(rows, wanted)
    same_rows(pickle.loads(pickle.dumps(rows))[3:9], wanted[3:9])
    assert len(Prepared(copy, "test")) == 0


def test_of_a_large_split_only_the_wanted_records_are_read(copy, folder, requests, monkeypatch):
    monkeypatch.setattr(shards, "KEEP", 0)
    rows, wanted = Prepared(copy, "train"), Prepared(folder, "train")
    same_rows([rows[20]], [wanted[20]])
    ends, read = requests
    assert len(ends) == len(read) == 1 and read[0][2] - read[0][1] < 2000
    requests.clear()
    same_rows(rows, wanted)
    (_, read) = requests  # the ends of the other shards, and neighbours together
    assert len(read) == len(rows.description["splits"]["train"]["shards"])
    monkeypatch.setattr(shards, "GAP", -1)
    requests.clear()
    order = [40, 3, 4, 3, 21]
    same_rows(rows.__getitems__(order), [wanted[number] for number in order])
    assert len(requests) == 1 and len(requests[0]) == len(
        {(row["shard"], row["record"]) for row in rows.entries[order]}
    )


def test_pieces_of_a_shard(copy, folder, requests, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 3000)  # records are in two or three of them
    same_rows(Prepared(copy, "train"), Prepared(folder, "train"))
    monkeypatch.setattr(shards, "KEEP", 0)
    same_rows(Prepared(copy, "train"), Prepared(folder, "train"))


@pytest.mark.parametrize("keep", [0, 1 << 30])
def test_batches_are_those_of_a_disk_while_requests_fail(copy, folder, faults, processor, monkeypatch, keep):
    monkeypatch.setattr(shards, "KEEP", keep)
    loaders = [
        BatchLoader(Prepared(place, "train"), processor, 8, threads=threads)
        for place, threads in ((copy, 3), (folder, 1))
    ]
    faults(3)
    for _, found, wanted in zip(range(3), *loaders):
        same_batch(found, wanted)
    assert faults(0)


@pytest.mark.slow
def test_grains_processes_read_from_it(copy, folder, processor):
    loader = BatchLoader(Prepared(copy, "train"), processor, 8, workers=1)
    wanted = BatchLoader(Prepared(folder, "train"), processor, 8)
    same_batch(next(iter(loader)), next(iter(wanted)))


def test_lengths_for_another_tokenizer_are_kept_in_it(copy, folder, requests, tmp_path):
    other = tiny_processor(preset("tiny"), "vicuna_v1")
    rows = Prepared(copy, "train")
    sizes = measure(rows, other, 4096)
    np.testing.assert_array_equal(
        sizes, measure(Prepared(shutil.copytree(folder, tmp_path / "disk"), "train"), other, 4096)
    )
    assert lengths.lengths_file(copy / "train", other).exists() and len(requests) == 1
    again = Prepared(copy, "train")
    np.testing.assert_array_equal(measure(again, other, 4096), sizes)
    assert len(requests) == 1
    assert not [name for name in storage.tree(copy) if "lock" in name]


def test_the_root_of_the_data(copy, folder, source, processor, monkeypatch):
    monkeypatch.setitem(datasets.DATA_SETS, "toy", TOY)
    root = copy.parent
    with pytest.raises(UserError, match=f"{root}/toy holds the data set '{TOY}', expected 'toy'"):
        examples(DataConfig(sources="toy", root=str(root)), "train", 64)
    prepare("toy", source, root / "set" / "toy", processor=processor)
    config = DataConfig(sources=(("toy", 1.0), ("synthetic", 1.0, {"train_size": 8})), root=str(root / "set"))
    rows = examples(config, "train", 64)
    same_rows(rows[: len(rows) - 8], Prepared(folder, "train"))
    named = DataConfig(sources=(("prepared", 1.0, {"folder": str(copy)}),))
    same_rows(examples(named, "val", 64), Prepared(folder, "val"))
    with pytest.raises(UserError, match=f"{root}/nothing/toy of Toy poses is not there. .* --out {root}/nothing/toy"):
        examples(DataConfig(sources="toy", root=f"{root}/nothing"), "train", 64)
    with pytest.raises(UserError, match=f"{copy} is a prepared folder. Name the source 'prepared'"):
        check_sources(DataConfig(sources=str(copy)))
    with pytest.raises(TooManyBroken):
        prepare("toy", source, root / "begun" / "toy", processor=processor, max_broken=0)
    with pytest.raises(UserError, match="begun/toy of Toy poses is not complete"):
        examples(DataConfig(sources="toy", root=f"{root}/begun"), "train", 64)
    with pytest.raises(UserError, match=f"--source {root} is in an object store; original files are read from a disk"):
        prepare("toy", root, root / "new", processor=processor)


SHARD = "train/00000-of-00004.array_record"


@pytest.mark.parametrize("keep", [0, 1 << 30])
@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("dataset.json", None, "is no prepared data set: dataset.json not found"),
        ("train/index.npy", None, "index.npy is not as it was prepared"),
        ("train/index.npy", lambda data: data + b"x", "index.npy is not as it was prepared .* bytes instead of"),
        (SHARD, None, "00000-of-00004.array_record is not as it was prepared .No such file"),
        (SHARD, lambda data: data[:-1], "00000-of-00004.array_record is not as it was prepared .131071 bytes instead of 131072"),
        (SHARD, lambda data: data[:500], "00000-of-00004.array_record is not as it was prepared"),
        (SHARD, lambda data: data.replace(b"left arm, said once", b"left leg, sa\xffd once"), "is not as it was prepared .record 0: .*data check"),
        (SHARD, lambda data: bytes(len(data)), "is not as it was prepared .* no ArrayRecord file|bytes are no chunk"),
    ],
)  # fmt: skip
def test_damage_is_one_clear_error(copy, monkeypatch, keep, name, edit, words):
    monkeypatch.setattr(shards, "KEEP", keep)
    data = (copy / name).read_bytes()
    if edit is None:
        (copy / name).unlink()
    else:
        storage.write_bytes(copy / name, edit(data))
    with pytest.raises(UserError, match=words) as raised:
        Prepared(copy, "train")[0]
    assert "\n" not in str(raised.value) and str(copy) in str(raised.value)


def test_check_and_show(copy, folder, source, capsys, tmp_path):
    words = ["--workers", "1", *ALLOWED]
    assert main(["data", "check", str(copy), *words]) == 0
    said = capsys.readouterr().out
    assert main(["data", "check", str(folder), *words, "--out", str(tmp_path)]) == 0
    assert said.replace(str(copy), "X") == re.sub(f"{tmp_path}|{folder}", "X", capsys.readouterr().out)
    assert set(storage.tree(copy)) - set(storage.tree(folder)) == {"check.json", "sheet.png"}
    assert (copy / "sheet.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
    assert main(["data", "show", str(copy), "--row", "2", "--out", str(copy / "row.png")]) == 0
    assert "key: line 1" in capsys.readouterr().out and (copy / "row.png").read_bytes()[:4] == b"\x89PNG"
    storage.write_bytes(copy / SHARD, (copy / SHARD).read_bytes()[:-1])
    (copy / SHARD.replace("00000-", "00001-")).unlink()
    assert main(["data", "check", str(copy), "--workers", "1", "--samples", "0"]) == 1
    said = capsys.readouterr().out
    assert (
        "00000-of-00004.array_record: 131071 bytes instead of 131072" in said
        and "00001-of-00004.array_record: not found" in said
    )


def test_check_reads_while_requests_fail(copy, faults):
    faults(5)
    assert main(["data", "check", str(copy), "--workers", "1", "--samples", "0", *ALLOWED]) == 0
    assert faults(0) > 1

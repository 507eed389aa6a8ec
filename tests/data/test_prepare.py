"""``chatpose data prepare`` and the source that reads its folders."""

import hashlib
import json
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from chatpose_jax.data import lengths, prepared
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.prepared import Prepared
from chatpose_jax.data.sizes import known_sizes, measure
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

HERE = Path(__file__).resolve().parent
TOY = "toy_reader:Toy"
WORDS = ["raise the left arm", "picture of a kneeling person", "empty", "bend both knees", "broken", "turn around"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(preset("tiny"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    (folder / "words.txt").write_text("\n".join(f"{word}" for word in WORDS * 12) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(source, processor, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "toy"
    sys.path.insert(0, str(HERE))
    prepare(TOY, source, out, processor=processor)
    sys.path.remove(str(HERE))
    return out


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_it_says_what_it_holds(folder):
    found = json.loads((folder / "dataset.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "train", "val"]
    assert found["schema"] == 1 and found["name"] == TOY
    assert found["about"]["licence"].startswith("CC0") and found["options"] == {
        "size": 8, "variants": 2, "seed": 0, "fail": "",
    }  # fmt: skip
    train = found["splits"]["train"]
    assert (train["records"], train["rows"], train["kinds"]) == (46, 92, {"text": 68, "image": 24})
    assert train["skipped"] == {"no pose": 11, "no such word": 11}
    assert train["broken"][0] == {"key": "line 4", "reason": "no such word", "detail": "the line is 'broken'"}
    for about in train["shards"]:
        data = (folder / "train" / about["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (about["bytes"], about["sha256"])
    assert [about["file"] for about in train["shards"]][-1] == "00008-of-00009.array_record"


def test_rows_are_those_of_the_reader(folder, source):
    from toy_reader import Toy

    reader = Toy(source)
    wanted = [
        item.example(variant)
        for part in reader.parts("train")
        for item in reader.read("train", part)
        if hasattr(item, "conversations")
        for variant in range(2)
    ]
    rows = Prepared(folder, "train")
    assert [row.id for row in rows] == [row.id for row in wanted]
    for found, row in zip(rows, wanted):
        assert found.kind == row.kind
        assert json.dumps(found.messages, default=bytes.hex) == json.dumps(row.messages, default=bytes.hex)
        np.testing.assert_array_equal(found.poses.rotations, row.poses.rotations)
        np.testing.assert_array_equal(found.extras["joints"], row.extras["joints"])
    assert rows.record(3).group == WORDS[1] and len(Prepared(folder, "test")) == 0
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize("max_length", [4096, 90, 60, 20])
def test_sizes_are_those_of_measuring(folder, processor, max_length):
    rows = Prepared(folder, "train")
    wanted = measure(rows[:], processor, max_length)
    np.testing.assert_array_equal(measure(rows, processor, max_length), wanted)
    known = known_sizes(rows, processor, max_length)
    cut = (wanted[:, 1:] < known_sizes(rows, processor, 4096)[:, 1:]).any(axis=1)
    np.testing.assert_array_equal(known[:, 0] < 0, cut)  # of all others the index knows the sizes


def test_another_template_is_counted_once(folder, processor, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    other = tiny_processor(preset("tiny"), "vicuna_v1")
    assert other.fingerprint != processor.fingerprint
    wanted = measure(Prepared(copy, "train")[:], other, 4096)
    assert not np.array_equal(wanted, measure(Prepared(copy, "train"), processor, 4096))
    np.testing.assert_array_equal(measure(Prepared(copy, "train"), other, 4096), wanted)
    monkeypatch.setattr(lengths, "count_lengths", None)
    np.testing.assert_array_equal(measure(Prepared(copy, "train"), other, 4096), wanted)
    (file,) = (copy / "train").glob("lengths-*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{file.name} is damaged"):
        Prepared(copy, "train").sizes(other, 4096)


def test_threads_and_pickles_read_the_same(folder, monkeypatch):
    monkeypatch.setattr(prepared, "OPEN_SHARDS", 2)
    rows = Prepared(folder, "train")
    wanted = [row.id for row in rows]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(rows)), 5)).tolist()
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda index: rows[index].id, order)) == [wanted[index] for index in order]
    assert len(rows._open) <= 2
    assert [row.id for row in pickle.loads(pickle.dumps(rows))] == wanted


def test_processes_give_the_same_bytes(folder, source, processor, tmp_path):
    prepare(TOY, source, tmp_path / "three", processor=processor, workers=3)
    assert contents(tmp_path / "three") == contents(folder)
    before = contents(tmp_path / "three")
    prepare(TOY, source, tmp_path / "three", processor=processor)  # nothing is left to do
    assert contents(tmp_path / "three") == before

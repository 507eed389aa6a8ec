"""``chatpose data prepare`` and the source that reads its folders."""

import collections
import contextlib
import errno
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.data import datasets, lengths, shards, store
from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.config import DataConfig
from chatpose_jax.data.prepare import TooManyBroken, find_reader, prepare
from chatpose_jax.data.prepared import Prepared
from chatpose_jax.data.sizes import known_sizes, measure
from chatpose_jax.data.sources import check_sources, examples
from chatpose_jax.errors import UserError
from chatpose_jax.locks import Locked, only_writer
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.train.run import run_training
from chatpose_jax.train.run_config import load_config
from tests.data.toy_reader import TOY, WORDS, write_words

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(preset("tiny"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("original"), 12)


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
    words = "the line is 'broken', as <object object> said"  # without the address
    assert train["broken"][0] == {"key": "line 4", "reason": "no such word", "detail": words}
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


def test_lengths_are_counted_by_one_of_several(folder, tmp_path):
    copy, other = shutil.copytree(folder, tmp_path / "copy"), tiny_processor(preset("tiny"), "vicuna_v1")
    file = lengths.lengths_file(copy / "train", other)
    with ThreadPoolExecutor(1) as pool:
        with only_writer(file, file.with_suffix(".lock")):
            waiting = pool.submit(Prepared(copy, "train").sizes, other, 4096)
            time.sleep(0.1)
            assert not waiting.done() and not file.exists()
        found = waiting.result()
    assert file.exists()
    nowhere = folder / "dataset.json"  # no folder, so nobody can write there
    again = lengths.lengths_of(Prepared(folder, "train"), nowhere, other)
    np.testing.assert_array_equal(again["tokens"], np.load(file)["tokens"])
    assert found.shape == (92, 3)


def test_threads_and_pickles_read_the_same(folder, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    rows = Prepared(folder, "train")
    wanted = [row.id for row in rows]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(rows)), 5)).tolist()
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda index: rows[index].id, order)) == [wanted[index] for index in order]
    assert len(rows._shards._open) <= 2
    assert [row.id for row in pickle.loads(pickle.dumps(rows))] == wanted


def test_processes_give_the_same_bytes(folder, source, processor, tmp_path):
    prepare(TOY, source, tmp_path / "three", processor=processor, workers=3)
    assert contents(tmp_path / "three") == contents(folder)
    before = contents(tmp_path / "three")
    prepare(TOY, source, tmp_path / "three", processor=processor)  # nothing is left to do
    assert contents(tmp_path / "three") == before
    other = shutil.copytree(source, tmp_path / "source")
    (other / "words.txt").write_text("turn\n" * 30)
    words = "three holds a data set with other original files: those in --source were changed since it was begun; choose another folder"
    with pytest.raises(UserError, match=words):
        prepare(TOY, other, tmp_path / "three", processor=processor)


class Forks:
    """Processes that run ``chatpose``, each forked from one that has imported it (``forks.py``)."""

    def __init__(self, folder):
        path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, HERE / "forks.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert self.process.stdout.readline().startswith("ready")

    def start(self, *argv, pause=0.0, **task):
        """Starts ``chatpose argv``, and returns its process id."""
        env = {"TOY_PAUSE": str(pause)}
        self.process.stdin.write(
            json.dumps({"argv": list(map(str, argv)), "env": env, "log": str(self.log), **task}) + "\n"
        )
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """Waits for the process that was started: its exit code, and what it printed."""
        return int(self.process.stdout.readline()), self.log.read_text()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    found = Forks(tmp_path_factory.mktemp("forks"))
    yield found
    found.process.stdin.close()
    found.process.wait(10)


def words_of(source, out):
    return ["data", "prepare", TOY, "--source", source, "--out", out, "--workers", 1]


def test_ten_kills_at_random_leave_the_same_bytes(folder, source, forks, tmp_path):
    wanted, seed = contents(folder), random.randrange(1 << 30)
    draw, stages, kills, number = random.Random(seed), set(), 0, 0
    # Ten kills, and more if none of them came while a file was being written, or all did.
    while kills < 10 or (len({half for _, half in stages}) < 2 and kills < 60):
        out = tmp_path / str(number)
        start = time.monotonic()
        process = forks.start(*words_of(source, out), pause=0.004)
        if not kills:  # how long it takes
            while not (out / store.WORK / "train" / "00000").exists():
                time.sleep(0.001)
            first = time.monotonic() - start
        time.sleep(draw.uniform(0, 4 * first) if kills else 0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        code, _ = forks.end()
        if code == 0:
            assert contents(out) == wanted, seed
            number += 1
            continue
        assert code == -signal.SIGKILL
        kills += 1
        half = any(out.glob("*/*.tmp"))
        stages.add((len(list(out.glob(f"{store.WORK}/*/[0-9]*"))), half))
    assert len({done for done, _ in stages}) > 2 and {half for _, half in stages} == {True, False}, (stages, seed)
    forks.start(*words_of(source, out))
    assert forks.end()[0] == 0
    assert contents(out) == wanted, seed


def test_a_kill_before_any_operation_on_a_file_loses_nothing(source, processor, forks, tmp_path):
    few = tmp_path / "source"
    few.mkdir()
    (few / "words.txt").write_text("\n".join(WORDS * 2))
    forks.start(*words_of(few, tmp_path / "whole"))
    code, said = forks.end()
    operations = int(said.splitlines()[-1])
    wanted = contents(tmp_path / "whole")
    assert code == 0 and operations > 20
    for number in range(1, operations + 1):
        out = tmp_path / str(number)
        forks.start(*words_of(few, out), kill_at=number)
        assert forks.end()[0] == -signal.SIGKILL, number
        prepare(TOY, few, out, processor=processor)
        assert contents(out) == wanted, number


def test_an_interrupt_says_how_to_go_on(folder, source, forks, tmp_path):
    process = forks.start(*words_of(source, tmp_path / "out"), pause=0.01)
    while not (tmp_path / "out" / store.WORK / "train" / "00001").exists():
        time.sleep(0.001)
    os.kill(process, signal.SIGINT)
    code, said = forks.end()
    assert code == 130 and "what is finished is kept: the same command continues" in said and "Traceback" not in said
    forks.start(*words_of(source, tmp_path / "out"))
    code, said = forks.end()
    assert code == 0 and contents(tmp_path / "out") == contents(folder)
    assert re.search(r"\| 0/10 ", said) is None  # it did not begin again


def test_a_full_disk_is_one_line(source, forks, tmp_path):
    forks.start(*words_of(source, tmp_path / "out"), largest=70_000)
    code, said = forks.end()
    assert code == 2 and "Traceback" not in said
    assert re.search(r"^error: .*00000-of-00009.array_record.*: File too large$", said, flags=re.M), said
    forks.start(*words_of(source, tmp_path / "out"))
    assert forks.end()[0] == 0


def test_the_system_s_words_for_a_failed_write_are_found(source, processor, tmp_path, monkeypatch):
    import array_record.python.array_record_module as module

    class Full(module.ArrayRecordWriter):
        def __init__(self, path, options):
            super().__init__("/dev/full", options)

    monkeypatch.setattr(module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="No space left") as raised:
        prepare(TOY, source, tmp_path / "out", processor=processor)
    assert raised.value.errno == errno.ENOSPC and "array_record" in raised.value.filename


def test_folders_that_cannot_be_used(folder, source, processor, tmp_path):
    def attempt(match, out, **changes):
        with pytest.raises(UserError, match=match):
            prepare(TOY, changes.pop("source", source), out, **{"processor": processor, **changes})

    (tmp_path / "file").write_text("")
    attempt("cannot be written", tmp_path / "file" / "out")
    attempt("there is no folder|is no folder", tmp_path / "out", source=tmp_path / "nothing")
    attempt(
        "^Toy poses: .*words.txt not found. --source is a folder with words.txt: a line a row. Get it from https://example.org/toy "
        r"\(licence: CC0, free for all uses\). Then type the same command again$",
        tmp_path / "out",
        source=HERE / "readers",
    )
    attempt("holds other files \\(file\\)", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    before = contents(folder)
    attempt(
        "holds a data set with options {'variants': 2}, and this call has {'variants': 3}; choose another folder, or delete this one$",
        folder,
        options={"variants": 3},
    )
    attempt(
        r"holds a data set with tokens that were counted for .* \(--model\) '",
        folder,
        processor=tiny_processor(preset("tiny"), "vicuna_v1"),
    )
    assert contents(folder) == before
    attempt("has no option 'varants'; did you mean variants", tmp_path / "out", options={"varants": 3})
    attempt("the option variants: expected int, found 'x'", tmp_path / "out", options={"variants": "x"})
    assert not (tmp_path / "out").exists()
    out = tmp_path / "locked"
    with only_writer(out, out / ".lock"), pytest.raises(Locked, match="is writing it"):
        prepare(TOY, source, out, processor=processor)


def test_other_options_do_not_continue_what_was_begun(source, processor, tmp_path):
    with pytest.raises(TooManyBroken):
        prepare(TOY, source, tmp_path / "out", processor=processor, max_broken=3)
    with pytest.raises(
        UserError, match=r"holds the beginning of a data set with options {'seed': \d+}, and this call has {'seed': 1}"
    ):
        prepare(TOY, source, tmp_path / "out", processor=processor, options={"seed": 1})
    other = shutil.copytree(source, tmp_path / "other")  # files of these names, which may hold other things
    with pytest.raises(UserError, match="holds the beginning of a data set with source"):
        prepare(TOY, other, tmp_path / "out", processor=processor)
    with pytest.raises(TooManyBroken):
        prepare(TOY, other, tmp_path / "changed", processor=processor, max_broken=0)
    (other / "words.txt").write_text("turn\n" * 30)
    with pytest.raises(
        UserError, match="holds the beginning of a data set with other original files: those in --source"
    ):
        prepare(TOY, other, tmp_path / "changed", processor=processor)
    with pytest.raises(
        UserError, match="out is not complete: the same 'chatpose data prepare' that began it continues"
    ):
        Prepared(tmp_path / "out", "train")
    with pytest.raises(UserError, match="nowhere is no prepared data set: there is no such folder"):
        Prepared(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_broken_items_stop_it(folder, source, tmp_path, capsys, workers):
    words = [*map(str, words_of(source, tmp_path / "out")), "--workers", str(workers)]
    assert main([*words, "--max-broken", "3"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"^error: \d items are broken, more than --max-broken 3: line \d+: no such word \(the line is 'broken', as <object object> said\); ",
        said,
    )
    assert main([*words, "--max-broken", "12"]) == 0  # 11 of train and 1 of val
    assert contents(tmp_path / "out") == contents(folder)


def test_rows_that_training_would_refuse_are_broken_items(processor, tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(["raise", "twisted", "moved", *["turn"] * 4]))
    found = prepare(TOY, tmp_path, tmp_path / "out", processor=processor)["splits"]["train"]
    twisted, moved = found["broken"]
    assert found["records"] == 1 and twisted["key"] == "line 1" and "rotations must be rotation" in twisted["detail"]
    assert moved["key"] == "line 2" and "a translation changes its frame about the pelvis" in moved["detail"]


def test_text_that_is_not_unicode_is_a_broken_item(processor, tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(["raise", "half", *["turn"] * 4]))
    found = prepare(TOY, tmp_path, tmp_path / "out", processor=processor)["splits"]["train"]
    item, record = found["broken"]
    assert item["key"] == "?" and item["detail"] == "?" * 1000
    assert found["records"] == 1 and record["key"] == "line 1" and "surrogates not allowed" in record["detail"]
    assert store.read_description(tmp_path / "out")["splits"]["train"] == found


def test_more_rows_than_the_index_can_number(processor, tmp_path, monkeypatch):
    monkeypatch.setattr("chatpose_jax.data.prepare.MAX_CONVERSATIONS", 1)
    (tmp_path / "words.txt").write_text("\n".join(["raise"] * 5))
    found = prepare(TOY, tmp_path, tmp_path / "out", processor=processor)["splits"]["train"]
    assert found["records"] == 0 and "it has 2 conversations, more than 1" in found["broken"][0]["detail"]


@pytest.mark.parametrize(
    ("fail", "words"), [("user", "words.txt: cannot be read"), ("", "Toy poses, train, range.*: KeyError: 'x'")]
)
def test_a_part_that_fails_is_named(processor, tmp_path, fail, words):
    (tmp_path / "words.txt").write_text("\n".join(["raise", "fail", *["turn"] * 4]))
    with pytest.raises(UserError, match=words):
        prepare(TOY, tmp_path, tmp_path / "out", processor=processor, options={"fail": fail})


def test_more_parts_than_shards_share_them(folder, source, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("chatpose_jax.data.prepare.MAX_SHARDS", 4)
    prepare(TOY, source, tmp_path / "out", processor=processor)
    rows = Prepared(tmp_path / "out", "train")
    assert len(list((tmp_path / "out" / "train").glob("*.array_record"))) == 4
    assert [row.id for row in rows] == [row.id for row in Prepared(folder, "train")]


def damage(folder, change):
    """Changes a copy of a prepared folder: "schema", or one of its files by a function of its bytes."""
    name, edit = change
    file = folder / name
    if edit is None:
        file.unlink()
    else:
        file.write_bytes(edit(file.read_bytes()))


SHARD = "train/00000-of-00009.array_record"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ("dataset.json", lambda data: data.replace(b'"schema": 1', b'"schema": 7')),
            "has schema version 7, .* reads 1",
        ),
        (("dataset.json", lambda data: data[:-9]), "dataset.json is damaged"),
        (("dataset.json", lambda data: b"[]"), "describes no prepared data set"),
        (("dataset.json", None), "is no prepared data set: dataset.json not found"),
        (("train/index.npy", lambda data: data + b"x"), "index.npy is not as it was prepared .* bytes instead of"),
        (("train/index.npy", None), "index.npy is not as it was prepared .*No such file"),
        (("train/index.npy", lambda data: data.replace(b"tokens", b"tokans")), "index.npy is not as it was prepared"),
        (
            (SHARD, lambda data: data[:-1]),
            "00000-of-00009.array_record is not as it was prepared .131071 bytes instead of 131072",
        ),
        ((SHARD, None), "00000-of-00009.array_record is not as it was prepared .No such file"),
        (
            (SHARD, lambda data: data.replace(b"left arm, said once", b"left leg, said once")),
            "is not as it was prepared .record 0: .*data check",
        ),
        ((SHARD, lambda data: bytes(len(data))), "is not as it was prepared"),
    ],
)
def test_damage_is_one_clear_error(folder, tmp_path, change, words):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy, change)
    with pytest.raises(UserError, match=words) as raised:
        Prepared(copy, "train")[0]
    assert "\n" not in str(raised.value) and str(copy) in str(raised.value)


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(datasets.DATA_SETS, "toy", TOY)


def test_data_sets_are_sources(source, processor, tmp_path, known):
    prepare("toy", source, tmp_path / "toy", processor=processor)
    rows = examples(DataConfig(sources="toy", root=str(tmp_path)), "train", 64)
    assert len(rows) == 92 and rows[0].where.startswith("row 0 of data.sources[0] 'toy'")
    elsewhere = DataConfig(
        sources=(("toy", 1.0, {"folder": str(tmp_path / "toy")}), ("synthetic", 1.0, {"val_size": 8}))
    )
    assert len(examples(elsewhere, "val", 64)) == 4 + 8
    named = DataConfig(sources=(("prepared", 1.0, {"folder": str(tmp_path / "toy")}),))
    assert [row.id for row in examples(named, "val", 64)] == [row.id for row in examples(elsewhere, "val", 64)][:4]


def test_data_that_is_not_there(source, folder, processor, tmp_path, known):
    config = DataConfig(sources="toy", root=str(tmp_path))
    check_sources(config)
    words = (
        f"^data.sources\\[0\\] 'toy': the prepared folder {tmp_path}/toy of Toy poses is not there. Get it from "
        r"https://example.org/toy \(licence: CC0, free for all uses\), then type: chatpose data prepare toy --source FOLDER --out "
    )
    with pytest.raises(UserError, match=words):
        examples(config, "train", 64)
    with pytest.raises(TooManyBroken):
        prepare("toy", source, tmp_path / "toy", processor=processor, max_broken=2)
    with pytest.raises(UserError, match="toy of Toy poses is not complete"):
        examples(config, "train", 64)
    both = DataConfig(sources=(("toy",), ("synthetic",), ("cmu",)), root=str(tmp_path))
    with pytest.raises(
        UserError,
        match=rf"'toy': the prepared folder .*\. Neither there nor complete: {tmp_path}/cmu; 'chatpose data list",
    ):
        examples(both, "train", 64)
    with pytest.raises(
        UserError, match=f"'{folder}': {folder} is a prepared folder.* --set data.sources.prepared.folder={folder}$"
    ):
        check_sources(DataConfig(sources=str(folder)))
    with pytest.raises(UserError, match="has no option 'fodler'; did you mean folder"):
        check_sources(DataConfig(sources=(("toy", 1.0, {"fodler": "x"}),)))
    with pytest.raises(UserError, match=f"holds the data set '{TOY}', expected 'toy'"):
        examples(DataConfig(sources=(("toy", 1.0, {"folder": str(folder)}),)), "train", 64)


def test_sources_without_held_out_rows_take_no_part_in_validation(source, processor, tmp_path, known):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "words.txt").write_text("turn\n" * 4)  # all of them "val"
    prepare("toy", tmp_path / "few", tmp_path / "toy", processor=processor)
    both = DataConfig(sources=(("synthetic", 1.0, {"test_size": 6}), ("toy", 2.0)), root=str(tmp_path))
    assert len(examples(both, "test", 64)) == 6
    with pytest.raises(UserError, match="'toy', split 'train', has no rows; a mixture needs some of each source"):
        examples(both, "train", 64)


def test_the_table_of_the_docs():
    text = (HERE.parents[1] / "docs/data-sets.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\(#[\w-]+\) \| (.*) \| (.*) \|$", text, flags=re.M)
    abouts = {name: find_reader(name).about for name in sorted(datasets.DATA_SETS)}
    assert rows == [(name, about.title, about.licence) for name, about in abouts.items()]


def test_a_mixture_with_a_prepared_folder_trains(processor, tmp_path, known):
    (tmp_path / "words.txt").write_text("raise both arms\n" * 12)
    prepare("toy", tmp_path, tmp_path / "toy", processor=processor)
    settings = [
        "train.steps=2",
        "train.log_every=1",
        "train.batch_size=2",
        "data.buckets=1",
        "train.eval_every=0",
        f"data.root={tmp_path}",
    ]
    half = {"train_size": 8, "tasks": {"text_short": 1}}
    settings.append("data.template=vicuna_v1")
    config = load_config("tiny", [*settings, f"data.sources=(('synthetic', 1.0, {half}), ('toy', 2.0))"])
    said: list[str] = []
    run_training(config, tmp_path / "run", progress=False, say=said.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] > 0 for line in lines)
    assert any("24 rows" in line for line in said)
    assert list((tmp_path / "toy" / "train").glob("lengths-*.npy"))  # another template than that of the index
    words = ["data", "prepare", "toy", "--source", str(tmp_path), "--out", str(tmp_path / "for model"), "--quiet"]
    assert main([*words, "--workers", "1", "--model", str(tmp_path / "run" / "model")]) == 0
    found = json.loads((tmp_path / "for model" / "dataset.json").read_text())["lengths"]
    assert found == tiny_processor(preset("tiny"), "vicuna_v1").fingerprint != processor.fingerprint


def test_batches_come_from_shards(folder, processor):
    loader = BatchLoader(Prepared(folder, "train"), processor, 8)
    plain = BatchLoader(Prepared(folder, "train")[:], processor, 8)
    assert loader.state() == plain.state()
    for name, value in loader.batch(3).items():
        if name != "poses":
            np.testing.assert_array_equal(value, plain.batch(3)[name])
    process = iter(BatchLoader(Prepared(folder, "train"), processor, 8, workers=1))
    np.testing.assert_array_equal(next(process)["input_ids"], plain.batch(0)["input_ids"])


def test_a_million_rows_open_at_once(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    about = json.loads((copy / "dataset.json").read_text())
    rows = np.resize(np.load(copy / "train" / store.INDEX), 1_000_000)
    np.save(copy / "train" / store.INDEX, rows)
    train = about["splits"]["train"]
    train["rows"], train["index"]["bytes"] = len(rows), (copy / "train" / store.INDEX).stat().st_size
    (copy / "dataset.json").write_text(json.dumps(about))
    start = time.process_time()
    found = Prepared(copy, "train")
    assert found[999_999].id and len(found) == 1_000_000
    assert time.process_time() - start < 0.2
    sizes = found.sizes(tiny_processor(preset("tiny")), 1024)
    assert sizes.shape == (1_000_000, 3) and time.process_time() - start < 2


def test_the_list_of_data_sets(known, capsys):
    assert main(["data", "list"]) == 0
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    place = next(place for place, line in enumerate(said) if line.startswith("toy "))
    assert re.fullmatch("toy +Toy poses", said[place])
    assert said[place + 1 : place + 3] == ["CC0, free for all uses", "https://example.org/toy"]
    assert main(["data", "list", "toy"]) == 0
    said = capsys.readouterr().out
    assert "words.txt: a line a row" in said and "variants: int = 2" in said
    assert main(["data", "list", "tou"]) == 2 and "did you mean toy" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chatpose_13b", "chatpose_7b"])
def test_the_paper_s_mixture(name):
    config = load_config(name)
    check_sources(config.data)
    kinds = {"posescript": "text", "llava": "instruction"}
    shares = collections.Counter()
    for row in config.data.sources:
        shares[kinds.get(row.name, "image")] += row.weight
    assert dict(shares) == {"text": 1, "instruction": 1, "image": 2}

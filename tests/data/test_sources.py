"""Sources by name: their options are checked, their errors name the source and the row, and several are a mixture by weight."""

import dataclasses
import errno
import json
import pickle
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import jax
import numpy as np
import pytest
from PIL import Image

from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import DataConfig, SourceRow
from chatpose_jax.data.example import Example
from chatpose_jax.data.mixture import Mixture
from chatpose_jax.data.sizes import known_sizes, measure
from chatpose_jax.data.sources import NamedRows, check_sources, examples
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax.pose import Pose

PAPER = tuple(
    ("synthetic", weight, {"kind": kind, "train_size": 20})
    for kind, weight in (("text", 1.0), ("instruction", 1.0), ("image", 2.0))
)
OWN = "a_source_for_tests:make"
OPTIONS = "image_size, seed, kind, tasks, train_size, val_size, test_size, max_yaw, keypoints"
WHERE = f"data.sources[0] {OWN!r}"


def some(count=4):
    return SyntheticDataset("val", count, tasks={"text": 1})[:]


@pytest.fixture
def own(monkeypatch):
    """A source of one's own becomes ``OWN``; gives the configuration of it alone."""
    module = types.ModuleType("a_source_for_tests")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def use(make, **options):
        module.make = make
        return DataConfig(sources=((OWN, 1.0, options),))

    return use


def refused(config, split="train"):
    with pytest.raises(UserError) as raised:
        examples(config, split, 64)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_several_rows_are_a_mixture_by_weight():
    rows = examples(DataConfig(sources=PAPER), "train", 64)
    parts = np.split(np.arange(len(rows)), np.cumsum([size for size, _ in rows.draws])[:-1])
    kinds = [rows[int(part[0])].kind for part, (_, share) in zip(parts, rows.draws) for _ in range(share)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"text": 15, "instruction": 15, "image": 30}


def test_one_row_is_the_set_itself():
    config = DataConfig(sources=(("synthetic", 3.0, {"val_size": 7, "tasks": {"image": 1}, "max_yaw": 0.0}),), seed=4)
    rows = examples(config, "val", 32)
    expected = SyntheticDataset("val", 7, 4, 32, {"image": 1}, 0.0)
    assert len(rows) == 7 and [row.id for row in rows] == [row.id for row in expected]
    found, drawn = (data[3].messages[0]["content"][0]["image"] for data in (rows, expected.precompute()))
    np.testing.assert_array_equal(np.asarray(found), drawn)
    assert len(examples(config, "test", 32)) == 512


def test_the_settings_have_one_form_in_json_and_python():
    written = DataConfig(sources=("synthetic", ["a:b", 2], ("c.d:e", 1.5, {"x": [1, [2]], "y": {"z": None}}))[1:])
    assert written.sources == (SourceRow("a:b", 2, {}), SourceRow("c.d:e", 1.5, {"x": (1, (2,)), "y": {"z": None}}))
    assert DataConfig(**json.loads(json.dumps(dataclasses.asdict(written)))) == written
    assert DataConfig(sources="a:b").sources == (SourceRow("a:b"),) == DataConfig(sources=(("a:b",),)).sources


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((), "expected rows of"),
        (("a:b", "c:d"), "found 'a:b' instead of a row; a single row needs a comma"),
        (((),), "instead of a row"),
        ((("a:b", 1, {}, 4),), "instead of a row"),
        ((("a:b", 0),), "weights must be positive"),
        ((("a:b", float("nan")),), r"^data.sources\[0\]: weight: expected a finite number, found nan$"),
        ((("a:b", {"folder": "x"}),), r"^data.sources\[0\]: weight: expected a finite number, found {'folder': 'x'}$"),
        (("a:b", ("c:d",), (3, 1))[1:], r"^data.sources\[1\]: name: expected str, found 3$"),
        ((("a:b", 1, 4),), r"^data.sources\[0\]: options: expected a table of str to anything, found 4$"),
    ],
)
def test_what_is_no_row_is_refused(rows, words):
    with pytest.raises(UserError, match=words):
        DataConfig(sources=rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trian_size": 3}, " has no option 'trian_size'; did you mean train_size?"),
        ({"zzz": 3}, f" has no option 'zzz'; its options are {OPTIONS}"),
        ({"split": "val"}, f" has no option 'split'; its options are {OPTIONS}"),
        ({"train_size": "8"}, ": the option train_size: expected int, found '8'"),
        ({"train_size": True}, ": the option train_size: expected int, found True"),
        ({"kind": "words"}, ": the option kind: expected 'text' or 'image' or 'instruction' or none, found 'words'"),
        ({"tasks": {"text": "much"}}, ": the option tasks: expected a table of str to a finite number, found {'text': 'much'}"),
        ({"val_size": 0}, " raised for split 'train': val_size must be a whole number of at least 1, found 0"),
        ({"tasks": {"txt": 1}}, " raised for split 'train': tasks: there is no 'txt'; did you mean text?"),
        ({"tasks": {"image": 1}, "kind": "text"}, " raised for split 'train': tasks: weights must not be negative, nor all 0, found {}"),
    ],
)  # fmt: skip
def test_options_of_the_generated_set_are_checked(options, words):
    assert refused(DataConfig(sources=(("synthetic", 1.0, options),))) == f"data.sources[0] 'synthetic'{words}"


def make(
    split,
    *,
    file: str,
    seed: int,
    parts: tuple[int, ...] = (),
    names: Sequence[str] = (),
    sizes: "Mapping[str, float] | None" = None,
    mode: Literal["a", 1] = "a",
    anything=None,
    hook: Callable[[int], int] | None = None,
    share: Annotated[float, "of one"] = 0.5,
):
    return some()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs the option 'file'"),
        ({"file": 3}, ": the option file: expected str, found 3"),
        ({"file": "f", "parts": 3}, ": the option parts: expected a list, each int, found 3"),
        ({"file": "f", "names": (1,)}, ": the option names: expected a list, each str, found (1,)"),
        ({"file": "f", "sizes": {1: 2}}, ": the option sizes: expected a table of str to a finite number or none, found {1: 2}"),
        ({"file": "f", "mode": True}, ": the option mode: expected 'a' or 1, found True"),
        ({"file": "f", "hook": 3}, ": the option hook: expected"),
        ({"file": "f", "share": "x"}, ": the option share: expected"),
        ({"file": "f", "image_size": 3}, "has no option 'image_size'; its options are file, seed, parts"),
    ],
)  # fmt: skip
def test_options_of_ones_own_are_checked_before_anything_is_read(own, monkeypatch, options, words):
    monkeypatch.setattr(SyntheticDataset, "__getitem__", lambda *_: pytest.fail("rows were read"))
    config = own(make, **options)
    said = [refused(config)]
    with pytest.raises(UserError) as raised:
        check_sources(DataConfig(sources=(("synthetic",), *config.sources)))
    said.append(str(raised.value).replace("[1]", "[0]"))
    for line in said:
        assert line.startswith(WHERE) and words in line


def test_options_of_ones_own_arrive(own):
    seen = []

    class Rows(list):
        def __init__(self, split, *, image_size: int, seed: int, parts: tuple[int, ...] = (), **others):
            seen.append((split, image_size, seed, parts, others))
            super().__init__(some())

    config = own(Rows, parts=[1, 2], x=3)
    examples(dataclasses.replace(config, seed=5), "val", 64)
    examples(own(Rows, seed=6), "train", 32)
    assert seen == [("val", 64, 5, (1, 2), {"x": 3}), ("train", 32, 6, (), {})]
    for plain in (lambda split: some(), lambda split, size=3: some(), lambda *_: some(), lambda split, *, file="x": some()):  # fmt: skip
        assert len(examples(own(plain), "train", 64)) == 4


def test_a_source_that_is_missing_is_named():
    for source, words in (
        ("no_such_module:rows", "cannot be imported.*PYTHONPATH"),
        ("chatpose_jax.data.mixture:rows", "the module chatpose_jax.data.mixture has no function or class 'rows'"),
        ("chatpose_jax.data.mixture:__name__", "has no function"),
        (":rows", "expected 'synthetic' or 'prepared' or"),
        ("nonsense", "expected 'synthetic' or 'prepared'.* or 'package.module:name'"),
        ("syntetic", "did you mean synthetic?"),
        ("motion", "type chatpose data prepare cmu --source FOLDER --out data/cmu"),
        ("synthetic-image", r'is now \("synthetic", 1.0, {"kind": "image"}\)'),
    ):
        with pytest.raises(UserError, match=words):
            examples(DataConfig(sources=source), "train", 64)


@pytest.mark.parametrize(
    "make",
    [
        lambda config, split, image_size: [],
        lambda config, split: [],
        lambda *, split: [],
        lambda split, image_size, *, seed: [],
    ],
)
def test_a_source_of_versions_before_is_told_the_new_form(own, make):
    line = refused(own(make))
    said = "a source takes the split, and its options by keyword: write def make(split, *, image_size, seed), "
    assert line.startswith(f"{WHERE}: {said}")
    assert "found def make(" in line


def test_an_annotation_that_cannot_be_checked_is_one_line(own):
    class Opener(Protocol):
        def open(self): ...

    def make(split, *, by: Opener | None = None, to: Opener):
        return []

    assert "checked against the annotation of its option to" in refused(own(make, to=3))


def test_a_signature_that_cannot_be_read_is_one_line(own):
    def make(split, *, x: "NoSuchType" = 3):  # noqa: F821
        return []

    assert "its signature cannot be read (NameError: name 'NoSuchType' is not defined)" in refused(own(make))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda split: None, ": expected a sequence of Example, found NoneType"),
        (lambda split: [{}], ", split 'train': expected an Example, found dict"),
    ],
)
def test_a_source_that_gives_no_examples_is_named(own, source, words):
    assert refused(own(source)).endswith(f"{WHERE}{words}")


def failing(error):
    def fail(*_):
        raise error

    return fail


class Lines(list):
    """Lines of JSON, read when a row is taken."""

    def __getitem__(self, index):
        return json.loads(super().__getitem__(index))["example"] or some()[index]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"exa', "JSONDecodeError: Unterminated string starting at: line 1 column 2 (char 1)"),
        ("{}", "KeyError: 'example'"),
        ('{"example": 3}', "expected an Example, found int"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_row_that_fails_is_named(own, line, words, number):
    config = own(lambda *_: Lines(['{"example": null}'] * 4 + [line]))
    config = DataConfig(sources=(("synthetic", 1.0, {"train_size": 3}),) * number + config.sources)
    rows = examples(config, "train", 64)
    with pytest.raises(UserError) as raised:
        measure(rows, tiny_processor(preset("tiny")), 1024)
    assert str(raised.value) == f"row 4 of data.sources[{number}] {OWN!r}, split 'train': {words}"


TURNS = np.tile(np.eye(3, dtype=np.float32), (1, 24, 1, 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"poses": TURNS}, "poses: expected a smpl_jax.Pose, found ndarray"),
        ({"poses": None}, "poses: expected a smpl_jax.Pose, found NoneType"),
        ({"poses": Pose(TURNS[0], "camera")}, "poses: expected a Pose of batch shape (P,), one for each <POSE>, found ()"),
        ({"poses": Pose(np.zeros((1, 24, 3)), "camera")}, "poses: rotations must have shape (..., J, 3, 3), found float64 (1, 24, 3)"),
        ({"poses": Pose(TURNS, "sky")}, "poses: frame must be one of"),
        ({"poses": Pose(TURNS * np.nan, "camera")}, "poses: rotations must be finite numbers"),
        ({"kind": "video"}, "kind: expected 'text' or 'image' or 'instruction', found 'video'"),
    ],
)  # fmt: skip
def test_a_row_that_is_wrong_is_named_when_it_is_taken(own, change, words):
    rows = some(2)
    bad = [rows[0], dataclasses.replace(rows[1], **change)]
    found = examples(own(lambda split: bad), "val", 64)
    with pytest.raises(UserError) as raised:
        found[1]
    assert str(raised.value).startswith(f"row 1 of {WHERE}, split 'val': {words}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"poses": Pose(np.tile(TURNS, (2, 1, 1, 1)), "camera")}, "its answers hold 1 <POSE>, but it has 2 poses"),
        ({"poses": Pose(2 * TURNS, "camera")}, "poses: rotations must be rotation matrices"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0]: empty content"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_row_that_cannot_be_encoded_is_named_by_its_place(own, processor, change, words, number):
    """In a mixture too, and when it was taken out of its sequence, as held-out rows are."""
    rows = some(2)
    bad = own(lambda split: [rows[0], dataclasses.replace(rows[1], **change)])
    bad = DataConfig(sources=(("synthetic", 1.0, {"val_size": 3}),) * number + bad.sources)
    row = examples(bad, "val", 64)[-1:] if number == 0 else [examples(bad, "val", 64)[4]]
    with pytest.raises(UserError) as raised:
        encode_example(processor, row[0], 256)
    assert str(raised.value).startswith(f"row 1 of data.sources[{number}] {OWN!r}, split 'val': {words}")


def test_an_image_that_is_missing_is_named_by_its_row_when_its_batch_comes(own, processor):
    row = some(1)[0]
    asked = {"role": "user", "content": [{"type": "image", "image": "no-such.jpg"}, {"type": "text", "text": "Who?"}]}
    rows = examples(own(lambda split: [dataclasses.replace(row, messages=[asked, row.messages[1]])]), "train", 64)
    loader = BatchLoader(rows, processor, 1)
    with pytest.raises(UserError, match=rf"^row 0 of {re.escape(WHERE)}, split 'train': .*no-such.jpg"):
        loader.batch(0)


def test_a_row_keeps_what_it_is_when_it_learns_its_place(own):
    class Mine(Example):
        def __init__(self, word):
            super().__init__(word, "text", [{"role": "user", "content": word}])

    rows = [Mine("walk")]
    found = examples(own(lambda split: rows), "val", 64)[0]
    assert type(found) is Mine and found.messages is rows[0].messages
    assert found.place == f"row 0 of {WHERE}, split 'val'" and rows[0].place == "example 'walk'"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("/data/x.json"), "FileNotFoundError: /data/x.json"),
        (KeyError("train"), "KeyError: 'train'"),
        (UserError("no rows here"), "no rows here"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_source_that_fails_is_named(own, error, words):
    assert refused(own(failing(error))) == f"{WHERE} raised for split 'train': {words}"


def test_what_the_system_refused_a_source_stays_an_error_of_the_system(own):
    """By its number training knows whether the run can go on."""
    with pytest.raises(FileNotFoundError) as raised:
        examples(own(failing(FileNotFoundError(errno.ENOENT, "No such file", "/data/x.json"))), "train", 64)
    assert raised.value.filename == "/data/x.json"
    assert raised.value.strerror == f"No such file ({WHERE} raised for split 'train': FileNotFoundError)"


def test_a_module_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "module_that_fails.py").write_text("rows = nothing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="'module_that_fails:rows' cannot be imported: NameError: name 'nothing'"):
        examples(DataConfig(sources="module_that_fails:rows"), "train", 64)


def test_a_mixture_names_the_source_without_rows(own):
    config = DataConfig(sources=(("synthetic",), *own(lambda split: []).sources))
    assert refused(config).startswith(f"data.sources[1] {OWN!r}, split 'train', has no rows")


def test_rows_may_say_themselves_what_an_epoch_holds(own):
    mixture = examples(DataConfig(sources=PAPER), "train", 64)
    rows = pickle.loads(pickle.dumps(examples(own(lambda *_: mixture), "train", 64)))  # as Grain's processes get them
    processor = tiny_processor(preset("tiny"))
    assert BatchLoader(rows, processor, 4).state() == BatchLoader(mixture, processor, 4).state()
    assert rows.shares == mixture.shares and len(rows[2:5]) == 3
    assert not hasattr(examples(own(lambda *_: some()), "train", 64), "draws")


class Knowing(list):
    """Rows that know their sizes, and remember which of them were taken."""

    def __init__(self, rows, sizes):
        super().__init__(rows)
        self.given, self.taken = sizes, []

    def __getitem__(self, index):
        self.taken.append(index)
        return super().__getitem__(index)

    def sizes(self, processor, max_length):
        return self.given(processor, max_length) if callable(self.given) else self.given


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(preset("tiny"))


def test_an_epoch_is_planned_without_reading_what_a_source_knows(own, processor):
    rows = SyntheticDataset("val", 12, tasks={"text": 1, "image": 1})[:]
    knowing = Knowing(rows, lambda processor, max_length: measure(rows, processor, max_length))
    source = examples(own(lambda split: knowing), "train", 64)
    loader = BatchLoader(source, processor, 4)
    assert knowing.taken == []
    plain = BatchLoader(rows, processor, 4)
    assert loader.state() == plain.state()
    jax.tree.map(np.testing.assert_array_equal, loader.batch(2), plain.batch(2))
    assert 0 < len(knowing.taken) <= 4
    assert known_sizes(examples(own(lambda split: Knowing(rows, None)), "train", 64), processor, 64).max() == -1


def test_only_the_rows_that_nobody_knows_are_read(processor):
    parts = [some(5), some(6), some(7)]
    sizes = [measure(part, processor, 1024) for part in parts]
    half = np.where(np.arange(6)[:, None] < 3, sizes[1], -1)
    knowing = [Knowing(parts[0], sizes[0].astype(np.int32)), Knowing(parts[1], half), Knowing(parts[2], None)]
    mixture = Mixture([knowing[0], NamedRows(knowing[1], "second"), knowing[2]], [1, 1, 1])
    np.testing.assert_array_equal(measure(mixture, processor, 1024), np.concatenate(sizes))
    assert [part.taken for part in knowing] == [[], [3, 4, 5], list(range(7))]
    assert half.min() == -1, "the source's own array is changed"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([[9, 0, 1]] * 3, r"must give integers \(4, 3\).*found int64 \(3, 3\)"),
        ([[9.0, 0, 1]] * 4, "found float64"),
        ([[9, 0, 1]] * 3 + [[0, 0, 0]], r"gives \[0, 0, 0\] tokens, images and poses for row 3; expected 1 to 64"),
        ([[9, 0, 1]] * 3 + [[9, -1, 0]], "for row 3"),
        ([[65, 0, 0]] + [[9, 0, 1]] * 3, "for row 0; expected 1 to 64 tokens"),
        (failing(KeyError("x")), "KeyError: 'x'"),
    ],
)
def test_sizes_that_are_none_are_refused(own, processor, sizes, words):
    rows = examples(own(lambda split: Knowing(some(), sizes)), "train", 64)
    with pytest.raises(UserError, match=words) as raised:
        BatchLoader(rows, processor, 4, max_length=64)
    assert WHERE in str(raised.value)


def test_sizes_are_a_method(processor):
    class Attribute(list):
        sizes = (3, 4)

    with pytest.raises(UserError, match="the data set Attribute: its attribute 'sizes' must be a method"):
        known_sizes(Attribute(some()), processor, 64)


def test_a_row_of_another_size_than_was_said_is_named(own, processor):
    rows = some(1)
    wrong = np.add(measure(rows, processor, 1024), [[1, 0, 0]])
    loader = BatchLoader(examples(own(lambda split: Knowing(rows, wrong)), "train", 64), processor, 1)
    with pytest.raises(
        UserError, match=rf"^row 0 of {re.escape(WHERE)}, split 'train': the epoch was planned for \[\d+, 0, 1\]"
    ):
        loader.batch(0)


def test_the_json_lines_of_the_docs(tmp_path, monkeypatch, processor):
    """docs/extending.md, with an image in one row."""
    text = (Path(__file__).resolve().parents[2] / "docs/extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (tmp_path / "mydata.py").write_text(next(block for block in blocks if "class Lines" in block))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mydata", raising=False)
    Image.fromarray(np.full((40, 30, 3), 200, np.uint8)).save(tmp_path / "a.jpg")
    row = {"question": "Which pose?", "answer": "It is <POSE>.", "pose": [[3.14159, 0, 0], *[[0, 0, 0]] * 23]}
    lines = [json.dumps(row), json.dumps({**row, "image": "a.jpg"})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    rows = examples(DataConfig(sources=(("mydata:rows", 1.0, {"folder": str(tmp_path)}),)), "train", 64)
    assert [row.kind for row in rows[:]] == ["text", "image"]
    assert measure(rows, processor, 1024)[:, 1:].tolist() == [[0, 1], [1, 1]]
    batch = next(iter(BatchLoader(rows, processor, 2, packing=True)))
    assert batch["pose_mask"].sum() == 2 and batch["pixel_values"].any()
    with pytest.raises(UserError, match=r"'mydata:rows' needs the option 'folder'"):
        check_sources(DataConfig(sources="mydata:rows"))
    (tmp_path / "train.jsonl").write_text(lines[0] + '\n{"question": "Which?"}\n')
    rows = examples(DataConfig(sources=(("mydata:rows", 1.0, {"folder": str(tmp_path)}),)), "train", 64)
    with pytest.raises(
        UserError, match=r"^row 1 of data.sources\[0\] 'mydata:rows', split 'train': KeyError: 'answer'$"
    ):
        rows[1]

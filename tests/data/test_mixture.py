"""Sources by weight: exact shares, fair turns, and an order that is a function of the seed."""

import errno
import itertools
import json
import pickle

import numpy as np
import pytest

from chatpose_jax.data.batches import BatchLoader, measure
from chatpose_jax.data.config import DataConfig, examples
from chatpose_jax.data.mixture import Mixture
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

SIZES = (10, 40, 30)


@pytest.fixture(scope="module")
def mixture():
    return Mixture([[(name, i) for i in range(size)] for name, size in zip("abc", SIZES)], [1, 1, 2])


def test_rows_by_index(mixture):
    assert len(mixture) == 80
    assert [mixture[i] for i in (0, 9, 10, 49, 50, 79)] == [
        ("a", 0),
        ("a", 9),
        ("b", 0),
        ("b", 39),
        ("c", 0),
        ("c", 29),
    ]
    assert mixture[8:12] == [("a", 8), ("a", 9), ("b", 0), ("b", 1)]
    for index in (80, -1):
        with pytest.raises(IndexError):
            mixture[index]


def test_shares_are_exact_and_every_row_has_its_turn(mixture):
    drawn = [mixture[i] for epoch in range(12) for i in mixture.epoch(epoch, seed=3)]
    for name, size, share in zip("abc", SIZES, (20, 20, 40)):
        mine = [row for source, row in drawn if source == name]
        assert len(mine) == 12 * share
        for turn in range(12 * share // size):
            assert sorted(mine[turn * size : (turn + 1) * size]) == list(range(size))


def test_an_epoch_is_a_function_of_its_number_and_the_seed(mixture):
    np.testing.assert_array_equal(mixture.epoch(5, 0), mixture.epoch(5, 0))
    assert not np.array_equal(mixture.epoch(5, 0), mixture.epoch(6, 0))
    assert not np.array_equal(mixture.epoch(5, 0), mixture.epoch(5, 1))


@pytest.mark.parametrize(("sources", "weights"), [([], []), ([[1]], [0]), ([[1], [2]], [1]), ([[1], []], [1, 1])])
def test_a_mixture_of_nothing_is_refused(sources, weights):
    with pytest.raises(UserError, match="mixture"):
        Mixture(sources, weights)


def test_the_papers_mixture_by_default():
    config = DataConfig(source="mixture", train_size=20)
    rows = examples(config, "train", 64)
    kinds = [rows[int(i)].kind for i in rows.epoch(0, 0)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"text": 15, "instruction": 15, "image": 30}
    with pytest.raises(UserError, match="its own sources"):
        examples(DataConfig(source="mixture", sources=(("mixture", 1.0),)), "train", 64)


def test_a_source_of_ones_own_that_is_missing_is_named():
    for source, words in (
        ("no_such_module:rows", "cannot be imported.*PYTHONPATH"),
        ("chatpose_jax.data.mixture:rows", "the module chatpose_jax.data.mixture has no function 'rows'"),
        ("chatpose_jax.data.mixture:__name__", "has no function"),
        (":rows", "expected one of"),
        ("nonsense", "expected one of .*package.module:function"),
    ):
        with pytest.raises(UserError, match=words):
            examples(DataConfig(source=source), "train", 64)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda config: [], r"takes \(config, split, image_size\)"),
        (lambda config, split, size: None, "a sequence of Example, found NoneType"),
        (lambda config, split, size: [{}], "row 0 of data.source=.*: expected an Example, found dict"),
    ],
)
def test_a_source_of_ones_own_that_gives_no_examples_is_named(monkeypatch, source, words):
    monkeypatch.setattr("chatpose_jax.data.mixture.rows", source, raising=False)
    with pytest.raises(UserError, match=words):
        examples(DataConfig(source="chatpose_jax.data.mixture:rows"), "train", 64)


OWN = "chatpose_jax.data.mixture:rows"


def own(monkeypatch, source):
    """The rows of a source of one's own."""
    monkeypatch.setattr("chatpose_jax.data.mixture.rows", source, raising=False)
    return examples(DataConfig(source=OWN), "train", 64)


def failing(error):
    def fail(*_):
        raise error

    return fail


class Lines(list):
    """Lines of JSON, read when a row is taken."""

    def __getitem__(self, index):
        return json.loads(super().__getitem__(index))["example"] or examples(DataConfig(), "train", 64)[index]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"exa', "JSONDecodeError: Unterminated string starting at: line 1 column 2 (char 1)"),
        ("{}", "KeyError: 'example'"),
        ('{"example": 3}', "expected an Example, found int"),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_row_of_ones_own_that_fails_is_named(monkeypatch, line, words, mixed):
    lines = Lines(['{"example": null}'] * 4 + [line])
    rows = own(monkeypatch, lambda *_: lines)
    if mixed:
        rows = examples(
            DataConfig(source="mixture", sources=(("synthetic", 1.0), (OWN, 1.0)), train_size=3), "train", 64
        )
    with pytest.raises(UserError) as raised:
        measure(rows, tiny_processor(preset("tiny")), 1024)
    assert str(raised.value) == f"row 4 of data.source={OWN!r}: {words}"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("/data/x.json"), "FileNotFoundError: /data/x.json"),
        (KeyError("train"), "KeyError: 'train'"),
        (UserError("no rows\nhere"), "no rows\nhere"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_source_of_ones_own_that_fails_is_named(monkeypatch, error, words):
    with pytest.raises(UserError) as raised:
        own(monkeypatch, failing(error))
    assert str(raised.value) == f"data.source={OWN!r} raised for split 'train': {words}"


def test_what_the_system_refused_a_source_stays_an_error_of_the_system(monkeypatch):
    """By its number training knows whether the run can go on."""
    with pytest.raises(FileNotFoundError) as raised:
        own(monkeypatch, failing(FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/x.json")))
    assert raised.value.filename == "/data/x.json"
    assert raised.value.strerror == (
        f"No such file or directory (data.source={OWN!r} raised for split 'train': FileNotFoundError)"
    )


def test_a_module_of_ones_own_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "module_that_fails.py").write_text("rows = nothing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="'module_that_fails:rows' cannot be imported: NameError: name 'nothing'"):
        examples(DataConfig(source="module_that_fails:rows"), "train", 64)


def test_rows_of_ones_own_may_say_themselves_what_an_epoch_holds(monkeypatch):
    mixture = examples(DataConfig(source="mixture", train_size=12), "train", 64)
    rows = pickle.loads(pickle.dumps(own(monkeypatch, lambda *_: mixture)))  # as Grain's processes get them
    processor = tiny_processor(preset("tiny"))
    assert BatchLoader(rows, processor, 4).state() == BatchLoader(mixture, processor, 4).state()
    assert rows.shares == mixture.shares and len(rows[2:5]) == 3
    assert not hasattr(own(monkeypatch, lambda *_: list(mixture[:2])), "epoch")


def test_batches_of_a_mixture_resume(tmp_path):
    processor = tiny_processor(preset("tiny"))
    rows = examples(DataConfig(source="mixture", train_size=12), "train", 64)

    def loader():
        return BatchLoader(rows, processor, 4, buckets=1)

    whole = list(itertools.islice(loader(), 30))
    first = loader()
    list(itertools.islice(first, 17))
    second = loader()
    second.restore(first.state())
    for a, b in zip(whole[17:], second):
        assert all(np.array_equal(a[name], b[name]) for name in a)

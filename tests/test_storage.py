"""Files and folders on a disk and in an object store, and what happens when requests fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorstore as ts
from etils import epath

from chatpose_jax import storage
from chatpose_jax.errors import UserError


@pytest.fixture(params=("disk", "gs", "s3"))
def folder(request: pytest.FixtureRequest, tmp_path: Path, stores: dict, monkeypatch: pytest.MonkeyPatch):
    """An empty folder of each kind."""
    if request.param == "disk":
        return tmp_path / "folder"
    from .conftest import enter_store

    return enter_store(request.param, stores, monkeypatch)


def test_a_path_on_a_disk_stays_one() -> None:
    for text in ("out/model", "/tmp/x", "~/x", "a:b", "C:/x", "odd:/x", Path("x") / "y", epath.Path("x/y")):
        path = storage.location(text)
        assert type(path) is type(Path()) and str(path) == str(text)
        assert not storage.is_bucket(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hdfs://host/x", r"^hdfs://…: not an address .* gs://BUCKET/FOLDER, s3://BUCKET/FOLDER"),
        ("az://x/y", r"^az://…: not an address"),
        ("file:///tmp/x", r"^file:///…: not an address"),
        ("GS://b/x", r"^GS://…: not an address"),
        (Path("gs://b/x"), r"^gs:/…: not an address .* gs://BUCKET"),
        ("gs://", "expected gs://BUCKET/FOLDER"),
        ("gs:///x", r"not an address"),
        ("s3://key:SECRET@b/x", "without user"),
        ("s3://b/x?sig=SECRET", "credentials come from the environment"),
        ("gs://b/x/../y", "without user"),
    ],
)
def test_what_is_no_address_is_refused_and_not_printed(text: str | Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        storage.location(text)
    assert "SECRET" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^gs://b/x: Google Cloud Storage needs the package gcsfs.*\.\[gcs\]"):
        storage.location("gs://b/x")


def test_files_and_folders(folder: storage.Location, tmp_path: Path) -> None:
    storage.write_bytes(folder / "a" / "one.txt", "eins ü")
    storage.write_bytes(folder / "a" / "two", b"\0\1")
    storage.write_bytes(folder / "a" / "b" / "three", b"")
    storage.write_bytes(folder / "ab", b"a neighbour whose name begins alike")
    assert (folder / "a" / "one.txt").read_text(encoding="utf-8") == "eins ü"
    assert storage.tree(folder / "a") == ["b/three", "one.txt", "two"]
    assert (folder / "a").is_dir() and (folder / "a" / "two").is_file() and not (folder / "none").exists()
    storage.write_bytes(folder / "a" / "two", b"newer")
    assert (folder / "a" / "two").read_bytes() == b"newer"

    storage.copy_tree(folder / "a", folder / "copy")
    storage.copy_tree(folder / "a", tmp_path / "local")
    storage.copy_tree(tmp_path / "local", folder / "back")
    for copy in (folder / "copy", tmp_path / "local", folder / "back"):
        assert storage.tree(copy) == ["b/three", "one.txt", "two"]
        assert (copy / "two").read_bytes() == b"newer" and (copy / "b" / "three").read_bytes() == b""

    storage.remove_tree(folder / "a")
    storage.remove_tree(folder / "a")
    assert not (folder / "a").exists() and (folder / "ab").exists()


def test_tensorstore_finds_the_same_folder(folder: storage.Location) -> None:
    storage.write_bytes(folder / "x", b"there")
    assert ts.KvStore.open(storage.kvstore(folder)).result()["x"] == b"there"


@pytest.mark.parametrize("size", [0, 5, (13 << 20) + 1])
def test_a_large_file_is_sent_in_parts(folder: storage.Location, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_PART", 6 << 20)  # S3 takes no parts under 5 MiB
    folder.mkdir(parents=True, exist_ok=True)
    data = os.urandom(size)
    with storage.writing(folder / "x") as file:
        for start in range(0, size, 3_000_000):
            file.write(data[start : start + 3_000_000])
    assert (folder / "x").read_bytes() == data


def test_a_file_that_was_not_completed_does_not_appear(
    bucket: storage.Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PART", 6 << 20)
    storage.write_bytes(bucket / "earlier", b"first")
    for name in ("new", "earlier"):
        for size in (10, 13 << 20):
            with pytest.raises(KeyboardInterrupt), storage.writing(bucket / name) as file:
                file.write(bytes(size))
                raise KeyboardInterrupt
            del file
    assert storage.tree(bucket) == ["earlier"]
    assert (bucket / "earlier").read_bytes() == b"first"


def test_requests_that_fail_are_repeated(bucket: storage.Location, faults: Callable[..., int], tmp_path: Path) -> None:
    faults(3)
    for number in range(6):
        storage.write_bytes(bucket / f"{number}", f"value {number}")
    assert storage.tree(bucket) == [str(number) for number in range(6)]
    assert [(bucket / str(number)).read_text() for number in range(6)] == [f"value {number}" for number in range(6)]
    store = ts.KvStore.open(storage.kvstore(bucket)).result()
    assert [store[str(number)] for number in range(6)] == [f"value {number}".encode() for number in range(6)]
    storage.remove_tree(bucket)
    assert storage.tree(bucket) == []
    assert faults(0) >= 6


def test_parts_that_fail_are_sent_again(
    bucket: storage.Location, faults: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PART", 6 << 20)
    data = os.urandom(20 << 20)
    faults(2, ("503", "reset", "lost"))
    with storage.writing(bucket / "x") as file:
        file.write(data)
    assert faults(0) >= 2
    assert (bucket / "x").read_bytes() == data


@pytest.mark.parametrize("words", [[], ["az"]])
def test_the_emulators_say_how_to_start_them(words: list[str]) -> None:
    from .emulators import main

    with pytest.raises(SystemExit, match=r"python tests/emulators\.py gs COMMAND"):
        main(words)


def test_a_command_runs_beside_an_emulator(bucket: storage.Location, capfd: pytest.CaptureFixture[str]) -> None:
    from .emulators import environment, main

    scheme = str(bucket)[:2]
    name = next(iter(environment(scheme, "")))
    assert main([scheme, "sh", "-c", f"echo ${name}; exit 3"]) == 3
    assert capfd.readouterr().out.startswith("http://127.0.0.1:")

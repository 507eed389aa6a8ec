"""Every command that is given an address ends with one clear error if the store does not answer: a closed port, or a server that stays silent."""

from __future__ import annotations

import importlib.util
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

pytest.importorskip("torch")

from chatpose_jax import storage
from chatpose_jax.chat import DEMO
from chatpose_jax.cli.main import main
from tests.emulators import PACKAGES, environment
from tests.weights.sources import make_llava_transformers

COMMANDS = {
    "train": "train --out STORE/run",
    "train, init": "train --out DISK/run --init STORE/model",
    "train, data": "train --out DISK/run --set data.sources=prepared --set data.sources.prepared.folder=STORE/rows",
    "train, root": "train --out DISK/run --set data.sources=cmu --set data.root=STORE",
    "convert": "convert LLAVA STORE/model --quiet",
    "export": "export MODEL STORE/out --format llava --quiet",
    "export, from": "export STORE/model DISK/out --format llava --quiet",
    "chat": "chat STORE/model --prompt Hi",
    "inspect": "inspect STORE/model",
    "verify": "verify LLAVA STORE/model",
    "probe": "probe STORE/model",
    "eval": "eval poses STORE/model --data synthetic --out DISK/out",
    "eval, root": "eval poses MODEL --data cmu --root STORE --out DISK/out",
    "prepare": "data prepare cmu --source DISK --out STORE/rows --quiet",
    "prepare, model": "data prepare cmu --source DISK --out DISK/rows --model STORE/model --quiet",
    "check": "data check STORE/rows",
    "show": "data show STORE/rows",
}
SECRET = "not-to-be-printed"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources on a disk, by the words that stand for them."""
    llava = tmp_path_factory.mktemp("folders") / "llava"
    make_llava_transformers(llava)
    return {"MODEL": DEMO, "LLAVA": llava}


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that is "closed", or "silent": it takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if request.param == "closed":
            listening.close()
        yield address


@pytest.fixture
def store(server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a folder there. Nothing of it stays with the clients."""
    if importlib.util.find_spec(package := PACKAGES[request.param][0]) is None:
        pytest.skip(f"needs {package}: pip install '.[dev]' in the checkout")
    for name, value in environment(request.param, server).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setitem(fsspec.config.conf, "gs", fsspec.config.conf["gs"] | {"token": "anon"})
    monkeypatch.setattr(storage, "_PATIENCE", 0.4)
    monkeypatch.setattr(storage, "_SILENCE", 0.1)
    monkeypatch.setattr(storage, "_ANSWERED", set())
    kind = fsspec.get_filesystem_class(request.param)
    kind.clear_instance_cache()
    yield f"{request.param}://bucket"
    kind.clear_instance_cache()


def ends(command: str, words: dict[str, object], capsys: pytest.CaptureFixture[str]) -> int:
    """Runs a command, which must say once that it waits and then why it ends. Returns its status."""
    for name, value in words.items():
        command = command.replace(name, str(value))
    began = time.perf_counter()
    with pytest.warns(UserWarning, match="://bucket.*: the store does not answer; waiting up to 0.4 seconds"):
        status = main(command.split())
    assert time.perf_counter() - began < 10
    said = capsys.readouterr()
    (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "://bucket" in error and "no answer from the server that " in error and " within 0.4 seconds" in error
    assert "Traceback" not in said.err and SECRET not in said.out + said.err
    return status


@pytest.mark.parametrize("server", ["silent"], indirect=True)
@pytest.mark.parametrize("store", ["s3"], indirect=True)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_command_says_that_it_waits_and_ends(
    command: str, store: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = ends(command, {**folders, "STORE": store, "DISK": tmp_path}, capsys)
    # A launcher starts a run again, unless its status is that of bad input.
    assert status == (1 if command.startswith("train") else 2)


@pytest.mark.parametrize("server", ["closed", "silent"], indirect=True)
@pytest.mark.parametrize("store", ["gs", "s3"], indirect=True)
def test_closed_and_silent(store: str, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends("inspect STORE/model", {"STORE": store}, capsys) == 2

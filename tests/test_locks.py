"""One writer at a time, and nothing that a crash leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chatpose_jax import locks
from chatpose_jax.errors import UserError
from chatpose_jax.locks import Locked, only_writer
from chatpose_jax.storage import Location, location, tree

HOLDER = """
import sys, time
from pathlib import Path
from chatpose_jax.locks import only_writer
with only_writer("out", Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    lock = tmp_path / "new" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        whose = (
            rf"^out: process {other.pid} on {socket.gethostname()}, since \d{{4}}-.*, is writing it; wait for its end"
        )
        with pytest.raises(UserError, match=whose), only_writer("out", lock):
            pass
        assert lock.is_file()  # the loser leaves it to its holder
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.wait() == 0
    assert not lock.exists()
    with only_writer("out", lock):
        assert f"process {os.getpid()} " in lock.read_text()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), only_writer("out", lock):
            pass


def test_a_killed_holder_leaves_a_file_that_stops_nobody(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert str(other.pid) in lock.read_text()
    with only_writer("out", lock):
        assert str(other.pid) not in lock.read_text()
    assert not lock.exists()


def test_never_two_inside(tmp_path: Path) -> None:
    """Many threads over the moment in which a holder removes the file and others have it open."""
    lock, inside, most = tmp_path / ".lock", [0], [0]

    def work() -> None:
        entered = 0
        while entered < 50:  # however often another one was first
            try:
                with only_writer("out", lock):
                    inside[0] += 1
                    entered += 1
                    time.sleep(0.05)
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except UserError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_what_the_block_raises_goes_out_and_the_lock_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), only_writer("out", tmp_path / ".lock"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_where_no_file_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^out: cannot be written"), only_writer("out", tmp_path / "file" / ".lock"):
        pass


def test_a_link_in_a_strangers_folder_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"^out: cannot be written"), only_writer("out", tmp_path / ".lock"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", without)
    with pytest.warns(UserWarning, match="no locks"), only_writer("out", tmp_path / ".lock"):
        pass


BUCKET_HOLDER = """
import sys
from chatpose_jax import locks, storage
locks._REFRESH = 0.2
with locks.only_writer("out", storage.location(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def another_holder(lock: Location) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", BUCKET_HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        yield other


def test_in_a_bucket_the_second_writer_is_told_who_the_first_is(bucket: Location) -> None:
    lock = bucket / ".lock"
    with another_holder(lock) as other:
        whose = (
            rf"^out: process {other.pid} on {socket.gethostname()}, since \d{{4}}-.*, is writing it; wait for its end"
        )
        with pytest.raises(Locked, match=whose), only_writer("out", lock):
            pass
        assert lock.exists()
        other.communicate("\n")
    assert not lock.exists()
    with only_writer("out", lock) as held:
        held.check()
        with pytest.raises(Locked, match=f"process {os.getpid()} on"), only_writer("out", lock):
            pass
    with pytest.raises(KeyboardInterrupt), only_writer("out", lock):
        raise KeyboardInterrupt
    assert tree(bucket) == []


def test_in_a_bucket_a_killed_holder_on_this_machine_stops_nobody(bucket: Location) -> None:
    with another_holder(bucket / ".lock") as other:
        other.kill()
        other.wait()
        assert (bucket / ".lock").exists()
        started = time.monotonic()
        with only_writer("out", bucket / ".lock"):
            assert time.monotonic() - started < locks._ABANDONED / 2
    assert tree(bucket) == []


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process seems to be on another machine than those that it starts, and nobody waits long."""
    monkeypatch.setattr(locks, "_machine", lambda: "another machine")
    monkeypatch.setattr(locks, "_ABANDONED", 2.0)
    monkeypatch.setattr(locks, "_REFRESH", 0.2)


@pytest.mark.usefixtures("elsewhere")
def test_in_a_bucket_a_holder_on_another_machine_is_watched(bucket: Location) -> None:
    with another_holder(bucket / ".lock") as other:
        waiting = pytest.warns(UserWarning, match=f"^out: waiting up to 2 seconds to see whether process {other.pid} ")
        with waiting, pytest.raises(Locked, match=f"process {other.pid} on"), only_writer("out", bucket / ".lock"):
            pass
        other.kill()
        other.wait()
        with pytest.warns(UserWarning, match="waiting"), only_writer("out", bucket / ".lock"):
            pass
    assert tree(bucket) == []


@pytest.mark.usefixtures("elsewhere")
def test_in_a_bucket_a_holder_that_was_stopped_learns_who_took_over(
    bucket: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_REFRESH", 1e9)  # the first holder does nothing for long
    lock = bucket / ".lock"
    with only_writer("out", lock) as held:
        monkeypatch.setattr(locks, "_REFRESH", 0.2)
        monkeypatch.setattr(locks, "_machine", lambda: "a third machine")
        with pytest.warns(UserWarning, match="waiting"), only_writer("out", lock) as second:
            with pytest.raises(Locked, match=f"^out: process {os.getpid()} on .* has begun to write it, because this"):
                held.check()
            second.check()
        assert not lock.exists()
    assert tree(bucket) == []


class Away:
    """A store that does not answer."""

    def write(self, *_: object, **__: object) -> None:
        raise ValueError("ABORTED: All 32 retry attempts failed")


class Slow:
    """A store whose first answer comes after the time in which the lock counts as held."""

    def __init__(self, store: Any):
        self.store, self.writes = store, 0

    def write(self, *words: Any, **options: Any) -> Any:
        self.writes += 1
        time.sleep(0.3 if self.writes == 1 else 0)
        return self.store.write(*words, **options)


def test_in_a_bucket_a_holder_that_cannot_reach_its_lock_writes_no_more(
    bucket: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    with only_writer("out", bucket / ".lock") as held:
        assert isinstance(held, locks._Lease)
        held.written -= 2 * locks._ABANDONED
        monkeypatch.setattr(locks, "_ABANDONED", 0.2)
        slow = Slow(held.store)
        with monkeypatch.context() as patch:
            patch.setattr(held, "store", slow)
            held.check()
        assert slow.writes == 2
        monkeypatch.setattr(locks, "_ABANDONED", 45.0)
        held.written -= 90
        with monkeypatch.context() as patch:
            patch.setattr(held, "store", Away())
            with pytest.raises(
                Locked, match=r"^out: this process has not reached its lock, \w+://.*/\.lock, for 9\d seconds"
            ):
                held.check()
        held.check()  # it is there again, and nobody has taken the lock
    assert tree(bucket) == []


def test_in_a_bucket_never_two_inside_though_requests_fail(bucket: Location, faults: Callable[..., int]) -> None:
    lock, inside, most = bucket / ".lock", [0], [0]
    faults(9, ("503", "lost", "reset"))

    def work() -> None:
        entered = 0
        while entered < 3:
            try:
                with only_writer("out", lock):
                    inside[0] += 1
                    entered += 1
                    time.sleep(0.05)
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except Locked:
                pass

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert faults(0) >= 2


def test_a_bucket_that_is_not_there(bucket: Location) -> None:
    lock = location(str(bucket.parent) + "-which-is-not-there/x/.lock")
    with (
        pytest.raises(UserError, match=r"^out: cannot be written \(.*is there such a bucket\?\)$"),
        only_writer("out", lock),
    ):
        pass

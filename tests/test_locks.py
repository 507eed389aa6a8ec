"""One writer at a time, and nothing that a crash leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.locks import only_writer

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

"""Work shared by processes: they end with the one that started them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatpose_jax.data.pool import share
from chatpose_jax.errors import UserError

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_counts(workers):
    from pool_work import Square

    counts = []
    assert sorted(share(Square(), [1, 2, 3], workers, counts.append)) == [1, 4, 9]
    assert counts and counts[-1] <= 6


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_work_ends_it(workers):
    from pool_work import Square

    with (
        pytest.raises(UserError, match="no number"),
        contextlib.closing(share(Square(), [1, "x", 60, 60], workers)) as found,
    ):
        list(found)


def test_a_worker_that_is_killed_is_an_error():
    from pool_work import Square

    with pytest.raises(UserError, match="ended from outside"):
        list(share(Square(), [1, "kill", 3], 2))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_starter(tmp_path, number):
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, HERE / "pool_work.py", tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        # A job in the background inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(workers := [int(file.name) for file in tmp_path.iterdir()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process):
    """Whether a process runs; one that has ended, and that nobody has waited for, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

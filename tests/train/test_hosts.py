"""How a process learns of the others: flags, then variables, then the cluster."""

import errno
import hashlib
import os
import signal
import threading
import time

import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.train.hosts import Fault, Hosts, Stop, find_processes, restartable

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "run-0.run:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (EXPLICIT, Hosts("run-0.run:1234", 4, 3)),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, Hosts()),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, Hosts()),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, Hosts()),
    ],
)
def test_the_environment_says(environment, expected, tmp_path):
    assert find_processes(environ=environment, dev=tmp_path) == expected


def test_flags_win(tmp_path):
    assert find_processes("localhost:99", 2, 0, environ=EXPLICIT, dev=tmp_path) == Hosts("localhost:99", 2, 0)


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        (("localhost:99", None, None), {}, "--coordinator without --num-processes and --process-id"),
        ((None, 2, 0), {}, "--num-processes, --process-id without --coordinator"),
        (("localhost:99", 2, 2), {}, "--process-id must be at least 0 and less than --num-processes, found 2 of 2"),
        (("localhost", 2, 1), {}, "--coordinator: expected HOST:PORT, found 'localhost'"),
        ((None, None, None), {**EXPLICIT, "JAX_PROCESS_ID": ""}, "without JAX_PROCESS_ID"),
        ((None, None, None), {**EXPLICIT, "JAX_NUM_PROCESSES": "many"}, "must be numbers, found 'many', '3'"),
    ],
)
def test_half_an_answer_is_an_error(flags, environment, words, tmp_path):
    with pytest.raises(UserError, match=words):
        find_processes(*flags, environ=environment, dev=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_second_ends(number):
    before = signal.getsignal(number)
    with Stop().listen() as stop:
        assert not stop.after(1)
        signal.raise_signal(number)
        assert stop.after(2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once_though_the_program_is_deep_in_c(capfd, number):
    """As in a compilation, which nothing interrupts: Python's handlers wait for its end."""
    stop, heard = Stop(), []
    said = stop._said
    stop._said = lambda: heard.append(time.monotonic()) or said()
    with stop.listen():
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
        ended = time.monotonic()
        assert stop.after(1)
    assert len(heard) == 1 and heard[0] < ended - 0.2
    assert "\nstopping after the step under way, then saving" in capfd.readouterr().err
    assert signal.set_wakeup_fd(-1) == -1


def test_the_second_signal_is_answered_too(capfd):
    with Stop().listen():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    told = capfd.readouterr().err.split("\n\n")
    assert [line.split()[0] for line in told] == ["stopping", "ending"]


def failing(error, cause=None):
    raise error from cause


STALE, MISSING = OSError(errno.ESTALE, "Stale file handle", "rows.npz"), FileNotFoundError(errno.ENOENT, "No such file")
AWAY = ValueError("ABORTED: All 32 retry attempts failed: CURL error [tensorstore_spec='{...}']")


def botocore(name):
    """An exception of S3's client, which is none of Python's."""
    return type(name, (Exception,), {"__module__": "botocore.exceptions"})("no answer")


WORDS = ValueError("FAILED_PRECONDITION: Failed to write [os_error_code='28']")


@pytest.mark.parametrize(
    ("error", "cause", "starting", "words"),
    [
        (STALE, None, True, r"rows\.npz: Stale file handle; .* checkpoint in out"),
        (UserError("cannot be read"), STALE, True, "Stale file handle"),
        (UserError("no readable checkpoint"), WORDS, False, "No space left on device"),
        (WORDS, None, False, "No space left on device"),
        (MISSING, None, False, "No such file"),
        (MISSING, None, True, None),
        (UserError("no such folder"), MISSING, False, None),
        (AWAY, None, True, "retry attempts failed: CURL"),
        (UserError("cannot be read"), AWAY, False, "retry attempts failed: CURL"),
        (botocore("EndpointConnectionError"), None, True, "no answer"),
        (botocore("NoCredentialsError"), None, False, "no answer"),
        (UserError("no such model"), botocore("NoCredentialsError"), False, None),
        (OSError("no tokenizer"), None, True, None),
        (OSError("cannot identify image file"), None, False, None),
        (UserError("bad setting"), None, False, None),
    ],
)  # fmt: skip
def test_faults_of_a_disk_are_no_bad_input(error, cause, starting, words):
    with pytest.raises(Fault if words else type(error), match=words) as raised, restartable("out", starting=starting):
        failing(error, cause)
    assert isinstance(raised.value, Fault) == bool(words)


def test_missing_credentials_at_the_start_are_bad_input_in_one_line():
    with pytest.raises(UserError, match=r"^out: no answer$"), restartable("out", starting=True):
        raise botocore("NoCredentialsError")

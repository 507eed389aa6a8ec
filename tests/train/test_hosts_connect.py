"""What a process that cannot join the others tells; in child processes, for JAX keeps what it was told and may abort."""

import socket
import subprocess
import sys

import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.train.hosts import Hosts, connect

CHILD = """
import functools, sys, jax
from chatpose_jax.errors import UserError
from chatpose_jax.train.hosts import Hosts, connect
jax.distributed.initialize = functools.partial(jax.distributed.initialize, initialization_timeout=1)
try:
    connect(Hosts(sys.argv[1], 2, int(sys.argv[2])))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def join(port, index):
    command = [sys.executable, "-c", CHILD, f"localhost:{port}", str(index)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def listen():
    return socket.create_server(("", 0))


def test_a_port_in_use_is_one_line():
    with listen() as taken:
        port = taken.getsockname()[1]
        child = join(port, 0)
        _, told = child.communicate(timeout=60)
    assert child.returncode == 1
    assert (
        told.splitlines(keepends=True)[-1]
        == f"error: process 0 cannot listen on port {port}, as localhost:{port} says: Address already in use\n"
    )


def test_a_port_that_cannot_be_is_one_line():
    with pytest.raises(UserError, match=r"cannot listen on port 70000, .* 0-65535"):
        connect(Hosts("localhost:70000", 2, 0))


@pytest.mark.slow
def test_waiting_in_vain_is_an_abort():
    """As the docs say; the day it raises, they can promise one line."""
    ports = []
    for _ in range(2):
        with listen() as free:
            ports.append(free.getsockname()[1])
    for child in [join(port, index) for index, port in enumerate(ports)]:
        _, told = child.communicate(timeout=60)
        assert child.returncode == -6
        assert "DEADLINE_EXCEEDED" in told and "RegisterTask" in told

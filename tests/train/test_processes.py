"""Several processes on this machine (gloo): the losses of one process, stopping together, and what is left when one is killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chatpose_jax.train.hosts import LOST, STOPPED
from tests.numerics import TRAINED

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def running(out, steps, *, count, data=1, tensor=1, slices=1, pause=0.0, devices=1, cache=None):
    """Processes of ``worker``, which do not outlive the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    words = [sys.executable, "-m", "tests.train.worker", out, steps, data, tensor, slices, pause, address, count]
    processes = [
        subprocess.Popen(
            [*map(str, words), str(rank)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finished(processes, status=0):
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(said)
    return said


def lines(out):
    path = out / "metrics.jsonl"
    found = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    return [json.loads(line) for line in found]


def losses(out):
    return [line["loss"] for line in lines(out)]


def until_step(out, step, processes):
    while len(lines(out)) < step:
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """Twelve losses of one process with one device."""
    out = tmp_path_factory.mktemp("alone")
    with running(out, 12, count=1, cache=cache) as processes:
        finished(processes)
    return losses(out)


@pytest.mark.parametrize(
    ("count", "devices", "sizes"),
    [(2, 1, {"data": 2}), (4, 1, {"data": 2, "tensor": 2}), (2, 2, {"data": 4}), (2, 2, {"data": 2, "slices": 2})],
)
def test_losses_are_those_of_one_process(tmp_path, alone, cache, count, devices, sizes):
    with running(tmp_path, 12, count=count, devices=devices, cache=cache, **sizes) as processes:
        said = finished(processes)
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=TRAINED)
    assert "parameters train" in said[0]
    assert all("parameters train" not in words for words in said[1:]), "only process 0 speaks"


def test_a_signal_to_one_stops_all_after_the_same_step_and_others_go_on(tmp_path, alone, cache):
    with running(tmp_path, 12, count=2, data=2, pause=0.5, cache=cache) as processes:
        until_step(tmp_path, 2, processes)
        processes[1].send_signal(signal.SIGTERM)
        said = finished(processes, STOPPED)
    step = len(losses(tmp_path))
    assert all(f"stopped at step {step};" in words for words in said)
    assert step < 12, "it took many steps to notice"
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    with running(tmp_path, 12, count=1, cache=cache) as processes:
        assert f"resuming from step {step}" in finished(processes)[0]
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=TRAINED)


@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_stop_with_a_clear_error_and_the_restart_resumes(tmp_path, alone, cache, victim):
    with running(tmp_path, 12, count=2, data=2, pause=0.3, cache=cache) as processes:
        until_step(tmp_path, 6, processes)
        processes[victim].send_signal(signal.SIGKILL)
        survivor = processes[1 - victim]
        said = survivor.communicate(timeout=30)[0]
    assert survivor.returncode == LOST or survivor.returncode < 0
    assert "lost another one" in said or "distributed service" in said
    with running(tmp_path, 12, count=2, data=2, cache=cache) as processes:
        assert "resuming from step 4" in finished(processes)[0]
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=TRAINED)


def test_a_lost_slice_ends_all_and_the_run_goes_on_with_the_other(tmp_path, alone, cache):
    """Two slices of two processes. After the loss of one, the same rows train on the other."""
    with running(tmp_path, 12, count=4, data=2, slices=2, pause=0.3, cache=cache) as processes:
        until_step(tmp_path, 6, processes)
        for process in processes[2:]:
            process.send_signal(signal.SIGKILL)
        said = [process.communicate(timeout=60)[0] for process in processes[:2]]
        statuses = [process.returncode for process in processes[:2]]
    assert all(status == LOST or status < 0 for status in statuses), said
    with running(tmp_path, 12, count=2, data=2, cache=cache) as processes:
        assert "resuming from step 4" in finished(processes)[0]
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=TRAINED)

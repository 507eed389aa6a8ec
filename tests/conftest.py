"""Settings that every test shares; they must stand before JAX is first imported."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile hundreds of small programs and run each a few times: less optimised ones take half of the time in all. `.ci/run` runs the
# models' tests a second time as users run them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Eight devices on any machine, so that sharding is tested everywhere; a caller's own flags win.
FLAGS = ["--xla_force_host_platform_device_count=8"]
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0" and version("jaxlib").startswith("0.10."):
    # XLA's older emitters compile in half of the time. An XLA that lacks a flag ends the process, so these are for where they were tried.
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# Programs that took long to compile are shared by the workers of this run, and by the processes that tests start; none are kept.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.mkdtemp(prefix="chatpose-tests-")
    # Only the process that starts the workers comes here, and it outlives them.
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from .stand_in import Server, running  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Each test starts from the same global seeds, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party peers draw from the global generator


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Material beside the checkout that is not ours to ship; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data beside the checkout")
    return folder


@pytest.fixture
def server() -> Iterator[Server]:
    """A stand-in for the server of a language model."""
    with running() as server:
        yield server

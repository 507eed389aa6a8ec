"""Settings that every test shares; they must stand before JAX is first imported."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
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

import fsspec  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from chatpose_jax import storage  # noqa: E402

from .emulators import BUCKET, KINDS, PACKAGES, Emulator, running_store  # noqa: E402
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


@pytest.fixture(scope="session")
def stores() -> Iterator[dict[str, Emulator]]:
    """The emulators that the session has started, by scheme."""
    with contextlib.ExitStack() as held:
        yield Started(held)


class Started(dict[str, Emulator]):
    def __init__(self, held: contextlib.ExitStack):
        super().__init__()
        self.held = held

    def __missing__(self, scheme: str) -> Emulator:
        self[scheme] = self.held.enter_context(running_store(scheme))
        return self[scheme]


@pytest.fixture(params=("gs", "s3"))
def bucket(
    request: pytest.FixtureRequest, stores: dict[str, Emulator], monkeypatch: pytest.MonkeyPatch
) -> storage.Location:
    """An empty folder in an object store. Processes that a test starts reach it too."""
    return enter_store(request.param, stores, monkeypatch)


def enter_store(scheme: str, stores: dict[str, Emulator], monkeypatch: pytest.MonkeyPatch) -> storage.Location:
    """What ``bucket`` does for one scheme."""
    if missing := [name for name in PACKAGES[scheme] if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{scheme}:// needs {' and '.join(missing)}: pip install '.[dev]' in the checkout")
    for name, value in stores[scheme].environment.items():
        monkeypatch.setenv(name, value)
    # fsspec reads its variables when it is imported.
    monkeypatch.setitem(fsspec.config.conf, "gs", fsspec.config.conf["gs"] | {"token": "anon"})
    return storage.location(f"{scheme}://{BUCKET}/{uuid.uuid4().hex[:8]}")


@pytest.fixture
def faults(bucket: storage.Location, stores: dict[str, Emulator]) -> Iterator[Callable[..., int]]:
    """``faults(every=7, kinds=("503", "reset"))``: every n-th request to ``bucket`` fails from now on; ``faults(0)``: none. ``emulators.KINDS``."""
    emulator = stores[str(bucket)[:2]]
    emulator.fail(0)

    def fail(every: int, kinds: Sequence[str] = KINDS) -> int:
        """Returns how many requests have failed since the last call."""
        emulator.fail(every, kinds)
        return emulator.failed

    yield fail
    emulator.fail(0)

"""Settings that every test shares; they must stand before JAX is first imported."""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on any machine, so that sharding is tested everywhere; a caller's own flags win.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# The tests compile hundreds of small programs and run each a few times: less optimised ones take half of the time in all. `.ci/run` runs the
# models' tests a second time as users run them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Commands keep compiled programs in the home folder of whoever starts them; tests keep none there.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import numpy as np
import pytest

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

"""Speed of a run: step times, time spent waiting for data, tokens per second, memory, and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
import numpy as np


class Meter:
    """Measures the steps between two reports. Rows and tokens are those of the global batch.

    Steps run asynchronously. ``done`` is called when the result of a step has arrived; the time between two calls is the time of one step.
    The first call after ``restart`` starts the clock.
    """

    def __init__(self, peak: float | None = None) -> None:
        """peak: peak operations per second of a device, or None if unknown."""
        self._peak = peak
        self.restart()

    def restart(self) -> None:
        """Restarts the clock after saving or validation, whose time does not belong to a step."""
        self._since: float | None = None
        self._start = time.perf_counter()
        self._times: list[float] = []
        self._wait = 0.0
        self._rows = self._tokens = 0
        self._flops: dict[str, float] = {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the block as time spent waiting for a batch."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def done(self, rows: int, tokens: int, flops: Mapping[str, float]) -> None:
        """Counts a finished step. flops: operations of the global batch, one number for each way of counting."""
        now = time.perf_counter()
        if self._since is not None:
            self._times.append(now - self._since)
        self._since = now
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        for name, value in flops.items():
            self._flops[name] = self._flops.get(name, 0.0) + value

    def report(self) -> dict[str, float]:
        """Scalars since the last report: ``samples_per_second``, ``tokens_per_second`` (without padding), ``step_p50``, ``step_p90`` and
        ``data_wait`` (per step) in seconds. If the device reports memory, also ``device_gib`` and ``device_peak_gib`` of the first device. If
        the peak is known, also the share of it for each way of counting operations.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        times = self._times or [seconds]
        scalars = {
            "samples_per_second": self._rows / seconds,
            "tokens_per_second": self._tokens / seconds,
            "step_p50": float(np.percentile(times, 50)),
            "step_p90": float(np.percentile(times, 90)),
            "data_wait": self._wait / len(times),
        }
        memory = jax.local_devices()[0].memory_stats() or {}
        for name, key in (("device_gib", "bytes_in_use"), ("device_peak_gib", "peak_bytes_in_use")):
            if key in memory:
                scalars[name] = memory[key] / 2**30
        if self._peak is not None:
            promised = self._peak * jax.device_count() * seconds
            scalars |= {name: value / promised for name, value in self._flops.items()}
        since = self._since
        self.restart()
        self._since = since
        return scalars

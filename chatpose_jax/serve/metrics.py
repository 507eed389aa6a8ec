"""What ``/metrics`` shows, in Prometheus' text format."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from chatpose_jax.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()

        def count(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"chatpose_{name}", about, labels, registry=self.registry)

        def times(name: str, about: str) -> Histogram:
            return Histogram(f"chatpose_{name}_seconds", about, buckets=SECONDS, registry=self.registry)

        self.requests = count("requests", "requests that were answered, by route and status", "route", "status")
        self.errors = count("errors", "errors, by the code of the error object", "code")
        self.tokens = count("generated_tokens", "tokens that were written")
        self.prompt_tokens = count("prompt_tokens", "tokens of prompts: computed, or cached from other turns", "source")
        for source in ("computed", "cached"):
            self.prompt_tokens.labels(source)
        self.poses = count("poses", "poses in answers")
        self.first_token = times("first_token", "from an accepted request to its first token")
        self.answer = times("answer", "from an accepted request to the end of its answer")
        self.steps = times("step", "one step of the engine")
        self.gauge("compiled_programs", "programs that were compiled since the start", lambda: compiled_programs()[0])

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A value that is read whenever somebody looks."""
        Gauge(f"chatpose_{name}", about, registry=self.registry).set_function(value)

    def watch(self, engine: Engine) -> None:
        """The state of an engine, whenever somebody looks."""
        self.gauge("waiting_requests", "answers that wait for a row of the cache", lambda: engine.waiting)
        self.gauge("active_requests", "answers that have a row of the cache", lambda: engine.active)
        self.gauge("slots", "rows of the cache", lambda: engine.slots)
        self.gauge("cache_use", "share of the cache's places that hold tokens", lambda: engine.use)

    def text(self) -> bytes:
        return generate_latest(self.registry)


@functools.cache
def compiled_programs() -> list[int]:
    """One number, which grows with each program that this process compiles or takes from the cache of compiled programs, from the first call on."""
    count = [0]

    def hear(event: str, duration_secs: float, **_: str | int) -> None:
        count[0] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(hear)
    return count

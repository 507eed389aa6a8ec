"""What ``/metrics`` shows, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from chatpose_jax.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "chatpose_requests", "requests by route and status", ("route", "status"), registry=self.registry
        )
        self.errors = Counter("chatpose_errors", "errors by code", ("code",), registry=self.registry)
        self.tokens = Counter("chatpose_generated_tokens", "tokens that were written", registry=self.registry)
        self.prompt_tokens = Counter("chatpose_prompt_tokens", "tokens of prompts", ("source",), registry=self.registry)
        self.poses = Counter("chatpose_poses", "poses in answers", registry=self.registry)
        self.waiting = Gauge("chatpose_waiting_requests", "requests that have no row yet", registry=self.registry)
        self.active = Gauge("chatpose_active_requests", "requests that have a row", registry=self.registry)
        self.cache = Gauge("chatpose_cache_use", "share of the cache's slots that hold tokens", registry=self.registry)
        self.first_token = Histogram(
            "chatpose_first_token_seconds", "from a request to its first token", buckets=SECONDS, registry=self.registry
        )
        self.whole = Histogram(
            "chatpose_answer_seconds",
            "from a request to the end of its answer",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.steps = Histogram(
            "chatpose_step_seconds", "one step of the engine", buckets=SECONDS, registry=self.registry
        )

    def step(self, engine: Engine, seconds: float) -> None:
        self.waiting.set(engine.waiting)
        self.active.set(engine.active)
        self.cache.set(engine.use)
        self.steps.observe(seconds)

    def first(self, seconds: float) -> None:
        self.first_token.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)

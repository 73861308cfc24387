"""What `/metrics` tells Prometheus. Names follow its conventions: base units, `_total` for counters."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The numbers of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter("minigpt_http_responses", "HTTP responses", ["path", "status"], registry=self.registry)
        self.prompt_tokens = Counter("minigpt_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.new_tokens = Counter("minigpt_generated_tokens", "Tokens generated", registry=self.registry)
        self.sequences = Counter("minigpt_sequences", "Sequences that ended", ["finish_reason"], registry=self.registry)
        self.first_token = Histogram(
            "minigpt_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "minigpt_request_seconds", "From the request to its last token", buckets=SECONDS, registry=self.registry
        )

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A number that is read when somebody asks."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

"""Counts for Prometheus, in a registry of their own: nothing about a request but sizes and times."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

__all__ = ["CONTENT_TYPE", "Metrics"]


class Metrics:
    """Threads add to these as they like."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("dare_requests", "answers sent", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "dare_request_seconds", "from the first byte of a request to the last of its answer", ["path"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("dare_prompt_tokens", "tokens of prompts", registry=self.registry)
        self.completion_tokens = Counter("dare_completion_tokens", "tokens generated", registry=self.registry)
        self.steps = Counter("dare_denoising_steps", "forwards over all seated rows", registry=self.registry)
        self.row_steps = Counter("dare_row_steps", "rows times denoising steps", registry=self.registry)
        self.likelihoods = Counter("dare_likelihoods", "continuations scored", registry=self.registry)
        self.given_up = Counter(
            "dare_given_up_rows", "rows ended early: their client left, time was up, or a stop string was there",
            registry=self.registry,
        )  # fmt: skip
        self.seated = Gauge("dare_rows_seated", "rows denoised now", registry=self.registry)
        self.waiting = Gauge("dare_rows_waiting", "rows that wait for a seat", registry=self.registry)

    def text(self) -> bytes:
        """All counts in Prometheus' text format."""
        return generate_latest(self.registry)

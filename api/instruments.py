"""What this process counts of requests and answers; `api.metrics` tells it."""

import os
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

PREFIX = "residency_"
_SHARED_DIR = "PROMETHEUS_MULTIPROC_DIR"  # set by `api.server`, read by the library as it is imported
_REQUESTS = Counter(f"{PREFIX}requests", "Requests that were answered.", ["method", "route", "status"])
_SECONDS = Histogram(
    f"{PREFIX}request_seconds",
    "From the first byte of a request to the last of its answer.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
_TOKENS = Counter(f"{PREFIX}chat_tokens", "Tokens of answers that told their usage.", ["model", "kind"])


def count_request(*, method: str, route: str | None, status: int | None, took_s: float) -> None:
    """A request was answered; by no route it was somebody's guess, and without a status cut off."""
    name = route or "none"
    _REQUESTS.labels(method, name, str(status or 0)).inc()
    _SECONDS.labels(name).observe(took_s)


def count_tokens(model: str, usage: dict[str, Any] | None) -> None:
    """What an engine told of one answer."""
    for kind in ("prompt", "completion"):
        number = (usage or {}).get(f"{kind}_tokens")
        if isinstance(number, int):
            _TOKENS.labels(model, kind).inc(number)


def requests_of_all() -> CollectorRegistry:
    """The counts of all processes that share a folder of counts, of this one where there is none."""
    if _SHARED_DIR not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return registry

"""The Prometheus metrics of API keys, by their names: what each has used, and what it was refused.

What lives here: names and labels. What does not: the limits (api/rate_limits.py, which calls these methods on the event
loop's thread). There are as many series as the operator has named keys.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter


class KeyMetrics:
    """What keys have used. key: its name."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        self._requests = Counter(
            "afd:key_requests", "Requests of an API key.", ["model_name", "key"], registry=registry
        )
        self._tokens = Counter(
            "afd:key_tokens", "Tokens of an API key's requests, by kind: prompt, generation.",
            ["model_name", "key", "kind"], registry=registry,
        )  # fmt: skip
        self._refused = Counter(
            "afd:key_refused", "Requests refused at an API key's limit, by which: requests, tokens.",
            ["model_name", "key", "limit"], registry=registry,
        )  # fmt: skip

    def observe_request(self, key: str) -> None:
        self._requests.labels(self._model_name, key).inc()

    def observe_tokens(self, key: str, kind: str, num_tokens: int) -> None:
        self._tokens.labels(self._model_name, key, kind).inc(num_tokens)

    def observe_refusal(self, key: str, limit: str) -> None:
        self._refused.labels(self._model_name, key, limit).inc()

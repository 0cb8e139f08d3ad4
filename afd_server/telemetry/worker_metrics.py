"""The Prometheus metrics of the workers as processes: up or down, restarts and why, how long they took, what is missing.

What lives here: names, labels, buckets. What does not: when something happened (cluster/supervisor.py, which calls these
methods on the event loop's thread), and what the workers do while they are up (metrics.py).
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

RECOVERY_BUCKETS_S = (0.5, 1, 2, 4, 6, 8, 10, 15, 20, 30, 60, 120, 300, 600)
REASONS = ("died", "frozen", "hung", "failed", "planned")


class WorkerMetrics:
    """on_down: called with the name of a worker that serves no more."""

    def __init__(self, registry: CollectorRegistry, model_name: str, on_down: Callable[[str], None]) -> None:
        self._model_name = model_name
        self._on_down = on_down
        self._missing: dict[str, str] = {}
        self._roles: dict[str, str] = {}
        self._up = Gauge(
            "afd:worker_up",
            "Whether a worker serves, 1 or 0.",
            ["model_name", "worker", "role"],
            registry=registry,
        )
        self._restarts = Counter(
            "afd:worker_restarts", "Restarts begun, by why: " + ", ".join(REASONS) + ".",
            ["model_name", "worker", "reason"], registry=registry,
        )  # fmt: skip
        self._recovery = Histogram(
            "afd:worker_recovery_seconds", "From a worker's failure to its serving again.",
            ["model_name", "role"], registry=registry, buckets=RECOVERY_BUCKETS_S,
        )  # fmt: skip
        self._unplaced = Gauge(
            "afd:workers_unplaced", "Workers that the cluster has no place for, with what is missing: 1 while it is so.",
            ["model_name", "worker", "missing"], registry=registry,
        )  # fmt: skip

    def up(self, worker: str, role: str) -> None:
        """It serves."""
        self._roles[worker] = role
        self._up.labels(self._model_name, worker, role).set(1)
        for reason in REASONS:
            self._restarts.labels(self._model_name, worker, reason)

    def down(self, worker: str, role: str) -> None:
        """It serves no more."""
        self._up.labels(self._model_name, worker, role).set(0)
        self._on_down(worker)

    def restarted(self, worker: str, reason: str) -> None:
        """An attempt to bring it back begins."""
        self._restarts.labels(self._model_name, worker, reason).inc()

    def recovered(self, worker: str, role: str, after_s: float) -> None:
        """It serves again."""
        self._up.labels(self._model_name, worker, role).set(1)
        self._recovery.labels(self._model_name, role).observe(after_s)

    def unplaced(self, worker: str, missing: str) -> None:
        """What the cluster lacks for it now; empty when it has been placed."""
        before = self._missing.pop(worker, "")
        if before:
            self._unplaced.remove(self._model_name, worker, before)
        if missing:
            self._missing[worker] = missing
            self._unplaced.labels(self._model_name, worker, missing).set(1)

    def forget(self, worker: str) -> None:
        """It has left for good."""
        self.unplaced(worker, "")
        if worker in self._roles:
            self._up.remove(self._model_name, worker, self._roles.pop(worker))
        self._on_down(worker)

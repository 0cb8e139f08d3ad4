"""The Prometheus metrics of what workers compute: how much, how long, and how they compare with one another.

What lives here: names, labels, and turning sums that grow into counters. What does not: the comparison (stragglers.py), and when it is
made (straggler_watch.py). Labels are workers, roles and layers: never an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge

from afd_server.telemetry.stragglers import StragglerReport, done_since, most_loaded
from afd_server.types import WorkerTotals


class StragglerMetrics:
    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        self._last: dict[str, WorkerTotals] = {}
        of_worker, of_layer = ["model_name", "worker", "role"], ["model_name", "role", "layer"]
        self._seconds = Counter(
            "afd:worker_computing_seconds",
            "Seconds that a worker has computed layers.",
            of_worker,
            registry=registry,
        )
        self._batches = Counter(
            "afd:worker_batches", "Batches of it, one layer each.", of_worker, registry=registry
        )
        self._rows = Counter("afd:worker_rows", "Rows of these batches.", of_worker, registry=registry)
        self._slowness = Gauge(
            "afd:worker_slowness",
            "A worker's time over what the median of its peers would have needed for its work, in the last minute.",
            of_worker,
            registry=registry,
        )
        self._layer_time = Gauge(
            "afd:layer_seconds", "Mean of a batch in the last minute, by layer.", of_layer, registry=registry
        )
        self._expert_load = Gauge(
            "afd:expert_load_max",
            "Load of a layer's most chosen expert over the mean of the layer, in the last minute.",
            ["model_name", "layer"],
            registry=registry,
        )

    def observe(self, totals: Sequence[WorkerTotals], report: StragglerReport) -> None:
        """totals: as they are now. report: of the last minute."""
        for worker in totals:
            labels = (self._model_name, worker.worker, worker.role)
            more = done_since(worker, self._last.get(worker.worker)).layers
            self._seconds.labels(*labels).inc(sum(layer.seconds for layer in more))
            self._batches.labels(*labels).inc(sum(layer.batches for layer in more))
            self._rows.labels(*labels).inc(sum(layer.rows for layer in more))
            self._last[worker.worker] = worker
        for gauge in (self._slowness, self._layer_time, self._expert_load):
            gauge.clear()  # what did not run in the last minute has no value
        for pace in report.workers:
            if pace.slowness is not None:
                self._slowness.labels(self._model_name, pace.worker, pace.role).set(pace.slowness)
        for layer in report.layers:
            self._layer_time.labels(self._model_name, layer.role, str(layer.layer)).set(layer.mean_s)
        for number, load in most_loaded(report.expert_tokens).items():
            self._expert_load.labels(self._model_name, str(number)).set(load)

"""What the machine does now, for everybody who looks: one sampler, which runs only while somebody does.

What lives here: when it is sampled, the form of an update, and the sharing of it: each is encoded once, and a slow reader
gets the newest. What does not: the sums (activity.py), the choice of steps to show (lanes.py), and who may look (gate.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

from afd_server.api.page.activity import Activity, StepSums, lower_edge_s, quantile_s
from afd_server.api.page.lanes import lanes
from afd_server.api.settings import Service
from afd_server.api.streaming import encoded
from afd_server.errors import OverloadedError, ServingError, UnavailableError
from afd_server.telemetry.metrics import Metrics
from afd_server.types import ReplicaStats, WorkerState

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
MAX_VIEWERS = 64
MAX_WORKERS = 200  # that are told of one by one
# How often and how long hops are recorded: a few steps' worth.
LANES_PERIOD_S = 1.0
STEPS_RECORDED = 6
MIN_RECORDED_S, MAX_RECORDED_S = 0.03, 0.3
TRACE_TIMEOUT_S = 5.0
QUANTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}


class Live:
    """Updates of the machine's state, as server-sent events. On the event loop's thread."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics
        self._viewers = 0
        self._sampler: asyncio.Task[None] | None = None
        self._activity = Activity()
        self._next: asyncio.Future[bytes] | None = None  # the update that everybody waits for
        self._lanes: dict[str, Any] | None = None
        self._steps: dict[str, StepSums] = {}  # the last that each replica ran
        self._closed = False

    @property
    def is_sampling(self) -> bool:
        return self._sampler is not None

    async def updates(self) -> AsyncGenerator[bytes, None]:
        """Until the server ends. Raises OverloadedError for too many viewers, UnavailableError at the end."""
        if self._viewers >= MAX_VIEWERS:
            raise OverloadedError(f"{MAX_VIEWERS} viewers look already", reason="viewers", retry_after_s=5)
        self._viewers += 1
        try:
            while True:
                if self._closed:
                    raise UnavailableError("the server is shutting down")
                yield await asyncio.shield(self._awaited())
        finally:
            self._viewers -= 1
            if not self._viewers:
                self._stop()

    def close(self) -> None:
        """The server ends: so do all views."""
        self._closed = True
        if self._next is not None and not self._next.done():
            self._next.set_exception(UnavailableError("the server is shutting down"))

    def _awaited(self) -> asyncio.Future[bytes]:
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        if self._sampler is None or self._sampler.done():
            self._metrics.listener = self._activity = Activity()
            self._lanes, self._steps = None, {}
            self._sampler = asyncio.create_task(self._run(), name="live view")
            self._sampler.add_done_callback(self._failed)
        return self._next

    def _stop(self) -> None:
        self._metrics.listener = None
        if self._sampler is not None:
            self._sampler.cancel()
        self._sampler = self._next = None

    def _failed(self, sampler: asyncio.Task[None]) -> None:
        """A bug of this view ends it for everybody, and nothing else."""
        if sampler.cancelled() or (error := sampler.exception()) is None:
            return
        logger.error("the live view failed", exc_info=error)
        if self._next is not None and not self._next.done():
            self._next.set_exception(UnavailableError("the live view failed; the log has the details"))

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._record_lanes())
            while True:
                update = encoded(self._sample())
                published, self._next = self._next, None
                if published is not None and not published.done():
                    published.set_result(update)
                await asyncio.sleep(PERIOD_S)

    # --- an update -------------------------------------------------------------------------------------------------

    def _sample(self) -> dict[str, Any]:
        workers = self._service.workers.worker_states()
        serving = {worker.name for worker in workers if worker.state in ("serving", "draining")}
        stats = {name: each for name, each in self._metrics.replica_stats.items() if name in serving}
        self._steps |= self._activity.take_steps()
        update = {
            "serving": self._service.is_serving(),
            "problems": self._service.health(),
            "change": self._service.workers.change_under_way() or None,
            "promises_ms": {name: seconds * 1e3 for name, seconds in self._metrics.promises_s.items()},
            "rates": dataclasses.asdict(self._activity.rates()),
            "requests": {
                "running": sum(each.num_running for each in stats.values()),
                "waiting": sum(each.num_waiting for each in stats.values()) + self._metrics.queue_length,
            },
            "kv_cache_usage": _kv_cache_usage(stats.values()),
            "times": self._times(),
            "workers": self._workers(workers, stats),
            "worker_counts": Counter(f"{worker.role} {worker.state}" for worker in workers),
        }
        if self._lanes is not None:
            update["lanes"], self._lanes = self._lanes, None
        return update

    def _times(self) -> dict[str, Any]:
        """How long a token took: [from, ms; to, ms; count] of the gaps between tokens, and the means of requests."""
        counts = self._activity.between_tokens.counts()
        quantiles = {name: quantile_s(counts, share) for name, share in QUANTILES.items()}
        return {
            "buckets": [
                [lower_edge_s(bucket) * 1e3, lower_edge_s(bucket + 1) * 1e3, count] for bucket, count in counts
            ],
            "requests_ms": [seconds * 1e3 for seconds in self._activity.recent_requests_s()],
            **{name: None if seconds is None else seconds * 1e3 for name, seconds in quantiles.items()},
        }

    def _workers(self, workers: Sequence[WorkerState], stats: dict[str, ReplicaStats]) -> list[dict[str, Any]]:
        """Those in trouble first, if not all can be told of."""
        told = set(sorted(workers, key=lambda each: each.state == "serving")[:MAX_WORKERS])
        rows = []
        for worker in workers:
            if worker not in told:
                continue
            row = dataclasses.asdict(worker)
            if (own := stats.get(worker.name)) is not None:
                row |= {
                    "running": own.num_running,
                    "waiting": own.num_waiting,
                    "kv_cache_usage": _kv_cache_usage([own]),
                }
            if worker.name in stats and (steps := self._steps.get(worker.name)) is not None:
                row |= {
                    "step_ms": 1e3 * steps.total_s / steps.num_steps,
                    "tokens_per_step": steps.num_tokens / steps.num_steps,
                    "bubble_share": steps.bubble_s / steps.total_s if steps.total_s else 0.0,
                }
            rows.append(row)
        return rows

    # --- lanes -----------------------------------------------------------------------------------------------------

    async def _record_lanes(self) -> None:
        """Records hops now and then while there is something to record."""
        while True:
            began = time.monotonic()
            if any(stats.num_running for stats in self._metrics.replica_stats.values()):
                try:
                    async with asyncio.timeout(TRACE_TIMEOUT_S):
                        traces = await self._service.workers.trace(self._seconds_to_record())
                    self._lanes = lanes(traces) or self._lanes
                except (ServingError, TimeoutError) as error:
                    logger.info("no hops were recorded: %s", error or type(error).__name__)
            await asyncio.sleep(max(0.0, began + LANES_PERIOD_S - time.monotonic()))

    def _seconds_to_record(self) -> float:
        longest_s = max(
            (sums.total_s / sums.num_steps for sums in self._steps.values()), default=MAX_RECORDED_S
        )
        return min(max(STEPS_RECORDED * longest_s, MIN_RECORDED_S), MAX_RECORDED_S)


def _kv_cache_usage(stats: Iterable[ReplicaStats]) -> float | None:
    """Share of the KV blocks in use, 0 to 1."""
    stats = list(stats)
    num_blocks = sum(each.num_blocks for each in stats)
    num_free = sum(each.num_free_blocks for each in stats)
    return (num_blocks - num_free) / num_blocks if num_blocks else None

"""Looks at the workers' totals now and then, so that a report tells of the last minute and not of the whole life of a server.

What lives here: when they are read, and the readings that are kept. What does not: what they tell (stragglers.py). On the front-end's
event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from afd_server.telemetry.straggler_metrics import StragglerMetrics
from afd_server.telemetry.stragglers import StragglerReport, done_since, straggler_report
from afd_server.types import WorkerTotals

logger = logging.getLogger(__name__)

READ_EVERY_S = 10.0
# A report tells of the time since the oldest reading that is kept: of a minute.
NUM_KEPT = 6

Reading = dict[str, WorkerTotals]


class StragglerWatch:
    """read: the totals of the workers that answer."""

    def __init__(
        self, read: Callable[[], Awaitable[Sequence[WorkerTotals]]], metrics: StragglerMetrics
    ) -> None:
        self._read = read
        self._metrics = metrics
        self._readings: deque[tuple[float, Reading]] = deque(maxlen=NUM_KEPT)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                totals = await self._read()
                self._metrics.observe(totals, self._report(totals))
                self._readings.append((time.monotonic(), {each.worker: each for each in totals}))
            except Exception:  # whatever it is, requests do not depend on it
                logger.exception("the workers' totals could not be read")
            await asyncio.sleep(READ_EVERY_S)

    async def report(self) -> StragglerReport:
        """Of the last minute, or since the workers were loaded when nothing ran in it."""
        return self._report(await self._read())

    def _report(self, totals: Sequence[WorkerTotals]) -> StragglerReport:
        if self._readings:
            at, before = self._readings[0]
            recent = [done_since(each, before.get(each.worker)) for each in totals]
            if any(layer.batches for each in recent for layer in each.layers):
                return straggler_report(recent, time.monotonic() - at)
        return straggler_report(totals, None)

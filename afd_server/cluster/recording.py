"""What all workers tell of their work: one recording of their hops, on one clock, and the sums of what they have done.

What lives here: asking them, and the bounds of it. What does not: the recording in a worker (telemetry/hop_recorder.py), and what the
spans of several workers tell together (telemetry/hop_trace.py). Imports no ray. Runs on the front-end's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from afd_server.errors import TooManyRecordingsError
from afd_server.telemetry.hop_recorder import HopRecorder
from afd_server.telemetry.hop_trace import aligned, assembled, clock_offset_s
from afd_server.types import HopSpan, WorkerTotals, WorkerTrace

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

MAX_RECORDINGS = 4
# For a worker's answer to one question. Its process may be busy loading, or gone.
ANSWER_TIMEOUT_S = 5.0
# After the window: steps and batches under way at its end are noted when they are over.
SETTLE_S = 0.1
ROUND_TRIPS = 5


@dataclass(frozen=True, slots=True)
class Recorded:
    """A worker as it is recorded. Its calls may fail in any way, which costs its own spans alone.

    clock: monotonic seconds there. begin: opens a window of so many seconds; None when there is nothing to record. end: its
    spans, and how many are missing.
    """

    worker: str
    role: str
    clock: Callable[[], Awaitable[float]]
    begin: Callable[[float], Awaitable[int | None]]
    end: Callable[[int], Awaitable[tuple[list[HopSpan], int]]]


def local_recorded(worker: str, recorder: HopRecorder) -> Recorded:
    """Of a worker in this process."""

    async def clock() -> float:
        return time.monotonic()

    async def begin(seconds: float) -> int | None:
        return recorder.begin(seconds)

    async def end(number: int) -> tuple[list[HopSpan], int]:
        return recorder.end(number)

    return Recorded(worker, worker.rpartition("-")[0], clock, begin, end)


class Recording:
    """Of one server's workers; as many at once as MAX_RECORDINGS."""

    def __init__(self) -> None:
        self._under_way = 0

    async def run(self, workers: Sequence[Recorded], seconds: float) -> list[WorkerTrace]:
        """See OperatedWorkers.trace."""
        if self._under_way >= MAX_RECORDINGS:
            raise TooManyRecordingsError(
                f"{MAX_RECORDINGS} recordings are under way already; try again when one is over"
            )
        self._under_way += 1
        try:
            recorded = await asyncio.gather(*(_record(worker, seconds) for worker in workers))
        finally:
            self._under_way -= 1
        known = [each for each in recorded if each is not None]
        far = {trace.worker for trace, offset_s in known if offset_s}
        return assembled([trace for trace, _ in known], far)


async def all_totals(asked: Mapping[str, Awaitable[WorkerTotals | None]]) -> list[WorkerTotals]:
    """The answers to a question that each worker has been asked; of those that give one in time."""

    async def one(worker: str, answer: Awaitable[WorkerTotals | None]) -> WorkerTotals | None:
        try:
            return await _in_time(answer)
        except Exception as error:  # as in _record
            _tell_missing(worker, "its work", error)
            return None

    answers = await asyncio.gather(*(one(worker, answer) for worker, answer in asked.items()))
    return [totals for totals in answers if totals is not None]


async def _record(worker: Recorded, seconds: float) -> tuple[WorkerTrace, float] | None:
    """What it did, by this process's clock, and what that is ahead of its own."""
    over_at = time.monotonic() + seconds + SETTLE_S
    try:
        number = await _in_time(worker.begin(seconds))
        if number is None:
            return None
        offset_s = clock_offset_s([await _round_trip(worker) for _ in range(ROUND_TRIPS)])
        await asyncio.sleep(max(0.0, over_at - time.monotonic()))
        spans, num_missing = await _in_time(worker.end(number))
    except Exception as error:  # a worker that dies, hangs or is replaced; the others' spans are worth having
        _tell_missing(worker.worker, "its hops", error)
        return None
    trace = WorkerTrace(worker.worker, worker.role, tuple(spans), num_missing)
    return aligned(trace, offset_s), offset_s


def _tell_missing(worker: str, what: str, error: Exception) -> None:
    problem = str(error).strip().splitlines() or [type(error).__name__]
    logger.warning("%s tells nothing of %s: %s", worker, what, problem[0])


async def _round_trip(worker: Recorded) -> tuple[float, float, float]:
    sent_at = time.monotonic()
    there = await _in_time(worker.clock())
    return sent_at, there, time.monotonic()


async def _in_time(answer: Awaitable[Result]) -> Result:
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        return await answer

"""A recording of all workers: what one of them does not say is missing, and nothing else."""

import asyncio
import time

import pytest

from afd_server.cluster import recording
from afd_server.cluster.recording import MAX_RECORDINGS, Recorded, Recording, local_recorded
from afd_server.errors import TooManyRecordingsError
from afd_server.telemetry.hop_recorder import HopRecorder
from afd_server.types import HopSpan


def noting(recorder, worker="ffn-0", ahead_s=0.0):
    """A worker that computes something as soon as it is recorded, by a clock that is ahead by so much."""
    there = local_recorded(worker, recorder)

    async def clock():
        return time.monotonic() + ahead_s

    async def begin(seconds):
        number = recorder.begin(seconds)
        now = time.monotonic()
        recorder.note(HopSpan("ffn", now, now, 1, 0, 0, "attention-0"))
        return number

    async def end(number):
        spans, missing = recorder.end(number)
        return [
            HopSpan("ffn", s.began_s + ahead_s, s.ended_s + ahead_s, 1, 0, 0, s.peer) for s in spans
        ], missing

    return Recorded(worker, there.role, clock, begin, end)


async def test_clocks_of_other_hosts_are_brought_to_this_one():
    began = time.monotonic()
    traces = await Recording().run([noting(HopRecorder(), ahead_s=5e5)], 0.05)
    (span,) = traces[0].spans
    assert began <= span.began_s <= time.monotonic()


async def test_who_dies_or_hangs_or_is_empty_costs_its_own_spans_alone(monkeypatch):
    monkeypatch.setattr(recording, "ANSWER_TIMEOUT_S", 0.2)

    async def fail(*_):
        raise ConnectionError("it is gone")

    async def hang(*_):
        await asyncio.Event().wait()

    async def nothing(*_):
        return None

    well = noting(HopRecorder(), "ffn-0")
    others = [
        Recorded("ffn-1", "ffn", fail, well.begin, well.end),
        Recorded("ffn-2", "ffn", well.clock, fail, fail),
        Recorded("ffn-3", "ffn", well.clock, well.begin, hang),
        Recorded("ffn-4", "ffn", well.clock, nothing, well.end),
    ]
    traces = await Recording().run([*others, well], 0.05)
    assert [trace.worker for trace in traces] == ["ffn-0"]


async def test_there_is_a_bound_on_recordings_at_once():
    recordings, go = Recording(), asyncio.Event()

    async def begin(seconds):
        await go.wait()

    waiting = Recorded("ffn-0", "ffn", begin, begin, begin)
    tasks = [asyncio.create_task(recordings.run([waiting], 0.05)) for _ in range(MAX_RECORDINGS)]
    await asyncio.sleep(0)
    with pytest.raises(TooManyRecordingsError):
        await recordings.run([waiting], 0.05)
    go.set()
    assert await asyncio.gather(*tasks) == [[]] * MAX_RECORDINGS
    assert await recordings.run([], 0.05) == []

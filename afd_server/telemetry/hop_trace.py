"""What the recordings of several workers tell together: one clock for all, and what lies between a call's two ends.

Pure functions on recorded spans. What does not live here: the recording (hop_recorder.py) and its form on paper (chrome_trace.py).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from afd_server.types import HopSpan, WorkerTrace

# A call, as both ends name it: attention worker, FFN worker, step, layer, micro-batch.
CallKey = tuple[str, str, int, int, int]


def clock_offset_s(round_trips: Sequence[tuple[float, float, float]]) -> float:
    """What is to be added to a worker's clock to give this process's; from (asked at, its clock, answered at).

    As NTP does: its clock was read in the middle of the round trip, and the shortest one is the least wrong. An offset that this
    error explains is none: processes of one host have one monotonic clock, and no measurement is as good.
    """
    asked_at, there, answered_at = min(round_trips, key=lambda trip: trip[2] - trip[0])
    offset_s = (asked_at + answered_at) / 2 - there
    return 0.0 if abs(offset_s) <= (answered_at - asked_at) / 2 else offset_s


def aligned(trace: WorkerTrace, offset_s: float) -> WorkerTrace:
    """The same on a clock that is ahead by so much; spans in the order of their beginnings."""
    spans = trace.spans
    if offset_s:
        spans = tuple(
            replace(each, began_s=each.began_s + offset_s, ended_s=each.ended_s + offset_s) for each in spans
        )
    return replace(trace, spans=tuple(sorted(spans, key=lambda each: each.began_s)))


def assembled(traces: Sequence[WorkerTrace], far: Collection[str] = ()) -> list[WorkerTrace]:
    """With what lies between the ends of each call that both ends have told of: its ways, and its time in the queue.

    far: workers with another clock than this process's. Calls are shorter round trips than any question to a worker, so an FFN worker's
    clock is set by them once more.
    """
    calls = {
        _key(trace, span): span
        for trace in traces
        if trace.role == "attention"
        for span in trace.spans
        if span.name == "call"
    }
    ffn = [trace for trace in traces if trace.role == "ffn"]
    ffn = [_set_by_calls(trace, calls) if trace.worker in far else trace for trace in ffn]
    ffn = [_with_queues(trace, calls) for trace in ffn]
    arrivals = _ffn_spans(ffn, "queue")
    ends = _ffn_spans(ffn, "ffn")
    attention = [_with_ways(trace, arrivals, ends) for trace in traces if trace.role == "attention"]
    return [*attention, *ffn]


def _ffn_spans(traces: Iterable[WorkerTrace], name: str) -> dict[CallKey, HopSpan]:
    return {_key(trace, span): span for trace in traces for span in trace.spans if span.name == name}


def _set_by_calls(trace: WorkerTrace, calls: Mapping[CallKey, HopSpan]) -> WorkerTrace:
    """As if both ways of the call that was shortest on them had taken equally long."""
    arrivals = _ffn_spans([trace], "queue")
    shortest_s, offset_s = math.inf, 0.0
    for key, end in _ffn_spans([trace], "ffn").items():
        call, arrival = calls.get(key), arrivals.get(key)
        if call is None or arrival is None:
            continue
        on_the_way_s = (call.ended_s - call.began_s) - (end.ended_s - arrival.began_s)
        if on_the_way_s < shortest_s:
            shortest_s = on_the_way_s
            offset_s = (call.began_s + call.ended_s) / 2 - (arrival.began_s + end.ended_s) / 2
    return aligned(trace, offset_s)


def _key(trace: WorkerTrace, span: HopSpan) -> CallKey:
    ends = (trace.worker, span.peer) if trace.role == "attention" else (span.peer, trace.worker)
    return (*ends, span.step, span.layer, span.micro_batch)


def _with_queues(trace: WorkerTrace, calls: Mapping[CallKey, HopSpan]) -> WorkerTrace:
    """A worker reads nothing while it computes. A call that was sent meanwhile has waited since, whenever it was read."""
    computed = sorted((span for span in trace.spans if span.name == "ffn"), key=lambda each: each.ended_s)
    ends = [span.ended_s for span in computed]
    spans = []
    for span in trace.spans:
        call = calls.get(_key(trace, span))
        if span.name == "queue" and call is not None:
            before = bisect_right(ends, span.ended_s) - 1  # the last batch that ended before this one began
            if before >= 0 and ends[before] > call.began_s:
                waited_from = max(call.began_s, computed[before].began_s)
                span = replace(span, began_s=min(span.began_s, waited_from))
        spans.append(span)
    return replace(trace, spans=tuple(spans))


def _with_ways(
    trace: WorkerTrace, arrivals: dict[CallKey, HopSpan], ends: dict[CallKey, HopSpan]
) -> WorkerTrace:
    spans = []
    for span in trace.spans:
        spans.append(span)
        if span.name != "call":
            continue
        key = _key(trace, span)
        arrival, end = arrivals.get(key), ends.get(key)
        if arrival is not None and end is not None:
            spans.append(replace(span, name="wire out", ended_s=max(span.began_s, arrival.began_s)))
            spans.append(replace(span, name="wire back", began_s=min(end.ended_s, span.ended_s)))
    return replace(trace, spans=tuple(spans))

"""Workers' hops in the Trace Event Format, which ui.perfetto.dev and chrome://tracing draw.

Only the form is here: a process for each worker; in an attention worker a lane for its thread, and one for the calls of each
micro-batch to each FFN worker; in an FFN worker a lane for each micro-batch of each caller. An arrow leads from a call to where it is
computed. Format: "Trace Event Format" by the Chromium project.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from afd_server.types import HopSpan, WorkerTrace

THREAD_LANE = "thread"
OF_THE_THREAD = ("attention", "send", "bubble", "sampling")

Event = dict[str, Any]


def chrome_trace(traces: Sequence[WorkerTrace]) -> bytes:
    """JSON. Time begins with the first span, in microseconds."""
    zero_s = min((span.began_s for trace in traces for span in trace.spans), default=0.0)
    events: list[Event] = []
    for pid, trace in enumerate(traces, start=1):
        events += _worker_events(pid, trace, zero_s)
    missing = {trace.worker: trace.num_missing for trace in traces if trace.num_missing}
    return msgspec.json.encode(
        {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"spans for which there was no room": missing} if missing else {},
        }
    )


def _worker_events(pid: int, trace: WorkerTrace, zero_s: float) -> Iterator[Event]:
    cut = f" ({trace.num_missing} spans are missing)" if trace.num_missing else ""
    yield _named("process_name", pid, 0, name=trace.worker + cut)
    yield _named("process_labels", pid, 0, labels=trace.role)
    yield _named("process_sort_index", pid, 0, sort_index=pid)
    lanes = sorted({_lane(span) for span in trace.spans})
    for tid, (place, name) in enumerate(lanes):
        yield _named("thread_name", pid, tid, name=name)
        yield _named("thread_sort_index", pid, tid, sort_index=place)
    tids = {lane: tid for tid, lane in enumerate(lanes)}
    for span in trace.spans:
        yield from _span_events(pid, tids[_lane(span)], trace, span, zero_s)


def _named(name: str, pid: int, tid: int, /, **args: Any) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _lane(span: HopSpan) -> tuple[int, str]:
    """Its place among the lanes of its worker, and its name."""
    if span.name in OF_THE_THREAD:
        return 0, THREAD_LANE
    word = "of" if span.name in ("queue", "ffn") else "to"
    return 1 + span.micro_batch, f"micro-batch {span.micro_batch} {word} {span.peer}"


def _span_events(pid: int, tid: int, trace: WorkerTrace, span: HopSpan, zero_s: float) -> Iterator[Event]:
    at_us = _us(span.began_s - zero_s)
    place: Event = {"pid": pid, "tid": tid, "ts": at_us}
    args: Event = {"step": span.step, "micro_batch": span.micro_batch}
    if span.layer >= 0:
        args["layer"] = span.layer
    if span.rows:
        args["rows"] = span.rows
    if span.peer:
        args["peer"] = span.peer
    yield {
        "ph": "X",
        "name": span.name,
        "cat": trace.role,
        **place,
        "dur": _us(span.ended_s - span.began_s),
        "args": args,
    }
    if span.name in ("call", "ffn"):
        attention, ffn = (trace.worker, span.peer) if span.name == "call" else (span.peer, trace.worker)
        name = f"{attention} {ffn} {span.step} {span.layer} {span.micro_batch}"
        ends: Event = {"ph": "s"} if span.name == "call" else {"ph": "f", "bp": "e"}
        yield {**ends, "name": "call", "cat": "call", "id": name, **place}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)

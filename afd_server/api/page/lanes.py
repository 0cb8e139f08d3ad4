"""From what the workers recorded of their hops to what a page draws: the last whole steps, one lane a worker.

What lives here: which steps, which workers, and how many spans at most. What does not: the recording (telemetry and the
workers), and colours (static/lanes.js). Pure; times in microseconds from the first one shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from afd_server.types import HopSpan, WorkerTrace

NUM_STEPS = 3
MAX_LANES = 8  # of each role
MAX_SPANS = 2500  # in all lanes: about 50 KB of JSON
# What is drawn; a call is seen by its parts.
NAMES = ("attention", "send", "sampling", "bubble", "wire out", "wire back", "queue", "ffn")


def lanes(traces: Sequence[WorkerTrace]) -> dict[str, Any] | None:
    """The last NUM_STEPS whole steps of the attention worker that recorded most, and what all others did meanwhile.

    Fewer when they have too many hops, a part of one when it alone has; None when nobody ran a step. A span is (index of
    its name, begin, duration, layer, micro-batch, step).
    """
    attention = _first_lanes(traces, "attention")
    if not attention:
        return None
    steps = _steps(max(attention, key=lambda trace: len(trace.spans)).spans)
    whole = steps[1:-1] or steps  # the first and the last may have been cut off
    drawn = [*attention, *_first_lanes(traces, "ffn")]
    for number in range(min(NUM_STEPS, len(whole)), 0, -1):
        shown = whole[-number:]
        began_s, ended_s = shown[0][1], shown[-1][2]
        spans = _within(drawn, began_s, ended_s)
        num_spans = sum(map(len, spans))
        if num_spans <= MAX_SPANS:
            break
    else:
        ended_s = began_s + (ended_s - began_s) * MAX_SPANS / num_spans
        spans = [of_lane[:MAX_SPANS] for of_lane in _within(drawn, began_s, ended_s)]
    return {
        "names": NAMES,
        "duration_us": _us(ended_s - began_s),
        "steps": [[step, _us(first - began_s), _us(last - began_s)] for step, first, last in shown],
        "workers": [
            {"name": trace.worker, "role": trace.role, "spans": [_row(span, began_s, ended_s) for span in own]}
            for trace, own in zip(drawn, spans, strict=True)
        ],
        "num_not_drawn": sum(bool(trace.spans) for trace in traces) - len(drawn),
    }


def _first_lanes(traces: Sequence[WorkerTrace], role: str) -> list[WorkerTrace]:
    """Those of a role that did something, in the order of their numbers."""
    busy = [trace for trace in traces if trace.role == role and trace.spans]
    return sorted(busy, key=lambda trace: (len(trace.worker), trace.worker))[:MAX_LANES]


def _steps(spans: Sequence[HopSpan]) -> list[tuple[int, float, float]]:
    """(step, begin, end) of each, in order."""
    found: dict[int, tuple[float, float]] = {}
    for span in spans:
        began_s, ended_s = found.get(span.step, (span.began_s, span.ended_s))
        found[span.step] = (min(began_s, span.began_s), max(ended_s, span.ended_s))
    return sorted(((step, *times) for step, times in found.items()), key=lambda each: each[1])


def _within(traces: Sequence[WorkerTrace], began_s: float, ended_s: float) -> list[list[HopSpan]]:
    return [
        [
            span
            for span in trace.spans
            if span.began_s < ended_s and span.ended_s > began_s and span.name in NAMES
        ]
        for trace in traces
    ]


def _row(span: HopSpan, began_s: float, ended_s: float) -> list[Any]:
    first_s, last_s = max(span.began_s, began_s), min(span.ended_s, ended_s)
    return [
        NAMES.index(span.name), _us(first_s - began_s), _us(last_s - first_s), span.layer, span.micro_batch, span.step,
    ]  # fmt: skip


def _us(seconds: float) -> int:
    return round(seconds * 1e6)

"""Recordings of several workers put together: one clock, ways and queues; and their form as a Chrome trace."""

import json

import pytest

from afd_server.telemetry.chrome_trace import chrome_trace
from afd_server.telemetry.hop_trace import aligned, assembled, clock_offset_s
from afd_server.types import HopSpan, WorkerTrace


def attention_span(name, began_s, ended_s, layer=0, micro_batch=0, peer="", step=1):
    return HopSpan(name, began_s, ended_s, step, layer, micro_batch, peer, 8)


def ffn_span(name, began_s, ended_s, peer="attention-0", **where):
    return attention_span(name, began_s, ended_s, peer=peer, **where)


def attention(*spans, name="attention-0"):
    return WorkerTrace(name, "attention", spans)


def ffn(*spans):
    return WorkerTrace("ffn-0", "ffn", spans)


def spans_of(traces, worker, name):
    (trace,) = [trace for trace in traces if trace.worker == worker]
    return [(span.began_s, span.ended_s) for span in trace.spans if span.name == name]


@pytest.mark.parametrize("ahead_s", [1234.5, -1234.5])
def test_the_shortest_round_trip_tells_how_far_a_clock_is_ahead(ahead_s):
    def there(middle_s):
        return middle_s + ahead_s

    trips = [(0.0, there(0.9), 1.0), (2.0, there(2.005), 2.01), (3.0, there(3.3), 3.5)]
    assert clock_offset_s(trips) == pytest.approx(-ahead_s)
    moved = aligned(WorkerTrace("ffn-0", "ffn", (ffn_span("ffn", there(7), there(8)),)), clock_offset_s(trips))
    assert (moved.spans[0].began_s, moved.spans[0].ended_s) == (pytest.approx(7), pytest.approx(8))


def test_clocks_that_may_be_the_same_are_taken_for_it():
    assert clock_offset_s([(0.0, 0.9, 1.0)]) == 0.0
    assert clock_offset_s([(0.0, 1.1, 1.0)]) == pytest.approx(-0.6)


def test_what_lies_between_the_ends_of_a_call_is_its_way():
    traces = assembled(
        [
            attention(attention_span("call", 1.0, 2.0, peer="ffn-0")),
            ffn(ffn_span("queue", 1.1, 1.2), ffn_span("ffn", 1.2, 1.7)),
        ]
    )
    assert spans_of(traces, "attention-0", "wire out") == [(1.0, 1.1)]
    assert spans_of(traces, "attention-0", "wire back") == [(1.7, 2.0)]
    assert spans_of(traces, "ffn-0", "queue") == [(1.1, 1.2)]


def test_a_call_that_was_sent_while_the_worker_computed_has_waited_since():
    """It reads nothing meanwhile, so what it noted as the arrival is when it was done."""
    traces = assembled(
        [
            attention(attention_span("call", 1.0, 1.6, peer="ffn-0")),
            attention(attention_span("call", 1.3, 2.2, peer="ffn-0"), name="attention-1"),
            ffn(
                ffn_span("queue", 1.1, 1.1),
                ffn_span("ffn", 1.1, 1.5),
                ffn_span("queue", 1.52, 1.55, peer="attention-1"),
                ffn_span("ffn", 1.55, 2.1, peer="attention-1"),
            ),
        ]
    )
    assert spans_of(traces, "ffn-0", "queue") == [(1.1, 1.1), (1.3, 1.55)]
    assert spans_of(traces, "attention-1", "wire out") == [(1.3, 1.3)]


def test_a_far_clock_is_set_by_the_shortest_call():
    error_s = 0.3  # of what asking the worker has given
    traces = [
        attention(
            attention_span("call", 1.0, 2.0, peer="ffn-0"),
            attention_span("call", 3.0, 3.6, peer="ffn-0", layer=1),
        ),
        ffn(
            ffn_span("queue", 1.4 + error_s, 1.4 + error_s),
            ffn_span("ffn", 1.4 + error_s, 1.8 + error_s),
            ffn_span("queue", 3.05 + error_s, 3.1 + error_s, layer=1),
            ffn_span("ffn", 3.1 + error_s, 3.55 + error_s, layer=1),
        ),
    ]
    assert spans_of(assembled(traces, {"ffn-0"}), "ffn-0", "ffn") == [
        (pytest.approx(1.4), pytest.approx(1.8)),
        (pytest.approx(3.1), pytest.approx(3.55)),
    ]
    assert spans_of(assembled(traces), "ffn-0", "ffn")[0] == (pytest.approx(1.7), pytest.approx(2.1))


def test_calls_of_equal_place_in_other_steps_are_others():
    traces = assembled(
        [attention(attention_span("call", 1.0, 2.0, peer="ffn-0", step=1)), ffn(ffn_span("ffn", 5, 6, step=2))]
    )
    assert spans_of(traces, "attention-0", "wire out") == []


def test_without_the_other_end_a_call_is_whole():
    traces = assembled([attention(attention_span("call", 1.0, 2.0, peer="ffn-9"))])
    assert [span.name for span in traces[0].spans] == ["call"]


def test_the_chrome_trace_is_in_the_format_that_viewers_read():
    traces = assembled(
        [
            attention(
                attention_span("attention", 10.0, 10.5),
                attention_span("call", 10.5, 11.0, peer="ffn-0"),
                attention_span("bubble", 10.6, 11.0, peer="ffn-0"),
                attention_span("sampling", 11.0, 11.2, layer=-1),
            ),
            ffn(ffn_span("queue", 10.6, 10.6), ffn_span("ffn", 10.6, 10.9)),
        ]
    )
    document = json.loads(chrome_trace(traces))
    events = document["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"}
    assert names == {(1, "attention-0"), (2, "ffn-0")}
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(lanes.values()) == {"thread", "micro-batch 0 to ffn-0", "micro-batch 0 of attention-0"}
    complete = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in complete} == {
        "attention", "bubble", "sampling", "call", "wire out", "wire back", "queue", "ffn"
    }  # fmt: skip
    assert all((event["pid"], event["tid"]) in lanes and event["dur"] >= 0 for event in complete)
    (call,) = [event for event in complete if event["name"] == "call"]
    assert (call["ts"], call["dur"]) == (500000.0, 500000.0)
    assert call["args"] == {"step": 1, "layer": 0, "micro_batch": 0, "rows": 8, "peer": "ffn-0"}
    start, finish = (next(event for event in events if event["ph"] == phase) for phase in "sf")
    assert start["id"] == finish["id"] and finish["bp"] == "e"
    assert start["ts"] < finish["ts"]


def test_spans_that_are_missing_are_told_of():
    cut = WorkerTrace("ffn-0", "ffn", (ffn_span("ffn", 1, 2),), num_missing=7)
    document = json.loads(chrome_trace([cut]))
    assert document["otherData"] == {"spans for which there was no room": {"ffn-0": 7}}
    assert any(
        "7 spans are missing" in str(event["args"]) for event in document["traceEvents"] if "args" in event
    )


def test_nothing_recorded_is_an_empty_trace():
    assert json.loads(chrome_trace([]))["traceEvents"] == []

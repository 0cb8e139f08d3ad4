"""Windows of recorded hops: what they take in, and that they are bounded and end by themselves."""

import time
from dataclasses import replace

from afd_server.telemetry import hop_recorder
from afd_server.telemetry.hop_recorder import MAX_WINDOWS, HopRecorder
from afd_server.types import HopSpan

SPAN = HopSpan("attention", 0.0, 0.0, 1, 2, 0)


def span_at(began_s):
    return replace(SPAN, began_s=began_s, ended_s=began_s + 1)


def test_a_window_takes_what_begins_in_it_although_others_are_open():
    recorder = HopRecorder()
    assert not recorder.windows
    long, short = recorder.begin(100.0), recorder.begin(1.0)
    now = time.monotonic()
    spans = [span_at(now - 50), span_at(now), span_at(now + 50), span_at(now + 105)]
    for span in spans[:2]:
        recorder.note(span)
    assert recorder.end(short) == ([spans[1]], 0)
    for span in spans[2:]:
        recorder.note(span)
    assert recorder.end(long) == ([spans[1], spans[2]], 0)
    assert not recorder.windows
    assert recorder.end(long) == ([], 0)


def test_a_window_is_bounded_and_says_what_is_missing():
    recorder = HopRecorder(max_spans=2)
    number, now = recorder.begin(100.0), time.monotonic()
    for _ in range(5):
        recorder.note(span_at(now))
    assert recorder.end(number) == ([span_at(now)] * 2, 3)


def test_a_window_that_nobody_asks_for_is_forgotten():
    recorder = HopRecorder()
    recorder.begin(0.0)
    recorder.note(span_at(time.monotonic() + hop_recorder.KEPT_S + 1))
    assert not recorder.windows


def test_the_oldest_window_makes_room():
    recorder = HopRecorder()
    numbers = [recorder.begin(100.0) for _ in range(MAX_WINDOWS + 1)]
    recorder.note(span_at(time.monotonic()))
    assert recorder.end(numbers[0]) == ([], 0)
    assert len(recorder.end(numbers[1])[0]) == len(recorder.end(numbers[-1])[0]) == 1

"""Definitions of the metrics, on outcomes made up here."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.bench.generator import Run
from afd_server.bench.outcome import Outcome
from afd_server.bench.report import complaints, lines
from afd_server.bench.statistics import METRICS, described, detailed, keeps, summary, times_ms

FAILED = Outcome(0.0, 0.0, error="HTTP 429", message="later")


def run_of(*outcomes, duration_s=10.0, cpu_s=0.1, late_s=(0.0,)):
    return Run(outcomes, duration_s, 3, cpu_s, late_s)


def request(sent_s=0.0, *, ttft_s=0.5, gaps_s=(0.1, 0.3), tokens=5, due_s=None):
    chunks = [sent_s + ttft_s]
    for gap_s in gaps_s:
        chunks.append(chunks[-1] + gap_s)
    return Outcome(sent_s if due_s is None else due_s, sent_s, tuple(chunks), 8, tokens)


def test_the_time_per_token_is_over_the_tokens_after_the_first():
    times = times_ms([request()])
    assert times["ttft"] == pytest.approx([500])
    assert times["tpot"] == pytest.approx([400 / 4])
    assert times["itl"] == pytest.approx([100, 300])
    assert times["e2el"] == pytest.approx([900])


def test_a_single_token_has_no_time_per_token_and_keeps_its_promise():
    one = request(gaps_s=(), tokens=1)
    assert times_ms([one])["tpot"] == []
    assert keeps(one, {"tpot": 1.0})


def test_throughput_counts_whole_answers_and_errors_are_counted_by_kind():
    report = summary(run_of(request(), request(tokens=15), FAILED, FAILED, Outcome(0, 0, error="timeout")))
    assert (report["completed"], report["failed"]) == (2, 3)
    assert report["errors"] == {"HTTP 429": 2, "timeout": 1}
    assert report["error_messages"] == {"HTTP 429": "later", "timeout": ""}
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (16, 20)
    assert (report["request_throughput"], report["output_throughput"]) == (0.2, 2.0)
    assert report["total_token_throughput"] == 3.6


def test_goodput_wants_every_promise_kept_and_no_failure():
    fast, slow_start, slow = request(), request(ttft_s=3.0), request(gaps_s=(1.0, 1.0))
    report = summary(run_of(fast, slow_start, slow, FAILED), promises_ms={"tpot": 150, "ttft": 2000})
    assert report["request_goodput"] == 0.1
    assert report["goodput_share"] == 0.25


def test_a_run_without_an_answer_has_no_times_and_can_be_told():
    report = summary(run_of(FAILED))
    assert report["median_ttft_ms"] is None
    assert report["p99_itl_ms"] is None
    told = "\n".join(lines(report, tuple(METRICS), (50, 90, 99)))
    assert "1 x HTTP 429: later" in told


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_between_their_neighbours(values, percentile):
    """At least the share of the values below, at most the share above, and nothing beyond the extremes."""
    found = described(values, "x", [percentile])[f"p{percentile:g}_x_ms"]
    position = percentile / 100 * (len(values) - 1)
    ordered = sorted(values)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    assert low - 0.001 <= found <= high + 0.001


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.floats(0.001, 10), st.lists(st.floats(0, 1), max_size=5), st.integers(1, 20)), min_size=1
    )
)
def test_times_of_a_request_add_up(drawn):
    """E2EL = TTFT + all ITLs = TTFT + TPOT x (tokens - 1), whatever the chunks are."""
    for ttft_s, gaps_s, tokens in drawn:
        one = request(ttft_s=ttft_s, gaps_s=gaps_s, tokens=max(tokens, len(gaps_s) + 1))
        assert one.e2el_s == pytest.approx(one.ttft_s + sum(one.itl_s))
        assert one.e2el_s == pytest.approx(one.ttft_s + one.tpot_s * (one.output_tokens - 1))


@pytest.mark.parametrize(
    ("cpu_s", "late_s", "is_bottleneck"),
    [(0.5, 0.001, False), (9.0, 0.001, True), (0.5, 0.012, True), (0.5, 0.009, False)],
)
def test_a_generator_that_could_not_keep_up_says_so(cpu_s, late_s, is_bottleneck):
    """TPOT is 100 ms, so 10 ms are worth a warning."""
    report = summary(run_of(request(), cpu_s=cpu_s, late_s=[late_s] * 50))
    assert report["generator"]["is_bottleneck"] is is_bottleneck
    assert any("load generator" in line for line in complaints(report)) is is_bottleneck


def test_lateness_of_sending_is_reported():
    report = summary(run_of(request(sent_s=2.0, due_s=1.5)))
    assert report["generator"]["sent_late_p99_ms"] == 500


def test_details_are_in_the_order_of_the_schedule():
    first, second = request(sent_s=0.0), request(sent_s=1.0, tokens=9)
    details = detailed(run_of(second, FAILED, first))
    assert details["output_lens"] == [5, 0, 9] or details["output_lens"] == [0, 5, 9]
    assert details["ttfts"].count(None) == 1
    assert details["request_errors"].count("HTTP 429") == 1

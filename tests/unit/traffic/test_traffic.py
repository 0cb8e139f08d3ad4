"""Traces as their publishers write them, arrival processes by their moments, and files that are no traces."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.errors import ConfigError
from afd_server.traffic import Arrival, arrival_times, length_between, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-12 00:00:00.003999+00:00,2162,5
2024-05-12 02:00:01.003999+02:00,2399,6
"""
BURST_GPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
45,GPT-4,417,276,693,API log
5,ChatGPT,472,18,490,Conversation log
48,ChatGPT,1087,0,1087,Conversation log
"""


def trace(tmp_path, text, most=None):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    return read_trace(file, most)


def test_an_azure_trace_counts_from_its_first_request(tmp_path):
    first, second, third = trace(tmp_path, AZURE)
    assert first == Arrival(0.0, 374, 44)
    assert (second.prompt_tokens, second.output_tokens) == (396, 109)
    assert second.at_s == pytest.approx(4.314579, abs=1e-5)
    assert third.at_s == pytest.approx(4.541877, abs=1e-5)


def test_dates_with_a_time_zone_are_compared_in_one(tmp_path):
    assert [arrival.at_s for arrival in trace(tmp_path, AZURE_2024)] == pytest.approx([0.0, 1.0])


def test_burst_gpt_is_put_in_order_and_its_failures_are_left_out(tmp_path):
    assert trace(tmp_path, BURST_GPT) == [Arrival(0.0, 472, 18), Arrival(40.0, 417, 276)]


def test_no_more_is_read_than_is_asked_for(tmp_path):
    assert len(trace(tmp_path, AZURE + "nonsense\n", most=2)) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", ["ContextTokens", "Response tokens"]),
        ("", ["ContextTokens"]),
        (AZURE + "2023-11-16 18:15:52,many,3\n", ["line 5", "many"]),
        (AZURE + "2023-11-16 18:15:52,3\n", ["line 5"]),
        (AZURE + "yesterday,3,4\n", ["line 5", "yesterday"]),
        (AZURE + "nan,3,4\n", ["line 5", "nan"]),
        (AZURE + "7,1.5,4\n", ["line 5", "1.5"]),
        (AZURE + "7,-1,4\n", ["line 5", "-1"]),
        (AZURE.splitlines()[0] + "\n", ["no request"]),
    ],
)
def test_what_is_wrong_with_a_trace_is_named(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        trace(tmp_path, text)
    assert all(word in str(caught.value) for word in ["trace.csv", *words])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.csv: cannot be read: No such file"):
        read_trace(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_intervals_have_the_rate_and_the_burstiness(burstiness):
    """A gamma distribution of shape k has a standard deviation of mean / sqrt(k)."""
    times = list(itertools.islice(arrival_times(20.0, burstiness, random.Random(3)), 20_000))
    intervals = [later - earlier for earlier, later in itertools.pairwise([0.0, *times])]
    mean = statistics.mean(intervals)
    assert mean == pytest.approx(0.05, rel=0.05)
    assert statistics.stdev(intervals) / mean == pytest.approx(burstiness**-0.5, rel=0.05)


def test_infinite_burstiness_is_a_clock():
    assert list(itertools.islice(arrival_times(4.0, math.inf, random.Random(0)), 3)) == [0.25, 0.5, 0.75]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 500), st.floats(0, 0.99), st.integers())
def test_a_length_is_within_its_range(mean, ratio, seed):
    length = length_between(mean, ratio, random.Random(seed))
    assert length >= 1
    assert mean * (1 - ratio) - 1 <= length <= mean * (1 + ratio) + 1

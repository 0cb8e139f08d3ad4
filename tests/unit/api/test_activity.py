import math

import pytest

from afd_server.api.page.activity import WINDOW_S, Activity, Latencies, bucket_of, lower_edge_s, quantile_s
from afd_server.types import ReplicaStats, StepTiming


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize("seconds", [1e-9, 0.0012, 0.015, 0.99, 1.0, 70.0])
def test_a_time_lies_in_its_bucket(seconds):
    bucket = bucket_of(seconds)
    assert lower_edge_s(bucket) <= max(seconds, 1e-6) * (1 + 1e-12)
    assert max(seconds, 1e-6) < lower_edge_s(bucket + 1) * (1 + 1e-12)


def test_quantiles_are_near_the_true_ones():
    clock = Clock()
    latencies = Latencies(clock)
    values = [0.001 * 1.01**power for power in range(500)]
    for value in values:
        latencies.add(value)
    for share in (0.1, 0.5, 0.9, 0.99):
        found = quantile_s(latencies.counts(), share)
        assert abs(math.log(found / values[int(share * len(values))])) < 0.03
    assert quantile_s([], 0.5) is None


def test_times_are_forgotten_after_the_window(clock):
    latencies = Latencies(clock)
    latencies.add(0.01, count=3)
    clock.now += WINDOW_S / 2
    latencies.add(0.01)
    assert latencies.counts() == [(bucket_of(0.01), 4)]
    clock.now += WINDOW_S / 2 + 1
    assert latencies.counts() == [(bucket_of(0.01), 1)]


def test_rates_are_means_over_the_last_two_seconds(clock):
    activity = Activity(clock)
    rates = []
    for tick in range(20):
        clock.now += 0.5
        activity.tokens(50 if tick < 10 else 10, 0.1, first=False)
        activity.prompt(5)
        rates.append(activity.rates())
    assert rates[9].output_tokens == pytest.approx(100)
    assert rates[-1].output_tokens == pytest.approx(20)
    assert rates[-1].prompt_tokens == pytest.approx(10)


def test_steps_are_counted_until_they_are_taken(clock):
    activity = Activity(clock)
    for _ in range(3):
        activity.stepped("attention-0", ReplicaStats(timing=StepTiming(0.01, bubble_s=0.002, num_tokens=8)))
    activity.stepped("attention-1", ReplicaStats())
    (taken,) = activity.take_steps().values()
    assert (taken.num_steps, taken.num_tokens) == (3, 24)
    assert taken.bubble_s / taken.total_s == pytest.approx(0.2)
    assert activity.take_steps() == {}

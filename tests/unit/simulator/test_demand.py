"""Lengths as they are written, and requests as they come."""

import random
import statistics

import pytest

from afd_server.errors import ConfigError
from afd_server.simulator.demand import Demand, Lengths
from afd_server.traffic import Arrival


@pytest.mark.parametrize(
    ("text", "mean", "deviation"), [("7", 7, 0), ("uniform:10:30", 20, 5.77), ("lognormal:200:0.5", 200, 100)]
)
def test_lengths_have_the_mean_and_spread_that_they_say(text, mean, deviation):
    lengths, generator = Lengths.parse("--input-len", text), random.Random(1)
    drawn = [lengths.draw(generator) for _ in range(20_000)]
    assert lengths.mean == mean
    assert statistics.fmean(drawn) == pytest.approx(mean, rel=0.03)
    assert statistics.pstdev(drawn) == pytest.approx(deviation, rel=0.1, abs=0.1)
    assert min(drawn) >= 1


@pytest.mark.parametrize(
    "text", ["0", "-3", "many", "uniform:5", "uniform:9:3", "lognormal:100:0", "normal:5:1", "nan"]
)
def test_what_is_no_length_is_refused_by_the_flag_s_name(text):
    with pytest.raises(ConfigError, match="--output-len"):
        Lengths.parse("--output-len", text)


def test_a_trace_is_played_as_fast_as_asked_and_no_longer_than_the_run():
    trace = [Arrival(at_s, 10, 5) for at_s in (0.0, 10.0, 20.0, 30.0)]
    assert [each.at_s for each in Demand(trace=trace, speed=2.0).arrivals(12.0)] == [0.0, 5.0, 10.0]


def test_a_rate_is_kept_on_average():
    demand = Demand(prompt=Lengths.fixed(5), output=Lengths.fixed(6), rate=50.0, burstiness=0.5)
    arrivals = list(demand.arrivals(100.0))
    assert len(arrivals) == pytest.approx(5000, rel=0.1)
    assert arrivals[0].prompt_tokens == 5 and arrivals[0].output_tokens == 6

"""The search for the highest load, on servers that are functions of the load."""

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.bench.dataset import DatasetSettings
from afd_server.bench.sla import Promises, Search, halfway, highest, whole_halfway


def searched(holds, first, most, between):
    asked = []

    async def probe(load):
        asked.append(load)
        return holds(load)

    return asyncio.run(highest(probe, first, most, between)), asked


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 5000), st.integers(1, 5000), st.floats(0, 0.5))
def test_whole_loads_are_found_within_the_tolerance(limit, most, tolerance):
    found, asked = searched(lambda load: load <= limit, 1, most, lambda a, b: whole_halfway(a, b, tolerance))
    expected = min(limit, most)
    assert len(asked) <= 2 * math.log2(most) + 5
    assert all(load == int(load) and 1 <= load <= most for load in asked)
    if expected == 0:
        assert found is None
    else:
        assert found <= expected
        assert expected - found <= tolerance * found
        assert asked.count(found) >= 2


@settings(deadline=None, max_examples=200)
@given(st.floats(0.001, 1e4), st.floats(0.001, 10), st.floats(0.01, 0.5))
def test_rates_are_found_within_the_tolerance(limit, first, tolerance):
    found, _ = searched(lambda load: load <= limit, first, 1e5, lambda a, b: halfway(a, b, tolerance))
    if first > limit:
        assert found is None
    else:
        assert limit / (1 + tolerance) * 0.999 <= found <= limit


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 300))
def test_a_server_that_scatters_ends_the_search_and_what_is_found_held_last(answers, most):
    """Any sequence of answers; after them the server holds nothing."""
    told = iter(answers)
    history = {}

    def holds(load):
        history[load] = next(told, False)
        return history[load]

    found, _ = searched(holds, 1, most, lambda a, b: whole_halfway(a, b, 0.0))
    assert found is None or history[found]


def test_a_lucky_best_is_not_taken():
    """8 held once and not again, so what is found is below."""
    times = []

    def holds(load):
        times.append(load)
        return load < 8 or (load == 8 and times.count(8) == 1)

    found, _ = searched(holds, 1, 64, lambda a, b: whole_halfway(a, b, 0.0))
    assert found == 7


class ModelledProber:
    """A server with a TPOT of 2 ms a client, and room for a number of requests a second."""

    percentiles = (50,)

    def __init__(self, rate_limit=50.0):
        self.rate_limit, self.rates = rate_limit, []

    def summary(self, tpot_ms, ttft_ms, tokens_per_s, failed=0):
        times = {
            f"p{p:g}_{m}_ms": v for p in self.percentiles for m, v in (("tpot", tpot_ms), ("ttft", ttft_ms))
        }
        return {
            **times, "median_e2el_ms": 500.0, "output_throughput": tokens_per_s, "request_throughput": 1.0,
            "completed": 9, "failed": failed, "errors": {"HTTP 429": failed} if failed else {},
            "error_messages": {"HTTP 429": "no room"} if failed else {}, "duration": 1.0,
        }  # fmt: skip

    async def closed(self, clients):
        return self.summary(2.0 * clients, 10.0, min(clients, 16) * 10.0)

    async def open(self, rate):
        self.rates.append(rate)
        return self.summary(10.0, 10.0 if rate <= self.rate_limit else 1e6, 10.0 * rate)


def search_of(prober, variable, *, tpot_ms=50.0, ttft_ms=None, most=4096):
    search = Search(prober, Promises(tpot_ms, ttft_ms, 99), variable, most, tolerance=0.02)
    asyncio.run(search.run())
    return search


def test_clients_are_searched_to_the_last_one_that_keeps_the_pace():
    search = search_of(ModelledProber(), "max_concurrency")
    assert search.result()["highest_load"] == 25
    assert search.result()["fastest_load"] == 16
    assert "25 clients" in search.verdict()


def test_a_rate_begins_with_that_of_one_client():
    prober = ModelledProber()
    search = search_of(prober, "request_rate", ttft_ms=100.0)
    assert prober.rates[0] == 2.0
    assert search.result()["highest_load"] == pytest.approx(50.0, rel=0.02)
    assert all(probe["holds"] == (probe["load"] <= 50.0) for probe in search.result()["probes"])


def test_the_most_that_is_tried_is_said():
    search = search_of(ModelledProber(), "max_concurrency", most=8)
    assert search.result()["highest_load"] == 8
    assert "--max-load" in search.verdict()


@pytest.mark.parametrize("variable", ["max_concurrency", "request_rate"])
def test_a_promise_that_one_client_breaks_is_answered_with_one_that_could_be_made(variable):
    search = search_of(ModelledProber(), variable, tpot_ms=1.5, ttft_ms=5.0)
    assert search.result()["highest_load"] is None
    assert search.verdict().endswith(
        "99 % of the requests keep for one client alone is --tpot-sla-ms 2 --ttft-sla-ms 10"
    )


def test_a_load_that_is_refused_does_not_hold():
    class Refusing(ModelledProber):
        async def closed(self, clients):
            return self.summary(1.0, 1.0, 10.0, failed=3)

    search = search_of(Refusing(), "max_concurrency")
    assert search.result()["highest_load"] is None
    assert "3 requests of one client alone failed: HTTP 429: no room" in search.verdict()


def test_patience_is_twice_what_the_promises_allow():
    promises = Promises(50.0, 2000.0, 99)
    assert promises.patience_s(DatasetSettings(random_output_len=100)) == 2 * (2.0 + 5.0)
    assert Promises(50.0, None, 99).patience_s(DatasetSettings()) is None

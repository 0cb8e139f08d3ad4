"""What /metrics says, asked for sums, means and quantiles."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from afd_server.watching.samples import Samples


class Exposition:
    def __init__(self):
        self.registry = CollectorRegistry()
        self.tokens = Counter("afd:tokens", "", ["engine"], registry=self.registry)
        self.time = Histogram("afd:time", "", ["engine"], registry=self.registry, buckets=(1, 2, 4))

    def samples(self):
        return Samples.parse(generate_latest(self.registry).decode())


def test_sums_are_over_the_samples_that_have_the_labels():
    exposition = Exposition()
    exposition.tokens.labels("a").inc(3)
    exposition.tokens.labels("b").inc(4)
    samples = exposition.samples()
    assert (samples.total("tokens_total"), samples.total("tokens_total", engine="b")) == (7, 4)
    assert samples.total("gone") == 0
    assert samples.label_values("tokens_total", "engine") == {"a", "b"}


def test_means_and_quantiles_are_those_of_the_observations_between():
    exposition = Exposition()
    for _ in range(100):
        exposition.time.labels("a").observe(3.5)
    before = exposition.samples()
    for engine in "ab":
        for value in (0.5, 1.5, 1.5, 3.0, 9.0):
            exposition.time.labels(engine).observe(value)
    recent = exposition.samples().since(before)
    assert recent.mean("time") == pytest.approx(3.1)
    # Half of ten observations: 5, of which 2 are within 1 and 6 within 2.
    assert recent.quantile("time", 0.5) == pytest.approx(1.75)
    assert recent.quantile("time", 0.99) == 4.0
    assert before.since(before).mean("time") is None
    assert before.since(before).quantile("time", 0.5) is None
    assert before.quantile("gone", 0.5) is None


def test_a_counter_that_began_anew_has_added_all_that_it_says():
    before, now = Exposition(), Exposition()
    before.tokens.labels("a").inc(9)
    now.tokens.labels("a").inc(2)
    assert now.samples().since(before.samples()).total("tokens_total") == 2


def test_what_is_no_exposition_is_refused():
    with pytest.raises(ValueError, match="html"):
        Samples.parse("<html>")

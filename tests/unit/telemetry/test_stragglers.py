"""Who is slow, told from sums: alike is compared with alike, and what is too little to tell is not told."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from afd_server.telemetry import straggler_watch
from afd_server.telemetry.straggler_metrics import StragglerMetrics
from afd_server.telemetry.straggler_watch import StragglerWatch
from afd_server.telemetry.stragglers import done_since, expert_tokens, straggler_report
from afd_server.types import LayerTotal, WaitTotal, WorkerTotals

NOTHING_STANDS_OUT = ("no worker, layer or expert stands out",)


def ffn(index, *each_s, batches=100, rows=8, tokens=(), first_expert=0):
    layers = tuple(LayerTotal(batches * s, batches, batches * rows) for s in each_s)
    return WorkerTotals(f"ffn-{index}", "ffn", layers, (), first_expert, tokens)


def slowness_of(report):
    return {pace.worker: pace.slowness for pace in report.workers}


def test_a_slow_worker_is_named_with_how_much_slower_it_is_than_its_peers():
    report = straggler_report([ffn(0, 0.001), ffn(1, 0.0021), ffn(2, 0.001)], 10.0)
    assert report.findings == (
        "ffn-1 is slow: it takes 2.1 times as long as the median of its peers for the same work "
        "(2.1 ms a batch of 8.0 rows, they 1 ms of 8.0)",
    )
    assert slowness_of(report) == {
        "ffn-0": pytest.approx(1 / 1.55),
        "ffn-1": pytest.approx(2.1),
        "ffn-2": pytest.approx(1 / 1.55),
    }


def test_workers_of_another_role_are_no_peers():
    attention = WorkerTotals("attention-0", "attention", (LayerTotal(1.0, 100, 800),))
    report = straggler_report([attention, ffn(0, 0.001)], 60.0)
    assert (slowness_of(report), report.findings) == ({"attention-0": None, "ffn-0": None}, NOTHING_STANDS_OUT)


@pytest.mark.parametrize("larger", [ffn(1, 0.002, rows=20), ffn(1, 0.001, rows=2)])
def test_other_sizes_of_batches_make_nobody_slow(larger):
    """A large batch takes longer, a row of a small one costs more."""
    assert straggler_report([ffn(0, 0.001), larger], 10.0).findings == NOTHING_STANDS_OUT


def test_a_worker_that_did_other_layers_is_measured_by_those():
    only_slow_layer = ffn(1, 0.0, 0.004)
    only_slow_layer = WorkerTotals("ffn-1", "ffn", (LayerTotal(), only_slow_layer.layers[1]))
    assert slowness_of(straggler_report([ffn(0, 0.001, 0.004), only_slow_layer], 60.0))[
        "ffn-1"
    ] == pytest.approx(1.0)


def test_a_few_batches_tell_nothing():
    few = [ffn(0, 0.001, batches=3), ffn(1, 0.01, batches=3)]
    assert straggler_report(few, 1.0).findings == NOTHING_STANDS_OUT
    assert straggler_report([ffn(0, 0.0, batches=0)], None).findings == ("nothing ran",)


def attention(*waited_s, calls=1000):
    waits = tuple(
        WaitTotal(f"ffn-{index}", calls, 0.1, 0.1, 0.2 + each_s) for index, each_s in enumerate(waited_s)
    )
    return WorkerTotals("attention-0", "attention", (LayerTotal(1.0, 1000, 8000),), waits)


def test_answers_that_come_late_are_told_although_computing_takes_no_longer():
    report = straggler_report([attention(0.1, 4.0, 0.2), ffn(0, 0.001), ffn(1, 0.001), ffn(2, 0.001)], 60.0)
    assert report.findings == (
        "answers of ffn-1 come late: its callers stand still for 4 ms a call beyond what it says that it took, "
        "for its peers 0.15 ms (its host is busy, it has more callers, or the way to it is slow)",
    )


@pytest.mark.parametrize(
    "waits", [attention(0.1, 2.0), attention(8.0, 20.0), attention(9.0), attention(0.1, 9.0, calls=5)]
)
def test_small_differences_of_waiting_tell_nothing(waits):
    assert straggler_report([waits], 60.0).findings == NOTHING_STANDS_OUT


def test_who_hardly_computes_holds_up_nobody():
    idle = [ffn(0, 0.001), ffn(1, 0.003)]
    assert straggler_report(idle, 60.0).findings == NOTHING_STANDS_OUT
    assert len(straggler_report(idle, 20.0).findings) == len(straggler_report(idle, None).findings) == 1


def test_a_slow_layer_is_named_and_dense_layers_are_not_compared_with_others():
    tokens = ((0, 0), (50, 50), (50, 50), (50, 50), (50, 50))
    report = straggler_report([ffn(0, 0.0002, 0.001, 0.001, 0.003, 0.001, tokens=tokens)], 60.0)
    assert report.findings == (
        "layer 3 is slow in the ffn workers: 3 ms a batch, 3.0 times the median of the layers like it",
    )
    assert [layer.slowness for layer in report.layers] == pytest.approx([1.0, 1.0, 1.0, 3.0, 1.0])


def test_few_batches_make_no_layer_slow():
    assert straggler_report([ffn(0, 0.001, 0.001, 0.009, batches=5)], 60.0).findings == NOTHING_STANDS_OUT


def test_experts_are_counted_over_replicas_and_shards_and_a_hot_one_is_named():
    totals = [
        ffn(0, 0.001, tokens=((100, 20),)),
        ffn(1, 0.001, tokens=((30, 10),), first_expert=2),
        ffn(2, 0.001, tokens=((200, 20),)),
        ffn(3, 0.001, tokens=((10, 10),), first_expert=2),
    ]
    report = straggler_report(totals, 60.0)
    assert report.expert_tokens == {0: (300, 40, 40, 20)}
    assert report.findings == (
        "expert 0 of layer 0 is hot: 3.0 times the mean of its layer (300 of 400 choices among 4 experts)",
    )
    assert [each.expert for each in report.hottest_experts] == [0, 1, 2, 3]
    assert report.load_histogram == (
        (0.25, 1), (0.5, 2), (0.75, 0), (1.0, 0), (1.5, 0), (2.0, 0), (4.0, 1), (None, 0)
    )  # fmt: skip


def test_layers_without_experts_have_no_load():
    assert expert_tokens([ffn(0, 0.001, 0.001, tokens=((0, 0), (3, 1)))]) == {1: (3, 1)}


def test_what_was_done_since_a_reading():
    wait = WaitTotal("ffn-0", 10, 1.0, 0.5, 2.0)
    before = WorkerTotals("attention-0", "attention", (LayerTotal(1.0, 10, 80),), (wait,), 0, ((5, 7),))
    now = WorkerTotals(
        "attention-0", "attention", (LayerTotal(1.5, 12, 90),),
        (WaitTotal("ffn-0", 13, 1.5, 0.75, 3.0), WaitTotal("ffn-1", 1, 1.0, 0.0, 1.0)), 0, ((6, 7),),
    )  # fmt: skip
    assert done_since(now, before) == WorkerTotals(
        "attention-0", "attention", (LayerTotal(0.5, 2, 10),),
        (WaitTotal("ffn-0", 3, 0.5, 0.25, 1.0), WaitTotal("ffn-1", 1, 1.0, 0.0, 1.0)), 0, ((1, 0),),
    )  # fmt: skip
    assert done_since(now, None) == now


@pytest.mark.parametrize(
    "before",
    [
        ffn(0, 0.001, batches=9),
        ffn(0, 0.002, batches=4),
        ffn(0, 0.001, batches=4, rows=99),
        ffn(0, 0.001, batches=4, tokens=((1, 2),)),
    ],
)
def test_a_worker_that_was_loaded_again_counts_from_nothing(before):
    now = ffn(0, 0.001, batches=5)
    assert done_since(now, before) == now


class Workers:
    """Whose totals are what the test says."""

    def __init__(self, *totals):
        self.totals = totals

    async def read(self):
        if isinstance(self.totals, Exception):
            raise self.totals
        return self.totals


@pytest.fixture
def registry():
    return CollectorRegistry()


async def watch_until(watch, condition, monkeypatch):
    monkeypatch.setattr(straggler_watch, "READ_EVERY_S", 0.001)
    task = asyncio.create_task(watch.run())
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
    task.cancel()


async def test_a_report_is_of_the_time_since_the_oldest_reading(registry, monkeypatch):
    workers = Workers(ffn(0, 0.1), ffn(1, 0.001))
    watch = StragglerWatch(workers.read, StragglerMetrics(registry, "m"))
    assert "ffn-0 is slow" in (await watch.report()).findings[0]
    assert (await watch.report()).seconds is None
    await watch_until(watch, lambda: watch._readings, monkeypatch)
    # Since then both have been as fast as one another.
    workers.totals = (
        WorkerTotals("ffn-0", "ffn", (LayerTotal(10.1, 200, 1600),)),
        WorkerTotals("ffn-1", "ffn", (LayerTotal(0.2, 200, 1600),)),
    )
    report = await watch.report()
    assert report.seconds is not None
    assert report.findings == NOTHING_STANDS_OUT


async def test_the_metrics_are_those_of_the_report_and_go_on_after_a_failure(registry, monkeypatch):
    workers = Workers(ffn(0, 0.004, tokens=((30, 10),)), ffn(1, 0.001))
    watch = StragglerWatch(workers.read, StragglerMetrics(registry, "m"))
    totals, workers.totals = workers.totals, RuntimeError("no Ray")
    failures = []
    monkeypatch.setattr(straggler_watch.logger, "exception", lambda *_: failures.append(1))

    def came():
        if failures:
            workers.totals = totals
        return watch._readings

    await watch_until(watch, came, monkeypatch)

    def value(name, **labels):
        return registry.get_sample_value(f"afd:{name}", {"model_name": "m", **labels})

    of_worker = {"worker": "ffn-0", "role": "ffn"}
    assert value("worker_slowness", **of_worker) == pytest.approx(4.0)
    assert value("worker_computing_seconds_total", **of_worker) == pytest.approx(0.4)
    assert (value("worker_batches_total", **of_worker), value("worker_rows_total", **of_worker)) == (100, 800)
    assert value("layer_seconds", role="ffn", layer="0") == pytest.approx(0.0025)
    assert value("expert_load_max", layer="0") == pytest.approx(1.5)


def test_a_worker_that_has_left_is_slow_no_more(registry):
    metrics = StragglerMetrics(registry, "m")
    both = [ffn(0, 0.004), ffn(1, 0.001)]
    metrics.observe(both, straggler_report(both, None))
    metrics.observe(both[1:], straggler_report(both[1:], None))
    assert (
        registry.get_sample_value("afd:worker_slowness", {"model_name": "m", "worker": "ffn-0", "role": "ffn"})
        is None
    )

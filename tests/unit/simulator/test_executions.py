"""Steps in simulated time: hop by hop as the pipeline predicts, whole as hop by hop, and what a lost FFN worker does to both."""

import pytest

from afd_server.engine.micro_batches import HopTimes, predict_step_s
from afd_server.errors import WorkerTimeoutError
from afd_server.simulator.hop_by_hop import HopByHop
from afd_server.simulator.lockstep import Lockstep
from afd_server.simulator.virtual_time import Events
from afd_server.simulator.whole_steps import WholeSteps
from tests.unit.simulator.scenarios import TIMES


def hop(rows=8, attention_s=2e-4):
    return HopTimes(rows, attention_s, TIMES.ffn_s(rows), 2 * TIMES.wire_s(rows))


class Steps:
    """Runs steps of an execution and keeps how they ended."""

    def __init__(self, kind, **fields):
        self.events = Events()
        self.execution = kind(self.events, TIMES, **fields)
        self.ended = {}

    def begin(self, replica, hops, at_s=0.0):
        self.execution.know([*self.ended, replica])
        self.ended[replica] = None
        self.events.at(at_s, lambda: self.execution.begin(replica, hops, 0.0, lambda e: self._note(replica, e)))

    def _note(self, replica, ended):
        self.ended[replica] = (self.events.now_s, ended)

    def run(self, until_s=1e6):
        self.events.run_until(until_s)
        return self


# Micro-batches that never wait for each other in the FFN, where their calls would be merged.
ALONE = [[hop()], [hop(attention_s=1e-3)] * 2, [hop(attention_s=1e-3)] * 3]


@pytest.mark.parametrize("kind", [HopByHop, WholeSteps, Lockstep])
@pytest.mark.parametrize("hops", ALONE, ids=len)
def test_a_step_alone_takes_what_the_pipeline_predicts(kind, hops):
    steps = Steps(kind)
    steps.begin(0, hops)
    ended_s, timing = steps.run().ended[0]
    assert ended_s == pytest.approx(predict_step_s(hops, TIMES.num_layers), rel=0.02)
    assert timing.total_s == pytest.approx(ended_s)
    assert timing.attention_s + timing.bubble_s == pytest.approx(ended_s)
    assert timing.num_micro_batches == len(hops)


@pytest.mark.parametrize("kind", [HopByHop, WholeSteps])
def test_micro_batches_that_meet_in_the_ffn_are_computed_together(kind):
    hops = [hop()] * 3
    steps = Steps(kind)
    steps.begin(0, hops)
    assert steps.run().ended[0][0] < 0.95 * predict_step_s(hops, TIMES.num_layers)


@pytest.mark.parametrize("kind", [HopByHop, WholeSteps])
def test_all_shards_are_as_slow_as_the_slowest(kind):
    steps = Steps(kind, num_shards=4, slowness={2: 3.0})
    steps.begin(0, [hop()])
    alone_s = predict_step_s([hop()], TIMES.num_layers)
    ended_s, _ = steps.run().ended[0]
    assert ended_s == pytest.approx(alone_s + 2 * TIMES.num_layers * TIMES.ffn_s(8), rel=0.02)


def test_calls_that_wait_for_one_layer_are_computed_together():
    """A first call keeps the worker busy while those of three other steps arrive; then one batch serves them all."""
    steps = Steps(HopByHop)
    steps.begin(0, [hop()])
    for replica in (1, 2, 3):
        steps.begin(replica, [hop()], at_s=1e-4 * replica)
    worker = steps.run().execution.workers[0]
    assert worker.num_calls == 4 * TIMES.num_layers
    assert worker.num_batches < worker.num_calls / 1.5


def test_replicas_of_the_ffn_side_share_its_callers():
    steps = Steps(HopByHop, num_shards=2, num_replicas=2)
    for replica in (0, 1):
        steps.begin(replica, [hop()])
    workers = steps.run().execution.workers
    assert [worker.num_calls for worker in workers.values()] == [TIMES.num_layers] * 4
    assert steps.ended[0][0] == steps.ended[1][0] == pytest.approx(predict_step_s([hop()], TIMES.num_layers))


@pytest.mark.parametrize("kind", [HopByHop, WholeSteps])
@pytest.mark.parametrize(("replicas", "waits"), [(1, True), (2, False)])
def test_without_a_lost_worker_a_step_waits_for_it_and_with_a_replica_goes_on_there(kind, replicas, waits):
    steps = Steps(kind, num_replicas=replicas)
    steps.begin(0, [hop()])
    alone_s = predict_step_s([hop()], TIMES.num_layers)
    steps.events.at(alone_s / 2, steps.execution.fail, 0)
    steps.events.at(10.0, steps.execution.restore, 0)
    ended_s, timing = steps.run().ended[0]
    if waits:
        assert 10.0 < ended_s < 10.0 + alone_s
    else:
        assert ended_s < 2 * alone_s
    assert timing.num_hops == TIMES.num_layers


@pytest.mark.parametrize("kind", [HopByHop, WholeSteps])
def test_a_worker_that_stays_away_ends_the_step_at_its_deadline(kind):
    steps = Steps(kind, timeout_s=5.0)
    steps.events.at(0.0, steps.execution.fail, 0)
    steps.begin(0, [hop()], at_s=1.0)
    ended_s, error = steps.run().ended[0]
    assert isinstance(error, WorkerTimeoutError)
    assert ended_s == pytest.approx(6.0, abs=0.05)


@pytest.mark.parametrize("kind", [HopByHop, WholeSteps])
def test_what_nobody_waits_for_any_more_ends_in_nothing(kind):
    steps = Steps(kind)
    steps.execution.know([0])
    step = steps.execution.begin(0, [hop()], 0.0, lambda ended: pytest.fail("it was cancelled"))
    steps.events.at(1e-3, step.cancel)
    steps.run()


@pytest.mark.parametrize("kind", [HopByHop, WholeSteps])
def test_a_larger_ffn_side_relieves_a_busy_one(kind):
    def ends_s(resize):
        steps = Steps(kind)
        if resize:
            steps.events.at(0.0, steps.execution.resize, 4)
        for replica in range(8):
            steps.begin(replica, [hop(200)], at_s=1e-4 * replica)
        steps.run()
        return max(ended[0] for ended in steps.ended.values())

    assert ends_s(resize=True) < 0.7 * ends_s(resize=False)


def test_in_lockstep_the_slowest_sets_the_pace_and_the_rows_of_all_are_one_call():
    steps = Steps(Lockstep)
    for replica, attention_s in enumerate((2e-4, 1e-3, 2e-4)):
        steps.begin(replica, [hop(8, attention_s)])
    steps.run()
    common = HopTimes(24, 1e-3, TIMES.ffn_s(24), 2 * TIMES.wire_s(8))
    assert [ended[0] for ended in steps.ended.values()] == [
        pytest.approx(predict_step_s([common], TIMES.num_layers))
    ] * 3

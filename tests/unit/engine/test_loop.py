"""The thread of a replica: requests in, updates out, from any thread, whatever happens on the way."""

import queue
import threading
import time

import pytest

from afd_server.engine.engine import Engine
from afd_server.engine.loop import EngineLoop
from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.scheduler import Scheduler
from afd_server.engine.step_time import StepTimeModel
from afd_server.errors import UnavailableError
from afd_server.kvcache.block_pool import BlockAccountError
from afd_server.types import GenerationRequest, SamplingParams
from tests.unit.engine.toy_worker import ToyWorker, continuation, small_config

DEADLINE_S = 20.0


class GatedWorker(ToyWorker):
    """Each step waits at a gate, which is open unless a test closes it."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def execute(self, plan):
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        return super().execute(plan)


class Running:
    """A loop over a toy worker, and the updates that it gave."""

    def __init__(self, **worker):
        self.worker = GatedWorker(small_config(), **worker)
        self.scheduler = Scheduler(small_config(), num_blocks=16, eos_token_ids=())
        self.updates = queue.Queue()
        engine = Engine(self.worker, self.scheduler, MicroBatchChooser("1"), StepTimeModel())
        self.preparing = queue.Queue()
        self.loop = EngineLoop(engine, self.updates.put, lambda request, then: self.preparing.put(then))

    def submit(self, request_id, *prompt, **sampling):
        self.loop.submit(
            GenerationRequest(request_id, prompt or (1,), SamplingParams(**{"max_tokens": 5, **sampling}))
        )

    def until_end(self, *request_ids):
        """The outputs up to the end of all these requests, and the last update."""
        outputs, waiting = [], set(request_ids)
        while waiting:
            update = self.updates.get(timeout=DEADLINE_S)
            outputs += update.outputs
            waiting -= {output.request_id for output in update.outputs if output.finish_reason}
        return outputs, update


@pytest.fixture
def running():
    started = []

    def start(**worker):
        started.append(Running(**worker))
        return started[-1]

    yield start
    for each in started:
        each.worker.gate.set()
        each.loop.stop()


def test_requests_from_many_threads_all_end(running):
    replica = running()
    names = [str(index) for index in range(12)]
    threads = [threading.Thread(target=replica.submit, args=(name, int(name))) for name in names]
    for thread in threads:
        thread.start()
    outputs, last = replica.until_end(*names)
    for name in names:
        tokens = [token for output in outputs if output.request_id == name for token in output.token_ids]
        assert tokens == continuation([int(name)], SamplingParams(5, ignore_eos=True), 32)[0]
    assert (last.stats.num_running, last.stats.num_free_blocks) == (0, 16)


def test_an_abort_ends_a_request_within_a_step(running):
    replica = running()
    replica.worker.gate.clear()
    replica.submit("a", max_tokens=20)
    assert replica.worker.entered.wait(DEADLINE_S)
    replica.loop.abort("a")
    replica.worker.gate.set()
    outputs, last = replica.until_end("a")
    assert [output.finish_reason for output in outputs] == [None, "abort"]
    assert last.stats.num_free_blocks == 16
    assert len(replica.worker.plans) == 1


def test_it_wakes_up_again_after_being_idle(running):
    replica = running()
    for name in ("a", "b"):
        replica.submit(name)
        replica.until_end(name)


def test_a_bug_in_a_step_ends_its_requests_and_nothing_else(running):
    replica = running(failing_steps=[1], error=ZeroDivisionError("oh"))
    replica.submit("a")
    assert "ZeroDivisionError" in replica.until_end("a")[0][-1].error
    replica.submit("b")
    assert replica.until_end("b")[0][-1].finish_reason == "length"


def test_a_listener_that_raises_does_not_stop_it(running):
    replica = running()
    deliver, failed = replica.updates.put, threading.Event()

    def fail_once(update):
        if not failed.is_set():
            failed.set()
            raise OSError("nobody there")
        deliver(update)

    replica.loop._on_update = fail_once
    replica.submit("a")
    replica.until_end("a")
    assert failed.is_set()


def test_stop_waits_for_the_step_and_ends_the_rest(running):
    replica = running()
    replica.worker.gate.clear()
    replica.submit("a", max_tokens=20)
    assert replica.worker.entered.wait(DEADLINE_S)
    replica.submit("b")
    stopper = threading.Thread(target=replica.loop.stop)
    stopper.start()
    replica.worker.gate.set()
    stopper.join(DEADLINE_S)
    assert not stopper.is_alive()
    ends = {output.request_id: output.finish_reason for output in replica.until_end("a", "b")[0]}
    assert ends == {"a": "abort", "b": "abort"}
    with pytest.raises(UnavailableError):
        replica.submit("c")


def test_a_lost_block_is_reported_when_it_becomes_idle(running, caplog):
    replica = running()
    checked = threading.Event()
    check = replica.scheduler.check

    def and_tell():
        try:
            check()
        finally:
            checked.set()

    replica.scheduler.check = and_tell
    replica.scheduler._pool.allocate(1)
    replica.submit("a")
    replica.until_end("a")
    assert checked.wait(DEADLINE_S)
    replica.loop.stop()
    assert any(record.exc_info and record.exc_info[0] is BlockAccountError for record in caplog.records)


def test_it_is_busy_from_the_beginning_of_a_step_to_its_end_and_not_while_it_sleeps(running):
    machine = running()
    worker, loop = machine.worker, machine.loop
    machine.submit("a", 1, 2)
    machine.until_end("a")
    deadline = time.monotonic() + DEADLINE_S
    while loop.busy_since is not None:  # the update comes a moment before it sleeps
        assert time.monotonic() < deadline
        time.sleep(0.001)
    worker.gate.clear()
    worker.entered.clear()
    machine.submit("b", 3)
    assert worker.entered.wait(DEADLINE_S)
    began = loop.busy_since
    assert began is not None
    assert loop.busy_since == began
    worker.gate.set()
    machine.until_end("b")


def test_a_request_waits_for_its_grammar_and_nobody_waits_for_it(running):
    replica = running()
    replica.submit("bound", constraint="x")
    replica.submit("free")
    assert {output.request_id for output in replica.until_end("free")[0]} == {"free"}
    replica.preparing.get(timeout=DEADLINE_S)("")
    outputs, _ = replica.until_end("bound")
    assert [token for output in outputs for token in output.token_ids] == continuation(
        [1], SamplingParams(5, ignore_eos=True), 32
    )[0]


def test_a_grammar_that_is_wrong_ends_its_request(running):
    replica = running()
    replica.submit("a", constraint="x")
    replica.preparing.get(timeout=DEADLINE_S)("it is wrong")
    ((output,), _) = replica.until_end("a")
    assert (output.finish_reason, output.error) == ("error", "it is wrong")
    assert replica.worker.plans == []


def test_a_request_may_be_aborted_and_sent_again_while_its_grammar_is_compiled(running):
    replica = running()
    replica.submit("a", constraint="x")
    first = replica.preparing.get(timeout=DEADLINE_S)
    replica.loop.abort("a")
    assert replica.until_end("a")[0][0].finish_reason == "abort"
    replica.submit("a", constraint="x")
    second = replica.preparing.get(timeout=DEADLINE_S)
    first("too late to matter")
    second("")
    assert replica.until_end("a")[0][-1].finish_reason == "length"


def test_requests_whose_grammars_are_compiled_end_with_the_loop(running):
    replica = running()
    replica.submit("a", constraint="x")
    replica.loop.stop()
    assert replica.until_end("a")[0][0].finish_reason == "abort"
    replica.preparing.get(timeout=DEADLINE_S)("")

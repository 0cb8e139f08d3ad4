"""A step of the engine, whole: what its update says, and what an error leaves behind."""

import logging
import time

import pytest

from afd_server.engine.engine import Engine
from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.scheduler import Scheduler
from afd_server.engine.step_time import StepTimeModel
from afd_server.types import GenerationRequest, SamplingParams
from tests.unit.engine.toy_worker import ToyWorker, small_config


def make_engine(**worker):
    config = small_config()
    toy = ToyWorker(config, **worker)
    return Engine(
        toy, Scheduler(config, num_blocks=16, eos_token_ids=()), MicroBatchChooser("2"), StepTimeModel()
    ), toy


def request(request_id, *prompt, **sampling):
    return GenerationRequest(request_id, prompt or (1,), SamplingParams(**{"max_tokens": 2, **sampling}))


def test_an_update_carries_outputs_statistics_and_times():
    engine, toy = make_engine()
    assert engine.submit(request("a")) == engine.submit(request("b")) == []
    update = engine.step()
    assert [output.request_id for output in update.outputs] == ["a", "b"]
    assert (update.stats.num_running, update.stats.num_free_blocks, update.stats.timing.num_micro_batches) == (
        2,
        14,
        2,
    )
    assert engine.stats().timing is None
    assert [plan.step for plan in toy.plans] == [1]


def test_a_refused_request_ends_at_once_with_the_reason():
    engine, _ = make_engine()
    engine.submit(request("a"))
    (output,) = engine.submit(request("a"))
    assert (output.finish_reason, output.error) == ("error", "request id a is in use already")
    assert engine.step().outputs[0].finish_reason is None


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (None, "worker ffn-0, layer 1: broken"),
        (ZeroDivisionError("oh"), "internal error: ZeroDivisionError: oh"),
    ],
)
def test_a_failed_step_ends_its_requests_and_the_next_one_runs(error, sentence, caplog):
    engine, _ = make_engine(failing_steps=[1], error=error)
    engine.submit(request("a"))
    with caplog.at_level(logging.ERROR):
        (output,) = engine.step().outputs
    assert (output.finish_reason, output.error) == ("error", sentence)
    assert caplog.records
    engine.submit(request("b"))
    assert engine.step().outputs[0].request_id == "b"
    engine.check()


def test_a_worker_that_answers_for_other_requests_is_found_out():
    engine, toy = make_engine()
    engine.submit(request("a"))
    toy.execute = lambda plan: type(toy).execute(toy, plan).__class__(plan.step, (), None)
    (output,) = engine.step().outputs
    assert "other requests" in output.error
    engine.check()
    assert not engine.has_work


def test_the_first_output_tells_how_long_the_request_has_been_in_steps():
    engine, _ = make_engine()
    engine.submit(request("long", *range(1, 12), max_tokens=3))
    began = time.perf_counter()
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
    assert 0 < outputs[0].prefill_s <= time.perf_counter() - began
    assert [output.prefill_s for output in outputs[1:]] == [0, 0]
    engine.submit(request("left"))
    engine.abort("left")
    assert not engine._reading

"""The models of step time after a profile: they know what it says, and unlearn it where the steps say otherwise."""

import pytest

from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.profiled import profiled_model, tell_chooser
from afd_server.engine.step_time import StepWork
from afd_server.planner.times import AttentionTimes, FFNTimes, LayerTimes, LinearTimes
from afd_server.types import StepTiming

TIMES = LayerTimes(
    8,
    AttentionTimes(fixed_s=1e-4, compute_row_s=2e-5, weights_s=1e-4, context_token_s=2e-7, chunk_pair_s=2e-9),
    FFNTimes(expert_s=5e-5, num_experts=16, chosen_share=0.25, compute_row_s=2e-5),
    LinearTimes(2e-5, 1e-6),
    LinearTimes(1e-3, 1e-5),
)


@pytest.fixture
def model():
    return profiled_model(TIMES, 64, 2048)


@pytest.mark.parametrize("requests", [1, 4, 16, 64])
@pytest.mark.parametrize("context", [128, 2048])
def test_predictions_are_the_profiles_before_any_step(model, requests, context):
    predicted_s = model.predict_s(StepWork(requests, requests * context, 0, requests))
    assert predicted_s == pytest.approx(TIMES.step_s(requests, requests * context), rel=0.01)


def test_what_really_runs_outweighs_the_profile(model):
    work = StepWork(16, 16 * 128, 0, 16)
    twice_s = 2 * TIMES.step_s(16, 16 * 128)
    for _ in range(60):
        model.observe(work, twice_s)
    assert model.predict_s(work) == pytest.approx(twice_s, rel=0.1)


def test_prompts_are_known_too(model):
    work = StepWork.part(256, 512, True)
    expected_s = TIMES.layers_s(512, 0, work.chunk_pairs) + TIMES.step_overhead_s(1)
    assert model.predict_s(work) == pytest.approx(expected_s, rel=0.05)


def test_one_odd_step_does_not_shake_it(model):
    work = StepWork(16, 16 * 2048, 0, 16)
    before_s = model.predict_s(work)
    model.observe(StepWork(16, 16 * 128, 0, 16), 2.5 * TIMES.step_s(16, 16 * 128))
    assert model.predict_s(StepWork(4, 4 * 2048, 0, 4)) == pytest.approx(TIMES.step_s(4, 4 * 2048), rel=0.25)
    assert model.predict_s(work) >= before_s * 0.9


def test_the_chooser_tries_several_micro_batches_where_the_profile_promises_much():
    # Two sides that take as long as one another, and nothing read twice: half the time is to be had.
    alike = LayerTimes(8, AttentionTimes(compute_row_s=1e-4), FFNTimes(compute_row_s=1e-4))
    untold, told = MicroBatchChooser("auto"), MicroBatchChooser("auto")
    tell_chooser(alike, told, 64)
    step = StepTiming(8 * 64 * 2e-4, attention_s=8 * 64e-4, ffn_s=8 * 64e-4, num_hops=8, num_tokens=64)
    tried = {chooser: set() for chooser in (untold, told)}
    for chooser, numbers in tried.items():
        for _ in range(12):
            numbers.add(chooser.choose([1] * 64))
            chooser.observe(step)
    assert tried[untold] == {1}
    assert len(tried[told]) > 1

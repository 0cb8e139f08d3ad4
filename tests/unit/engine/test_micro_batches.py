"""The division of a step and the choice of how many parts: checked against times that are made by formula."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.engine.micro_batches import (
    MAX_MICRO_BATCHES,
    STEPS_PER_DECISION,
    STEPS_PER_REFRESH,
    HopTimes,
    MicroBatchChooser,
    divide,
    predict_step_s,
)
from afd_server.types import StepTiming

NUM_LAYERS = 10


class Machine:
    """Runs steps in simulated time. Per hop: attention and FFN read weights, then work per token; seconds.

    contention: by how much overlapping slows both sides down, as when they share a processor.
    """

    def __init__(self, *, weights_s=0.0, token_s=1e-3, wire_s=1e-4, contention=1.0):
        self.weights_s, self.token_s, self.wire_s = weights_s, token_s, wire_s
        self.contention = contention

    def run(self, num_tokens, num_micro_batches):
        slow = self.contention if num_micro_batches > 1 else 1.0
        loads = [sum(num_tokens[index] for index in part) for part in divide(num_tokens, num_micro_batches)]
        hops = [HopTimes(n, *[slow * (self.weights_s + n * self.token_s)] * 2, self.wire_s) for n in loads]
        total_s = predict_step_s(hops, NUM_LAYERS)
        attention_s = NUM_LAYERS * sum(hop.attention_s for hop in hops)
        return StepTiming(
            total_s=total_s,
            attention_s=attention_s,
            bubble_s=total_s - attention_s,
            ffn_s=NUM_LAYERS * sum(hop.ffn_s for hop in hops),
            wire_s=NUM_LAYERS * self.wire_s * len(hops),
            num_hops=NUM_LAYERS * len(hops),
            num_micro_batches=len(hops),
            num_tokens=sum(num_tokens),
        )


def warmed_up(machine, largest=64):
    chooser = MicroBatchChooser("auto")
    size = 1
    while size <= largest:
        chooser.observe(machine.run([1] * size, 1))
        size *= 2
    return chooser


def run_steps(chooser, machine, num_tokens, steps):
    choices = []
    for _ in range(steps):
        choices.append(chooser.choose(num_tokens))
        chooser.observe(machine.run(num_tokens, choices[-1]))
    return choices


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, MAX_MICRO_BATCHES))
def test_each_request_goes_into_one_micro_batch_and_none_is_empty(num_tokens, most):
    parts = divide(num_tokens, min(most, len(num_tokens)))
    assert sorted(index for part in parts for index in part) == list(range(len(num_tokens)))
    assert all(parts)
    loads = [sum(num_tokens[index] for index in part) for part in parts]
    assert max(loads) - min(loads) <= max(num_tokens)


def test_one_micro_batch_takes_attention_ffn_and_wire_in_turn():
    assert predict_step_s([HopTimes(1, 3.0, 2.0, 1.0)], num_layers=10) == pytest.approx(10 * (3 + 2 + 1))


def test_two_equal_sides_overlap_but_for_the_ends():
    """Attention 11 pieces of 10/11 per micro-batch, one FFN answer in front of the last piece: see the formula."""
    predicted = predict_step_s([HopTimes(1, 1.0, 1.0, 0.0)] * 2, num_layers=10)
    assert 20 < predicted < 22


def test_without_measurements_there_is_one_micro_batch():
    assert MicroBatchChooser("auto").choose([1] * 64) == 1
    chooser = MicroBatchChooser("auto")
    chooser.observe(Machine().run([1] * 64, 1))
    assert chooser.choose([1] * 64) == 1


def test_a_fixed_number_is_bounded_by_the_requests():
    chooser = MicroBatchChooser("3")
    assert [chooser.choose([1] * count) for count in (1, 2, 3, 9)] == [1, 2, 3, 3]


def test_work_that_grows_with_the_tokens_is_overlapped():
    machine = Machine()
    assert warmed_up(machine).choose([1] * 64) > 1


def test_never_more_than_there_are_requests():
    assert warmed_up(Machine()).choose([32, 32]) == 2
    assert warmed_up(Machine()).choose([64]) == 1


def test_reading_weights_again_is_not_worth_it():
    machine = Machine(weights_s=5e-2, token_s=1e-6)
    chooser = warmed_up(machine)
    assert [chooser.choose([1] * count) for count in (2, 8, 64)] == [1, 1, 1]


def test_the_change_comes_with_the_number_of_tokens():
    machine = Machine(weights_s=5e-2, token_s=1e-3)
    chooser = warmed_up(machine)
    assert chooser.choose([1] * 2) == 1
    assert chooser.choose([1] * 64) > 1


def test_a_longer_wire_takes_more_micro_batches_to_hide():
    choices = [warmed_up(Machine(wire_s=wire_s)).choose([1] * 8) for wire_s in (0.0, 8e-3)]
    assert choices == [2, 4]


def test_one_long_prompt_among_decodes_is_not_divided_for_nothing():
    assert warmed_up(Machine(weights_s=1e-3), largest=1024).choose([1000, 1, 1, 1]) == 1


def test_an_unknown_size_is_measured_first():
    machine = Machine()
    chooser = warmed_up(machine, largest=16)
    assert chooser.choose([100] * 8) == 1
    chooser.observe(machine.run([100] * 8, 1))
    assert run_steps(chooser, machine, [100] * 8, STEPS_PER_DECISION + 1)[-1] > 1


def test_between_and_a_little_above_the_measured_sizes_times_go_on_growing():
    machine, chooser = Machine(), MicroBatchChooser("auto")
    for size in (1, 33):
        chooser.observe(machine.run([1] * size, 1))
    assert chooser.choose([1] * 20) > 1
    assert chooser.choose([1] * 64) > 1


def test_overlap_that_does_not_pay_here_is_given_up():
    """Predicted to pay, but both sides share one processor: seen after a few steps, and not tried for long."""
    machine = Machine(contention=2.5)
    choices = run_steps(warmed_up(machine), machine, [1] * 64, 20 * STEPS_PER_DECISION)
    assert choices[0] > 1
    assert set(choices[-STEPS_PER_DECISION:]) == {1}


def test_the_times_of_one_micro_batch_are_measured_again_now_and_then():
    machine = Machine()
    choices = run_steps(warmed_up(machine), machine, [1] * 64, STEPS_PER_REFRESH + 2 * STEPS_PER_DECISION)
    assert choices[0] > 1
    assert 1 in choices
    assert choices.count(1) <= STEPS_PER_DECISION

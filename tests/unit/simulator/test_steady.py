"""Steady decoding: one worker alone takes what the model of times says, undivided cards what they take in lockstep."""

import pytest

from afd_server.simulator.steady import Load, divided_step_s, merged_step_s, undivided_step_s
from tests.unit.simulator.scenarios import TIMES


def test_one_worker_alone_takes_what_the_times_say():
    assert divided_step_s(TIMES, 1, Load(32, 100, 1)) == pytest.approx(TIMES.step_s(32, 3200))


def test_company_delays_a_step_but_merged_calls_let_nobody_wait_for_all_others():
    alone_s = divided_step_s(TIMES, 1, Load(8, 100, 1))
    crowded_s = divided_step_s(TIMES, 10, Load(8, 100, 1))
    assert alone_s < crowded_s < alone_s + 9 * TIMES.num_layers * TIMES.ffn_s(8)


def test_undivided_cards_compute_one_thing_at_a_time_and_read_the_experts_once_for_all():
    load = Load(8, 100, 1)
    layer_s = TIMES.attention_s(8, 800) + TIMES.ffn_s(32) + 2 * TIMES.wire_s(8)
    assert undivided_step_s(TIMES, 4, load) == pytest.approx(
        TIMES.num_layers * layer_s + TIMES.step_overhead_s(8)
    )


def test_two_micro_batches_hide_the_wire_of_undivided_cards_and_nothing_else():
    layer_s = 2 * (TIMES.attention_s(4, 400) + TIMES.ffn_s(16))
    assert undivided_step_s(TIMES, 4, Load(8, 100, 2)) == pytest.approx(
        TIMES.num_layers * layer_s + TIMES.step_overhead_s(8)
    )


def test_workers_whose_calls_always_meet_are_faster_than_those_in_random_phases():
    load = Load(8, 100, 1)
    assert merged_step_s(TIMES, 1, load) == pytest.approx(divided_step_s(TIMES, 1, load))
    assert merged_step_s(TIMES, 8, load) < divided_step_s(TIMES, 8, load)

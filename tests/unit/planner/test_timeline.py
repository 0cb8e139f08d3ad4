"""A step played through: nobody is in two places, no lane serves two, and the pipeline does what it is for."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.pipeline import hop_order
from afd_server.planner.timeline import LANES, HopTimes, least_step_s, play_step, step_s

seconds = st.floats(0.01, 1)
times = st.builds(HopTimes, seconds, seconds, seconds, st.floats(0, 0.1))


@settings(deadline=None, max_examples=60)
@given(times, st.integers(1, 4), st.integers(1, 12))
def test_pieces_neither_overlap_in_a_lane_nor_in_a_micro_batch(hop, micro_batches, layers):
    pieces = play_step(hop, micro_batches, layers)
    assert len(pieces) == 4 * micro_batches * layers
    for lane in LANES:
        mine = sorted((p.start_s, p.end_s) for p in pieces if p.lane == lane)
        assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(mine))
    for batch in range(micro_batches):
        mine = sorted((p.start_s, p.end_s) for p in pieces if p.micro_batch == batch)
        assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(mine))


@settings(deadline=None, max_examples=60)
@given(times, st.integers(1, 4), st.integers(1, 12))
def test_attention_works_in_the_servers_hop_order(hop, micro_batches, layers):
    mine = sorted(
        (p for p in play_step(hop, micro_batches, layers) if p.lane == "attention"), key=lambda p: p.start_s
    )
    assert [(p.micro_batch, p.layer) for p in mine] == list(hop_order(micro_batches, layers - 1))


@settings(deadline=None, max_examples=60)
@given(times, st.integers(1, 4), st.integers(1, 40))
def test_no_step_beats_its_bound_and_one_micro_batch_meets_it(hop, micro_batches, layers):
    assert step_s(hop, micro_batches, layers) >= least_step_s(hop, micro_batches, layers) * (1 - 1e-9)
    assert step_s(hop, 1, layers) == pytest.approx(layers * hop.pass_s)


@settings(deadline=None, max_examples=30)
@given(times, st.integers(1, 4), st.integers(25, 80))
def test_a_long_step_is_as_long_as_when_all_of_it_is_played(hop, micro_batches, layers):
    played = max(piece.end_s for piece in play_step(hop, micro_batches, layers)) + hop.latency_s
    assert step_s(hop, micro_batches, layers) == pytest.approx(played, rel=0.02)


def test_three_micro_batches_hide_three_equal_stages_behind_each_other():
    # Attention, wire (both ways) and FFN take as long as one another: 3 are in flight, none waits.
    hop = HopTimes(attention_s=1.0, wire_s=0.5, ffn_s=1.0)
    assert step_s(hop, 1, 10) == pytest.approx(30)
    assert step_s(hop, 3, 10) < 3 * 10 * 1.25

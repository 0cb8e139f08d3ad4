"""Times of a layer: more work never takes less, experts are read once, and a shard has its part."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.planner.times import AttentionTimes, FFNTimes, LayerTimes, LinearTimes

coefficients = st.floats(0, 1, allow_subnormal=False)
counts = st.integers(1, 10_000)


@settings(deadline=None, max_examples=50)
@given(st.builds(AttentionTimes, *[coefficients] * 6, counts, coefficients), counts, counts, counts, counts)
def test_attention_never_gets_faster_with_more_work(times, rows, more_rows, context, more_context):
    fewer = times.seconds(rows, context)
    assert fewer <= times.seconds(rows + more_rows, context) * (1 + 1e-9)
    assert fewer <= times.seconds(rows, context + more_context) * (1 + 1e-9)
    # Each further cache entry costs the same.
    step_s = times.seconds(rows, context + 1) - fewer
    assert times.seconds(rows, context + more_context) - fewer == pytest.approx(
        more_context * step_s, rel=1e-3, abs=1e-6
    )


def experts(num_experts=48, top_k=3, **other):
    return FFNTimes(expert_s=1.0, num_experts=num_experts, chosen_share=top_k / num_experts, **other)


def test_one_row_reads_its_experts_only():
    assert experts().seconds(1) == pytest.approx(3)
    assert experts(shared_s=0.5).seconds(1) == pytest.approx(3.5)


def test_many_rows_read_every_expert_once():
    assert experts().seconds(1000) == pytest.approx(48)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 8))
def test_rows_read_at_most_what_they_choose(rows, num_experts, top_k):
    top_k = min(top_k, num_experts)
    read = experts(num_experts, top_k).experts_read(rows)
    assert top_k * (1 - 1e-9) <= read <= min(num_experts, rows * top_k) * (1 + 1e-9)


def test_arithmetic_counts_once_it_takes_longer_than_reading():
    times = experts(compute_row_s=1.0)
    assert times.seconds(40) < 48
    assert times.seconds(100) == pytest.approx(100)


def test_expert_shards_divide_the_experts_and_tensor_shards_the_matrices():
    whole = experts(dense_s=4.0, shared_s=2.0, compute_row_s=0.1)
    by_experts, by_matrix = whole.shard(4, 1), whole.shard(1, 4)
    assert by_experts.seconds(1000) == pytest.approx(max(1 + 2 + 12, 25))
    assert by_experts.experts_read(1) == pytest.approx(3 / 4)
    assert by_matrix.seconds(10) == pytest.approx(whole.seconds(10) / 4)


def test_a_step_is_its_layers_and_what_comes_once():
    times = LayerTimes(3, AttentionTimes(fixed_s=1), FFNTimes(fixed_s=2), LinearTimes(0.5), LinearTimes(7, 1))
    assert times.step_s(2, 0) == 3 * (1 + 2 + 2 * 0.5) + 7 + 2

"""The steps of a profile: within what the cache and the model hold, and such that an attention worker takes them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.profiling.grid import Plans, Point, points


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 256), st.integers(1, 4096), st.integers(32, 40_000), st.integers(64, 10**6))
def test_points_fit_what_there_is(max_requests, max_tokens, max_context, cache_tokens):
    for point in points(max_requests, max_tokens, max_context, cache_tokens):
        assert point.requests <= max_requests
        assert point.rows <= max_tokens
        assert point.context + point.new_tokens < max_context
        assert point.requests * (point.context + point.new_tokens) <= cache_tokens


def test_the_grid_has_several_of_everything():
    grid = points(64, 2048, 8192, 100_000)
    assert {point.requests for point in grid} == {1, 2, 4, 8, 16, 32, 64}
    assert len({point.context for point in grid if point.requests == 16}) >= 3
    assert {point.new_tokens for point in grid} == {1, 128, 512}


@pytest.mark.parametrize("point", [Point(3, 1, 40), Point(1, 128, 512)])
def test_plans_of_a_visit_go_on_where_the_one_before_ended(point):
    plans = list(Plans(1000, 16).visit(point))
    names = [tuple(request.request_id for request in plan.micro_batches[0]) for plan in plans]
    assert set(names) == {names[0]}
    assert [plan.micro_batches[0][0].start_position for plan in plans] == [
        point.context + n for n in range(len(plans))
    ]
    assert [len(plan.started) for plan in plans] == [point.requests] + [0] * (len(plans) - 1)
    blocks = [block for request in plans[0].micro_batches[0] for block in request.block_table]
    assert len(blocks) == len(set(blocks))
    last = plans[-1].micro_batches[0][0]
    assert len(last.block_table) * 16 >= last.start_position + len(last.token_ids)


def test_requests_of_the_visit_before_are_given_back():
    plans = Plans(1000, 16)
    *_, first = plans.visit(Point(2, 1, 16))
    second = next(plans.visit(Point(1, 1, 16)))
    assert second.finished == tuple(request.request_id for request in first.micro_batches[0])
    assert second.step > first.step


def test_work_of_a_point_is_counted_as_the_scheduler_counts_it():
    assert (Point(4, 1, 99).context_tokens, Point(4, 1, 99).chunk_pairs) == (400, 0)
    assert (Point(1, 128, 512).context_tokens, Point(1, 128, 512).chunk_pairs) == (0, 128 * 512 + 128 * 129 / 2)

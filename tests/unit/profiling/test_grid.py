"""The steps of a profile: within what the cache and the model hold, and such that an attention worker takes them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.profiling.grid import VISIT_STEPS, Plans, Point, blocks_of, points


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 256), st.integers(1, 4096), st.integers(32, 40_000), st.integers(4, 10**5))
def test_points_fit_what_there_is(max_requests, max_tokens, max_context, num_blocks):
    for point in points(max_requests, max_tokens, max_context, num_blocks=num_blocks, block_size=16):
        assert point.requests <= max_requests
        assert point.rows <= max_tokens
        assert point.context + point.new_tokens < max_context
        requests = Plans(1000, 16).first(point).micro_batches[0]
        assert max(block for request in requests for block in request.block_table) < num_blocks


def test_the_grid_has_several_of_everything():
    grid = points(64, 2048, 8192, num_blocks=6250, block_size=16)
    assert {point.requests for point in grid} == {1, 2, 4, 8, 16, 32, 64}
    assert len({point.context for point in grid if point.requests == 16}) >= 3
    assert {point.new_tokens for point in grid} == {1, 128, 512}


@pytest.mark.parametrize("point", [Point(3, 1, 40), Point(1, 128, 512)])
def test_a_step_goes_on_where_the_one_before_ended(point):
    plans = Plans(1000, 16)
    first = plans.first(point)
    names = [request.request_id for request in first.micro_batches[0]]
    second = plans.following(first, {name: 7 + index for index, name in enumerate(names)})
    assert [request.request_id for request in second.micro_batches[0]] == names
    assert [request.token_ids for request in second.micro_batches[0]] == [
        (7 + index,) for index in range(point.requests)
    ]
    assert {request.start_position for request in second.micro_batches[0]} == {point.context + point.new_tokens}
    assert (len(first.started), len(second.started)) == (point.requests, 0)


@pytest.mark.parametrize("point", [Point(3, 1, 40), Point(1, 128, 512)])
def test_requests_have_blocks_of_their_own_for_all_steps(point):
    requests = Plans(1000, 16).first(point).micro_batches[0]
    blocks = [block for request in requests for block in request.block_table]
    assert sorted(blocks) == list(range(point.requests * blocks_of(point, 16)))
    assert len(requests[0].block_table) * 16 >= point.context + point.new_tokens + VISIT_STEPS


def test_requests_of_the_visit_before_are_given_back():
    plans = Plans(1000, 16)
    first, second = plans.first(Point(2, 1, 16)), plans.first(Point(1, 1, 16))
    assert second.finished == tuple(request.request_id for request in first.micro_batches[0])
    assert second.step > first.step


def test_work_of_a_point_is_counted_as_the_scheduler_counts_it():
    assert (Point(4, 1, 99).context_tokens, Point(4, 1, 99).chunk_pairs) == (400, 0)
    assert (Point(1, 128, 512).context_tokens, Point(1, 128, 512).chunk_pairs) == (0, 128 * 512 + 128 * 129 / 2)

"""The tensors of a micro-batch, from the scheduler's words."""

import pytest
import torch

from afd_server.models import batch as batch_module
from afd_server.models.batch import AttentionBatch
from afd_server.types import ScheduledRequest

CPU = torch.device("cpu")


def test_rows_slots_and_tables():
    batch = AttentionBatch.build(
        [
            ScheduledRequest("chunk", 2, (10, 11, 12), (7, 5, 9), samples=False),
            ScheduledRequest("decode", 4, (20,), (3, 2), samples=True),
            ScheduledRequest("first", 0, (30,), (6,), samples=True),
            ScheduledRequest("prompt", 0, (40, 41), (1,), samples=True),
        ],
        block_size=4,
        device=CPU,
    )
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 30, 40, 41]
    assert batch.positions.tolist() == [2, 3, 4, 4, 0, 0, 1]
    assert batch.slots.tolist() == [7 * 4 + 2, 7 * 4 + 3, 5 * 4, 2 * 4, 6 * 4, 4, 5]
    assert batch.sampled_rows.tolist() == [3, 4, 6]
    (group,) = batch.singles
    assert group.rows.tolist() == [3, 4]
    assert group.block_tables.tolist() == [[3, 2], [6, 0]]
    assert group.visible.tolist() == [[True] * 5 + [False] * 3, [True] + [False] * 7]
    chunk, prompt = batch.chunks
    assert (chunk.start, chunk.stop, chunk.length, chunk.block_table.tolist()) == (0, 3, 5, [7, 5])
    assert (prompt.start, prompt.stop, prompt.length, prompt.block_table.tolist()) == (5, 7, 2, [1])


def test_nothing_sampled():
    batch = AttentionBatch.build([ScheduledRequest("a", 0, (1, 2), (0,), samples=False)], 4, CPU)
    assert batch.sampled_rows.shape == (0,)
    assert batch.singles == ()


def test_a_table_that_is_too_short_is_a_programmers_error():
    with pytest.raises(AssertionError, match="short"):
        AttentionBatch.build([ScheduledRequest("short", 3, (1, 2), (0,), samples=True)], 4, CPU)


def groups_of(lengths, block_size=4):
    """The groups of requests with these many tokens each, and the blocks that each of the requests has."""
    num_blocks = [-(-length // block_size) for length in lengths]
    requests = [
        ScheduledRequest(str(row), length - 1, (1,), tuple(range(num_blocks[row])), samples=True)
        for row, length in enumerate(lengths)
    ]
    return AttentionBatch.build(requests, block_size, CPU).singles, num_blocks


def test_requests_of_similar_lengths_are_one_group():
    (group,), _ = groups_of([90, 40, 100, 64, 52])
    assert group.rows.tolist() == [0, 1, 2, 3, 4]
    assert group.block_tables.shape == (5, 25)


def test_a_long_request_does_not_make_the_short_ones_long():
    groups, _ = groups_of([7, 8, 1000, 5, 900, 6])
    assert [group.rows.tolist() for group in groups] == [[2, 4], [0, 1, 3, 5]]
    assert [group.block_tables.shape[1] for group in groups] == [250, 2]


@pytest.mark.parametrize("max_tokens", [2**12, 300])
def test_every_request_is_in_one_group_and_groups_are_bounded(monkeypatch, max_tokens):
    monkeypatch.setitem(batch_module.MAX_GROUP_TOKENS, "cpu", max_tokens)
    groups, num_blocks = groups_of([(7 * row) ** 2 % 1000 + 1 for row in range(50)])
    assert sorted(row for group in groups for row in group.rows.tolist()) == list(range(50))
    for group in groups:
        requests, longest = group.block_tables.shape
        assert requests * longest <= 1.5 * sum(num_blocks[row] for row in group.rows.tolist())
        assert requests == 1 or requests * longest * 4 <= max_tokens

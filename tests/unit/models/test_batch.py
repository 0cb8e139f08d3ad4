"""The tensors of a micro-batch, from the scheduler's words."""

import pytest
import torch

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
    assert batch.single.rows.tolist() == [3, 4]
    assert batch.single.block_tables.tolist() == [[3, 2], [6, 0]]
    assert batch.single.visible.tolist() == [[True] * 5 + [False] * 3, [True] + [False] * 7]
    chunk, prompt = batch.chunks
    assert (chunk.start, chunk.stop, chunk.length, chunk.block_table.tolist()) == (0, 3, 5, [7, 5])
    assert (prompt.start, prompt.stop, prompt.length, prompt.block_table.tolist()) == (5, 7, 2, [1])


def test_nothing_sampled():
    batch = AttentionBatch.build([ScheduledRequest("a", 0, (1, 2), (0,), samples=False)], 4, CPU)
    assert batch.sampled_rows.shape == (0,)
    assert batch.single is None


def test_a_table_that_is_too_short_is_a_programmers_error():
    with pytest.raises(AssertionError, match="short"):
        AttentionBatch.build([ScheduledRequest("short", 3, (1, 2), (0,), samples=True)], 4, CPU)

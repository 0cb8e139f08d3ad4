"""The tensors of a micro-batch, from the scheduler's words."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.engine.scheduler import Scheduler
from afd_server.errors import WorkerError
from afd_server.models import batch as batch_module
from afd_server.models.batch import AttentionBatch
from afd_server.types import GenerationRequest, ScheduledRequest
from tests.unit.engine.test_scheduler import arrivals, layouts
from tests.unit.engine.toy_worker import EOS, ToyWorker, small_config

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
    assert batch.logit_rows.tolist() == [3, 4, 6]
    (group,) = batch.singles
    assert group.rows.tolist() == [3, 4]
    assert group.block_tables.tolist() == [[3, 2], [6, 0]]
    assert group.visible.tolist() == [[True] * 5 + [False] * 3, [True] + [False] * 7]
    chunk, prompt = batch.chunks
    assert (chunk.start, chunk.stop, chunk.length, chunk.block_table.tolist()) == (0, 3, 5, [7, 5])
    assert (prompt.start, prompt.stop, prompt.length, prompt.block_table.tolist()) == (5, 7, 2, [1])


def test_nothing_sampled():
    batch = AttentionBatch.build([ScheduledRequest("a", 0, (1, 2), (0,), samples=False)], 4, CPU)
    assert batch.logit_rows.shape == (0,)
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


# --- from one step to the next ---------------------------------------------------------------------------------------


def assert_equal(batch, expected):
    for field in fields(AttentionBatch):
        mine, theirs = getattr(batch, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            assert mine.dtype is theirs.dtype and torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


class MovingOn(ToyWorker):
    """Compares every batch that moved on with the one that would be built."""

    def __init__(self, config, failing_steps):
        super().__init__(config, failing_steps)
        self.last = []

    def execute(self, plan):
        batches = [AttentionBatch.build(part, self.config.block_size, CPU) for part in plan.micro_batches]
        for last in self.last:
            for batch in batches:
                moved_on = last.moved_on(batch.requests)
                if moved_on is not None:
                    assert_equal(moved_on, batch)
        self.last = batches
        return super().execute(plan)


@settings(max_examples=100, deadline=None)
@given(
    arrivals=arrivals,
    layout=layouts,
    spare_blocks=st.integers(0, 8),
    failing_steps=st.sets(st.integers(1, 40), max_size=2),
    num_micro_batches=st.integers(1, 3),
)
def test_a_batch_that_moved_on_is_the_one_that_would_be_built(
    arrivals, layout, spare_blocks, failing_steps, num_micro_batches
):
    config = small_config(**layout)
    worker = MovingOn(config, failing_steps)
    num_blocks = -(-32 // config.block_size) + spare_blocks
    scheduler = Scheduler(config, num_blocks=num_blocks, eos_token_ids=(EOS,))
    now = 0
    while scheduler.has_work or now <= 12:
        for index, arrival in enumerate(arrivals):
            if arrival["arrives"] == now:
                scheduler.add(GenerationRequest(str(index), tuple(arrival["prompt"]), arrival["sampling"]))
            if arrival["aborts"] == now:
                scheduler.abort(str(index))
        plan = scheduler.schedule(lambda num_tokens: min(num_micro_batches, len(num_tokens)))
        if plan is not None:
            try:
                scheduler.complete(worker.execute(plan))
            except WorkerError as error:
                scheduler.fail_step(str(error))
        now += 1


STEP = (
    ScheduledRequest("a", 4, (5,), (3, 1), True),
    ScheduledRequest("b", 3, (9,), (0,), True),
)
NEXT = (
    ScheduledRequest("a", 5, (8,), (3, 1), True),
    ScheduledRequest("b", 4, (1,), (0, 6), True),  # in a block that is new
)


def moved_on(requests):
    return AttentionBatch.build(STEP, 4, CPU).moved_on(requests)


def test_requests_that_go_on_with_one_token_move_on():
    assert_equal(moved_on(NEXT), AttentionBatch.build(NEXT, 4, CPU))


@pytest.mark.parametrize(
    "requests",
    [
        NEXT[::-1],
        NEXT[:1],
        (NEXT[0], replace(NEXT[1], block_table=(2, 6))),  # came back from preemption
        (replace(NEXT[0], block_table=(3, 2)), NEXT[1]),
        (NEXT[0], replace(NEXT[1], token_ids=(1, 2))),
        (replace(NEXT[0], start_position=6), NEXT[1]),
        (NEXT[0], replace(NEXT[1], samples=False)),
        (NEXT[0], replace(NEXT[1], request_id="c")),
    ],
)
def test_whatever_else_comes_is_built(requests):
    assert moved_on(requests) is None


def test_a_batch_that_needs_wider_block_tables_is_built():
    assert AttentionBatch.build(STEP[1:], 4, CPU).moved_on(NEXT[1:]) is None


def test_a_prompt_s_rows_do_not_move_on():
    prompt = replace(STEP[1], start_position=2, token_ids=(1, 9))
    batch = AttentionBatch.build([STEP[0], prompt], 4, CPU)
    assert batch.moved_on(NEXT) is None

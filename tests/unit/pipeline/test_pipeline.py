"""The order of hops, and the loop that drives passes in it."""

import pytest

from afd_server.errors import WorkerDiedError
from afd_server.pipeline import hop_order, run_pipeline


def doubling_pass(start, hops):
    """A pass that adds the answer to each of its calls; the channel below answers twice the call."""
    value = start
    for _ in range(hops):
        value += yield value
    return value


class DoublingChannel:
    """Answers 2 x call, and keeps what happened in order."""

    def __init__(self, fails_at=None):
        self.events, self.calls, self.fails_at = [], {}, fails_at

    def send(self, micro_batch, call):
        self.events.append(("send", micro_batch))
        assert micro_batch not in self.calls, "two calls of one micro-batch under way"
        self.calls[micro_batch] = call

    def receive(self, micro_batch):
        self.events.append(("receive", micro_batch))
        if len(self.events) == self.fails_at:
            raise WorkerDiedError("ffn-0", "gone")
        return 2 * self.calls.pop(micro_batch)


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 4])
def test_every_pass_gets_its_own_answers_to_the_end(num_micro_batches):
    passes = [doubling_pass(start, hops=5) for start in range(1, num_micro_batches + 1)]
    run = run_pipeline(passes, DoublingChannel(), num_hops=5)
    assert run.results == [start * 3**5 for start in range(1, num_micro_batches + 1)]


def test_calls_of_the_other_micro_batches_leave_before_an_answer_is_awaited():
    channel = DoublingChannel()
    run_pipeline([doubling_pass(1, 2) for _ in range(3)], channel, num_hops=2)
    assert channel.events[:6] == [
        ("send", 0),
        ("send", 1),
        ("send", 2),
        ("receive", 0),
        ("send", 0),
        ("receive", 1),
    ]


def test_hop_order_takes_every_hop_of_every_micro_batch_once():
    order = list(hop_order(3, 4))
    assert sorted(order) == [(micro_batch, hop) for micro_batch in range(3) for hop in range(5)]
    for micro_batch in range(3):
        assert [hop for each, hop in order if each == micro_batch] == list(range(5))


def test_a_failing_channel_closes_all_passes():
    closed = []

    def watched(index):
        try:
            yield from doubling_pass(1, 3)
        finally:
            closed.append(index)

    with pytest.raises(WorkerDiedError, match="ffn-0"):
        run_pipeline([watched(0), watched(1)], DoublingChannel(fails_at=3), num_hops=3)
    assert sorted(closed) == [0, 1]

"""The micro-batch pipeline: while one micro-batch is in the FFN, the next one is in attention.

What lives here: the order of hops, as a pure function, and the loop that drives one coroutine per micro-batch in that
order. What does not: tensors, sockets, or the choice of the number of micro-batches. The attention worker runs a step
with `run_pipeline`; anything that predicts a step's time uses `hop_order` itself.

A forward pass is a generator: it yields the call it wants computed elsewhere, is resumed with the answer, and returns
its result. One hop is one such call: a layer of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Call = TypeVar("Call")
Answer = TypeVar("Answer")
Result = TypeVar("Result")
CallIn = TypeVar("CallIn", contravariant=True)
AnswerOut = TypeVar("AnswerOut", covariant=True)


class Channel(Protocol[CallIn, AnswerOut]):
    """Where a pass's calls go. At most one call of a micro-batch is under way at a time."""

    def send(self, micro_batch: int, call: CallIn) -> None:
        """Hands the call over without waiting for its answer. Raises WorkerError when it cannot."""

    def receive(self, micro_batch: int) -> AnswerOut:
        """Waits, within a deadline, for the answer to this micro-batch's call. Raises WorkerError."""


@dataclass(frozen=True, slots=True)
class PipelineRun(Generic[Result]):
    """What the passes returned, in micro-batch order, and how the driving thread spent its time, in seconds: in the
    passes, or in the channel, handing calls over and waiting for answers."""

    results: list[Result]
    computing_s: float
    waiting_s: float


def hop_order(num_micro_batches: int, num_hops: int) -> Iterator[tuple[int, int]]:
    """The (micro-batch, hop) pairs in the order in which the attention side works on them.

    Hop 0 starts a pass and runs it to its first call; hop h > 0 takes the answer to call h - 1 and runs on, hop
    `num_hops` to the pass's end. Round robin: every micro-batch makes a hop before the first one makes its next, so an
    answer has the other micro-batches' attention time to arrive in.
    """
    for hop in range(num_hops + 1):
        for micro_batch in range(num_micro_batches):
            yield micro_batch, hop


def run_pipeline(
    passes: Sequence[Generator[Call, Answer, Result]], channel: Channel[Call, Answer], num_hops: int
) -> PipelineRun[Result]:
    """Drives the passes to their ends: each makes num_hops calls, or fewer when it made some by itself.

    An error of the channel or of a pass closes all passes and is raised.
    """
    results: dict[int, Result] = {}
    computing_s = waiting_s = 0.0
    try:
        waiting_since = time.perf_counter()
        for micro_batch, hop in hop_order(len(passes), num_hops):
            if micro_batch in results:
                continue
            answer = channel.receive(micro_batch) if hop else None
            computing_since = time.perf_counter()
            waiting_s += computing_since - waiting_since
            call = None
            try:
                call = passes[micro_batch].send(answer)  # type: ignore[arg-type]  # a generator starts with None
            except StopIteration as end:
                results[micro_batch] = end.value
            waiting_since = time.perf_counter()
            computing_s += waiting_since - computing_since
            if call is not None:
                channel.send(micro_batch, call)
    finally:
        for forward_pass in passes:
            forward_pass.close()
    assert len(results) == len(passes), f"a pass made more than {num_hops} hops"
    return PipelineRun([results[index] for index in range(len(passes))], computing_s, waiting_s)

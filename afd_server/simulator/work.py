"""What a step has to do and how long its parts take by the model: the currency between a replica and what executes it.

What lives here: the work of a plan's micro-batches, their hop times, and the protocol of whatever lets a step take its time.
What does not: the coefficients (planner/times.py) and the order of the hops (pipeline.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from afd_server.engine.micro_batches import HopTimes
from afd_server.engine.step_time import StepWork
from afd_server.errors import WorkerError
from afd_server.planner.times import LayerTimes
from afd_server.types import ScheduledRequest, StepPlan, StepTiming

# What a step ends in.
Ended = Callable[[StepTiming | WorkerError], None]


class Step(Protocol):
    """A step under way."""

    def cancel(self) -> None:
        """Its attention worker is gone: nobody waits for it."""


class Execution(Protocol):
    """What carries out the steps of all replicas, in simulated time, and knows the FFN workers."""

    def know(self, replicas: Iterable[int]) -> None:
        """These attention replicas call from now on."""

    def begin(self, replica: int, hops: Sequence[HopTimes], overhead_s: float, ended: Ended) -> Step:
        """Starts a step of one micro-batch per entry of `hops` now. `ended` is called when it is over."""

    def fail(self, worker: int) -> None:
        """FFN worker `worker` is gone; its calls are sent again."""

    def restore(self, worker: int) -> None:
        """It is back."""

    def resize(self, num_replicas: int) -> None:
        """There are so many copies of the FFN side from now on."""

    def busy_s(self) -> list[float]:
        """Seconds that each FFN worker has computed for, those that have left included."""


def work_of(parts: Sequence[ScheduledRequest]) -> StepWork:
    """Of one micro-batch; the same as a sum of StepWork.part, without an object for each request."""
    tokens = context_tokens = samples = 0
    chunk_pairs = 0.0
    for part in parts:
        count = len(part.token_ids)
        tokens += count
        samples += part.samples
        if count == 1:
            context_tokens += part.start_position + 1
        else:
            chunk_pairs += count * part.start_position + count * (count + 1) / 2
    return StepWork(tokens, context_tokens, chunk_pairs, samples)


@dataclass(frozen=True, slots=True)
class StepModel:
    """The times of one attention worker's steps. slowness: its times as a multiple of the model's."""

    times: LayerTimes
    slowness: float = 1.0

    def hops(self, plan: StepPlan) -> list[HopTimes]:
        return [self.hop(work_of(parts)) for parts in plan.micro_batches]

    def hop(self, work: StepWork) -> HopTimes:
        """wire_s is there and back, as the pipeline's own prediction takes it."""
        times = self.times
        attention_s = times.attention_s(work.tokens, work.context_tokens, work.chunk_pairs)
        return HopTimes(
            work.tokens, self.slowness * attention_s, times.ffn_s(work.tokens), 2 * times.wire_s(work.tokens)
        )

    def overhead_s(self, num_samples: float) -> float:
        return self.slowness * self.times.step_overhead_s(num_samples)

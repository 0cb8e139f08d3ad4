"""Steps of replicas that all decode the same number of requests, for ever: throughput without arrivals and lengths.

What lives here: such a state of a divided model, hop by hop, and of the same cards undivided. What does not: which layouts are
compared (studies.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from afd_server.engine.step_time import StepWork
from afd_server.planner.times import LayerTimes
from afd_server.simulator.lockstep import Lockstep
from afd_server.simulator.virtual_time import Events
from afd_server.simulator.whole_steps import Shape, Windows
from afd_server.simulator.work import StepModel


@dataclass(frozen=True, slots=True)
class Load:
    """Of each attention worker: requests that decode, each with so much context, as so many micro-batches."""

    requests: float
    context: int
    micro_batches: int

    @property
    def work(self) -> StepWork:
        """Of one micro-batch."""
        rows = self.requests / self.micro_batches
        return StepWork(rows, rows * self.context, 0, rows)


def divided_step_s(times: LayerTimes, num_replicas: int, load: Load) -> float:
    """Of num_replicas attention workers that share one FFN side."""
    hop, overhead_s = StepModel(times).hop(load.work), times.step_overhead_s(load.requests)
    windows = Windows(times)
    shape = Shape(load.micro_batches, hop, 1.0, overhead_s)
    alone_s = windows.alone_s([hop] * load.micro_batches)
    return alone_s + windows.delay(num_replicas, shape).delay_s + overhead_s


def merged_step_s(times: LayerTimes, num_replicas: int, load: Load) -> float:
    """The same, if the calls of all workers for a layer always reached the FFN side together: in lockstep, that is."""
    return _lockstep_step_s(times, num_replicas, load, together=False)


def undivided_step_s(times: LayerTimes, num_cards: int, load: Load) -> float:
    """Of num_cards that all hold the attention side and each a shard of the FFN, and so run in lockstep."""
    return _lockstep_step_s(times, num_cards, load, together=True)


def _lockstep_step_s(times: LayerTimes, count: int, load: Load, *, together: bool) -> float:
    events = Events()
    execution = Lockstep(events, times, num_shards=1, together=together)
    hops = [StepModel(times).hop(load.work)] * load.micro_batches
    for replica in range(count):
        execution.begin(replica, hops, times.step_overhead_s(load.requests), lambda ended: None)
    events.run_until(math.inf)
    return events.now_s

"""Steps in lockstep, as a collective library would have them: for comparison with what this server does, which is no such thing.

What lives here: an Execution in which all attention replicas begin a step together and meet at the FFN workers in every layer. The
slowest replica sets the pace of all; in return the FFN side reads its weights once a layer for everyone. A replica without requests
takes part at no cost, though real ones would run dummy batches. What does not: failures, which stop such a group as a whole.

together: the attention cards are the FFN cards too: the model is served undivided, experts spread over all cards. Then a card computes
one thing at a time, and only what is on the wire is hidden behind another micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from afd_server.engine.micro_batches import HopTimes, predict_step_s
from afd_server.planner.times import LayerTimes
from afd_server.simulator.virtual_time import Events
from afd_server.simulator.work import Ended
from afd_server.types import StepTiming


class LockstepStep:
    """One replica's part in a common step."""

    def __init__(self, replica: int, hops: Sequence[HopTimes], overhead_s: float, ended: Ended) -> None:
        self.replica = replica
        self.hops = hops
        self.overhead_s = overhead_s
        self.ended = ended
        self.is_over = False

    def cancel(self) -> None:
        self.is_over = True


@dataclass
class Lockstep:
    """All steps. num_shards: FFN workers that hold the model together, num_replicas times; each copy is a group of its own."""

    events: Events
    times: LayerTimes
    num_shards: int = 1
    num_replicas: int = 1
    together: bool = False
    slowness: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting: dict[int, list[LockstepStep]] = {}
        self._is_running: dict[int, bool] = {}
        self._busy_s = [0.0] * (self.num_shards * self.num_replicas)

    def know(self, replicas: Iterable[int]) -> None:
        """They belong to the group of their number."""

    def begin(self, replica: int, hops: Sequence[HopTimes], overhead_s: float, ended: Ended) -> LockstepStep:
        group = replica % self.num_replicas
        step = LockstepStep(replica, hops, overhead_s, ended)
        self._waiting.setdefault(group, []).append(step)
        if not self._is_running.get(group):
            self._is_running[group] = True
            # At the same time but after everything else of now: whoever has work begins with it.
            self.events.at(self.events.now_s, self._start, group)
        return step

    def fail(self, worker: int) -> None:
        raise AssertionError("a group in lockstep has no failover to simulate")

    def restore(self, worker: int) -> None:
        raise AssertionError("a group in lockstep has no failover to simulate")

    def resize(self, num_replicas: int) -> None:
        raise AssertionError("a group in lockstep does not change")

    def busy_s(self) -> list[float]:
        return self._busy_s

    def _start(self, group: int) -> None:
        steps = [step for step in self._waiting.pop(group, []) if not step.is_over]
        if not steps:
            self._is_running[group] = False
            return
        hops = self._common_hops(group, steps)
        num_layers = self.times.num_layers
        if self.together:
            computing_s = sum(each.attention_s + each.ffn_s for each in hops)
            own_way_s = max(each.attention_s + each.ffn_s + each.wire_s for each in hops)
            common_s = num_layers * max(computing_s, own_way_s)
        else:
            common_s = predict_step_s(hops, num_layers)
        busy_s = num_layers * sum(each.ffn_s for each in hops)
        for shard in range(self.num_shards):
            self._busy_s[group * self.num_shards + shard] += busy_s
        total_s = common_s + max(step.overhead_s for step in steps)
        self.events.at(self.events.now_s + total_s, self._end, group, steps, total_s, busy_s)

    def _common_hops(self, group: int, steps: Sequence[LockstepStep]) -> list[HopTimes]:
        """Micro-batch by micro-batch: the slowest attention, the rows of all in one FFN call."""
        slowness = max(
            self.slowness.get(group * self.num_shards + shard, 1.0) for shard in range(self.num_shards)
        )
        hops = []
        for index in range(max(len(step.hops) for step in steps)):
            parts = [step.hops[index] for step in steps if index < len(step.hops)]
            rows = sum(part.tokens for part in parts)
            attention_s = max(part.attention_s for part in parts)
            wire_s = max(part.wire_s for part in parts)
            hops.append(HopTimes(rows, attention_s, slowness * self.times.ffn_s(rows), wire_s))
        return hops

    def _end(self, group: int, steps: Sequence[LockstepStep], total_s: float, busy_s: float) -> None:
        self.events.at(self.events.now_s, self._start, group)
        for step in steps:
            if step.is_over:
                continue
            step.is_over = True
            attention_s = self.times.num_layers * sum(each.attention_s for each in step.hops)
            step.ended(
                StepTiming(
                    total_s=total_s,
                    attention_s=attention_s,
                    ffn_s=busy_s,
                    bubble_s=max(0.0, total_s - attention_s - step.overhead_s),
                    num_micro_batches=len(step.hops),
                    num_tokens=int(sum(each.tokens for each in step.hops)),
                )
            )

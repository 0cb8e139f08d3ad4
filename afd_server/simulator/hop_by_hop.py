"""Steps executed hop by hop: every call to every FFN worker is an event, and what waits there is merged as it would be.

What lives here: attention workers inside a step, FFN workers with their queues, the way between them, and the sending again of
calls that a lost worker had. What does not: which requests are in a step (replica.py) and what is too much to do so
(whole_steps.py, which estimates what this counts).

The attention side works in the pipeline's own `hop_order`, an FFN worker takes `next_batch` of what waits, and each replica
asks the workers of a shard in its order `by_preference`. A pass of L layers has L calls and L + 1 pieces of attention work around
them, taken as equally long. Every shard gets all rows of a call. The wire is as fast for many callers as for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from afd_server.attention.preference import by_preference
from afd_server.engine.micro_batches import HopTimes
from afd_server.errors import WorkerError, WorkerTimeoutError
from afd_server.ffn.merging import next_batch
from afd_server.pipeline import hop_order
from afd_server.planner.times import LayerTimes
from afd_server.simulator.spans import Spans
from afd_server.simulator.virtual_time import Events
from afd_server.simulator.work import Ended
from afd_server.types import StepTiming


@dataclass(slots=True)
class Call:
    """One hop of one micro-batch. num_unanswered: shards whose part is still out. ffn_s: of the slowest part."""

    step: HopStep
    micro_batch: int
    layer: int
    rows: float
    num_unanswered: int
    ffn_s: float = 0.0


@dataclass(slots=True, eq=False)
class Part:
    """A call, as one shard gets it."""

    call: Call
    shard: int


class FFNWorker:
    """One FFN worker: serves the oldest call with those that are merged with it, then the next. slowness: of its times."""

    def __init__(self, index: int, execution: HopByHop, slowness: float) -> None:
        self.index = index
        self.is_up = True
        self.busy_s = 0.0
        self.num_calls = self.num_batches = 0
        self._execution = execution
        self._slowness = slowness
        self._waiting: list[Part] = []
        self._batch: list[Part] = []
        self._life = 0

    def take(self, part: Part) -> None:
        self._waiting.append(part)
        if not self._batch:
            self._start()

    def lose_all(self) -> list[Part]:
        """Its process is gone: what it had."""
        lost = [*self._batch, *self._waiting]
        self._batch, self._waiting = [], []
        self._life += 1
        return lost

    def _start(self) -> None:
        self._batch, self._waiting = next_batch(self._waiting)
        execution = self._execution
        rows = sum([part.call.rows for part in self._batch])
        seconds = self._slowness * execution.times.ffn_s(rows)
        began_s = execution.events.now_s
        execution.events.at(began_s + seconds, self._end, self._life, seconds)
        self.num_calls += len(self._batch)
        self.num_batches += 1
        if execution.spans is not None:
            call = self._batch[0].call
            execution.spans.add(f"ffn-{self.index}", began_s, began_s + seconds, call.micro_batch, call.layer)

    def _end(self, life: int, seconds: float) -> None:
        if life != self._life:
            return  # it died meanwhile
        self.busy_s += seconds
        batch, self._batch = self._batch, []
        if self._waiting:
            self._start()
        for part in batch:
            call = part.call
            call.num_unanswered -= 1
            call.ffn_s = max(call.ffn_s, seconds)
            if not call.num_unanswered:
                call.step.take_answer(call)


class HopStep:
    """One step of one attention worker. Its attention side computes one thing at a time."""

    # fmt: off
    __slots__ = ("_answered_s", "_began_s", "_ended", "_execution", "_ffn_s", "_free_s", "_hops", "_is_over", "_next", "_order",
                 "_overhead_s", "_waiting_s", "_waits_for", "replica")
    # fmt: on

    def __init__(
        self, execution: HopByHop, replica: int, hops: Sequence[HopTimes], overhead_s: float, ended: Ended
    ) -> None:
        self.replica = replica
        self._execution = execution
        self._hops = hops
        self._overhead_s = overhead_s
        self._ended = ended
        self._order = hop_order(len(hops), execution.times.num_layers)
        self._next: tuple[int, int] | None = next(self._order)
        self._answered_s: list[float | None] = [0.0] * len(hops)
        self._began_s = self._free_s = execution.events.now_s
        self._waits_for = -1
        self._waiting_s = self._ffn_s = 0.0
        self._is_over = False

    @property
    def is_over(self) -> bool:
        return self._is_over

    def way_s(self, micro_batch: int) -> float:
        """One direction of the wire."""
        return self._hops[micro_batch].wire_s / 2

    def cancel(self) -> None:
        self._is_over = True

    def fail(self, error: WorkerError) -> None:
        if not self._is_over:
            self._is_over = True
            self._ended(error)

    def take_answer(self, call: Call) -> None:
        """All parts of a call have been computed; they are on their way back."""
        if self._is_over:
            return
        self._ffn_s += call.ffn_s
        way_s = self.way_s(call.micro_batch)
        self._answered_s[call.micro_batch] = self._execution.events.now_s + way_s
        if self._execution.spans is not None:
            now_s = self._execution.events.now_s
            self._execution.spans.add(
                f"wire-{self.replica}", now_s, now_s + way_s, call.micro_batch, call.layer
            )
        if self._waits_for == call.micro_batch:
            self._waits_for = -1
            self.advance()

    def advance(self) -> None:
        """Computes as far as answers are known. Nobody else uses this worker, so the future is certain up to the next call."""
        execution, num_layers = self._execution, self._execution.times.num_layers
        while self._next is not None:
            micro_batch, hop = self._next
            answered_s = self._answered_s[micro_batch]
            if answered_s is None:
                self._waits_for = micro_batch
                return
            self._next = next(self._order, None)
            times = self._hops[micro_batch]
            began_s = max(self._free_s, answered_s)
            self._waiting_s += began_s - self._free_s
            self._free_s = began_s + times.attention_s * num_layers / (num_layers + 1)
            if execution.spans is not None:
                execution.spans.add(f"attention-{self.replica}", began_s, self._free_s, micro_batch, hop)
            if hop < num_layers:
                self._answered_s[micro_batch] = None
                execution.send(self, micro_batch, hop, times, self._free_s)
        execution.events.at(self._free_s + self._overhead_s, self._end)

    def _end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        num_hops = len(self._hops) * self._execution.times.num_layers
        total_s = self._execution.events.now_s - self._began_s
        self._ended(
            StepTiming(
                total_s=total_s,
                attention_s=total_s - self._waiting_s - self._overhead_s,
                ffn_s=self._ffn_s,
                wire_s=sum(times.wire_s for times in self._hops) * self._execution.times.num_layers,
                bubble_s=self._waiting_s,
                num_hops=num_hops,
                num_micro_batches=len(self._hops),
                num_tokens=int(sum(times.tokens for times in self._hops)),
            )
        )


@dataclass
class HopByHop:
    """All steps and all FFN workers. num_shards: workers that hold the model together, num_replicas times.

    slowness: of single FFN workers, their times as a multiple of the model's. timeout_s: how long a call waits for a worker.
    spans: where to note who did what when.
    """

    events: Events
    times: LayerTimes
    num_shards: int = 1
    num_replicas: int = 1
    slowness: dict[int, float] = field(default_factory=dict)
    timeout_s: float = 60.0
    spans: Spans | None = None

    def __post_init__(self) -> None:
        self.workers: dict[int, FFNWorker] = {}
        self._left: list[FFNWorker] = []
        self._preferences: dict[int, list[list[int]]] = {}
        # Parts that no worker can take now.
        self._parked: dict[Part, None] = {}
        self.resize(self.num_replicas)

    def know(self, replicas: Iterable[int]) -> None:
        """Nothing is prepared for them."""

    def begin(self, replica: int, hops: Sequence[HopTimes], overhead_s: float, ended: Ended) -> HopStep:
        step = HopStep(self, replica, hops, overhead_s, ended)
        step.advance()
        return step

    def send(self, step: HopStep, micro_batch: int, layer: int, times: HopTimes, at_s: float) -> None:
        """A call leaves an attention worker, to every shard."""
        call = Call(step, micro_batch, layer, times.tokens, self.num_shards)
        self.events.at(at_s + times.wire_s / 2, self._arrive, call)
        if self.spans is not None:
            self.spans.add(f"wire-{step.replica}", at_s, at_s + times.wire_s / 2, micro_batch, layer)

    def _arrive(self, call: Call) -> None:
        for shard in range(self.num_shards):
            self._give(Part(call, shard))

    def _give(self, part: Part) -> None:
        step = part.call.step
        if step.is_over:
            return
        preferences = self._preferences.get(step.replica)
        if preferences is None:
            preferences = self._preferences[step.replica] = by_preference(
                self.workers, self.num_shards, step.replica
            )
        for index in preferences[part.shard]:
            worker = self.workers[index]
            if worker.is_up:
                worker.take(part)
                return
        self._parked[part] = None
        self.events.at(self.events.now_s + self.timeout_s, self._expire, part)

    def _expire(self, part: Part) -> None:
        if part in self._parked:
            del self._parked[part]
            problem = f"out of reach for {self.timeout_s:g} s"
            part.call.step.fail(WorkerTimeoutError(f"ffn-{part.shard}", problem, layer=part.call.layer))

    # --- workers come and go ---------------------------------------------------------------------------------------

    def fail(self, worker: int) -> None:
        self.workers[worker].is_up = False
        self._send_again(self.workers[worker])

    def restore(self, worker: int) -> None:
        if worker not in self.workers:
            return  # it has left meanwhile
        self.workers[worker].is_up = True
        waiting, self._parked = self._parked, {}
        for part in waiting:
            self._give(part)

    def resize(self, num_replicas: int) -> None:
        wanted = num_replicas * self.num_shards
        for index in range(len(self.workers), wanted):
            self.workers[index] = FFNWorker(index, self, self.slowness.get(index, 1.0))
        leaving = [self.workers.pop(index) for index in range(wanted, len(self.workers))]
        self._left += leaving
        self._preferences.clear()  # whoever leaves gets no new call, and ends those it has

    def busy_s(self) -> list[float]:
        return [worker.busy_s for worker in [*self.workers.values(), *self._left]]

    def _send_again(self, worker: FFNWorker) -> None:
        for part in worker.lose_all():
            way_s = part.call.step.way_s(part.call.micro_batch)
            self.events.at(self.events.now_s + way_s, self._give, part)

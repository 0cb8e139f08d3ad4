"""Steps executed whole: how long a step takes is known when it begins, from its work and from who else calls the same workers.

What lives here: that estimate, for clusters whose hops are too many to count one by one (1,000 replicas make a billion an hour).
What does not: the count itself (hop_by_hop.py), which this is made of and compared with in the tests.

    seconds(step) = alone(step) + delay(k, m, a, f, w, overhead)

alone: the pipeline's own prediction of this step on idle FFN workers. delay: what a step loses in the queue of the FFN workers,
which k steps share now, less what it wins by calls that are merged there: a window of k equal steps of their mean work (m
micro-batches with attention a, FFN f and wire w a hop, and what comes between two steps) is executed hop by hop, some steps each,
from random phases, with attention times spread by SPREAD; it takes that much longer than predicted. Steps of many layers are
shortened for it to WINDOW_LAYERS, with as much less between them: what is lost at a layer does not depend on how many there are.
Windows are remembered by their work in steps of GRAIN. So this is exact for a step alone, close for a busy group of like steps, and
approximate where a long prompt meets short steps, or where a step's company changes on its way.

Where a worker is lost, its callers share those of the next replica from their next step on; where there is none, their steps
stand still until it is back. The workers of one replica have the same callers, so they are counted once as long as all live.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from afd_server.attention.preference import by_preference
from afd_server.engine.micro_batches import HopTimes, predict_step_s
from afd_server.errors import WorkerError, WorkerTimeoutError
from afd_server.planner.times import LayerTimes
from afd_server.simulator.hop_by_hop import HopByHop
from afd_server.simulator.virtual_time import Events
from afd_server.simulator.work import Ended
from afd_server.types import StepTiming

# Works that differ by less than this share are one.
GRAIN = 0.1
# Attention times of a window's steps, around their mean: replicas that are exactly alike would meet at every layer.
SPREAD = 0.1
# Steps of each replica in a window, and how many of them come before the measurement.
WINDOW_STEPS, SETTLING_STEPS = 10, 6
WINDOW_LAYERS = 20
# Up to so many steps in a group their number is taken as it is, beyond it in shares of GRAIN.
FEW = 8


@dataclass(frozen=True, slots=True)
class Window:
    """What a window of steps showed. delay_s: of a step, beyond its prediction; below 0 where its own calls are merged. busy_s: of one FFN worker, for one step's calls."""

    delay_s: float
    busy_s: float


@dataclass(frozen=True, slots=True)
class Shape:
    """What the steps of a window are like. slowness: of the FFN worker. overhead_s: between two steps of a replica."""

    num_micro_batches: int
    mean: HopTimes
    slowness: float
    overhead_s: float

    @property
    def grains(self) -> tuple[int, ...]:
        """Equal for shapes that count as one. The times of FFN and wire follow from the tokens."""
        values = self.mean.attention_s, self.mean.tokens, self.slowness, self.overhead_s
        return self.num_micro_batches, *map(_grain, values)


class Windows:
    """Windows of k equal steps, each executed once."""

    def __init__(self, times: LayerTimes) -> None:
        self._times = times
        self._known: dict[tuple[int, ...], Window] = {}
        self._alone: dict[tuple[int, ...], float] = {}

    def alone_s(self, hops: Sequence[HopTimes]) -> float:
        """A step on idle workers. The hop order is run once per shape: twice the times take twice as long."""
        unit_s = hops[0].attention_s + hops[0].ffn_s + hops[0].wire_s
        shape = tuple(
            round(64 * seconds / unit_s)
            for each in hops
            for seconds in (each.attention_s, each.ffn_s, each.wire_s)
        )
        relative = self._alone.get(shape)
        if relative is None:
            parts = [shape[index : index + 3] for index in range(0, len(shape), 3)]
            scaled = [HopTimes(1, *(part / 64 for part in each)) for each in parts]
            relative = self._alone[shape] = predict_step_s(scaled, self._times.num_layers)
        if len(hops) == 1:
            return unit_s * self._times.num_layers
        return relative * unit_s

    def delay(self, count: int, shape: Shape) -> Window:
        """Of one step among `count`."""
        low = _near(count)
        window = self._window(low, shape)
        if low == count:
            return window
        above = _near(low + 1, up=True)
        high = self._window(above, shape)
        share = (count - low) / (above - low)
        return Window(
            window.delay_s + share * (high.delay_s - window.delay_s),
            window.busy_s + share * (high.busy_s - window.busy_s),
        )

    def _window(self, count: int, shape: Shape) -> Window:
        key = (count, *shape.grains)
        window = self._known.get(key)
        if window is None:
            window = self._known[key] = self._execute(count, shape)
        return window

    def _execute(self, count: int, shape: Shape) -> Window:
        mean, slowness = shape.mean, shape.slowness
        num_layers = min(self._times.num_layers, WINDOW_LAYERS)
        overhead_s = shape.overhead_s * num_layers / self._times.num_layers
        events, generator = Events(), random.Random(count)
        execution = HopByHop(events, replace(self._times, num_layers=num_layers), slowness={0: slowness})
        late_s, num_left = 0.0, count

        def start(replica: int, step: int) -> None:
            spread = 1 + SPREAD * (2 * generator.random() - 1)
            hops = [HopTimes(mean.tokens, spread * mean.attention_s, slowness * mean.ffn_s, mean.wire_s)]
            hops *= shape.num_micro_batches
            alone_s = predict_step_s(hops, num_layers) + overhead_s
            execution.begin(replica, hops, overhead_s, lambda ended: end(replica, step, alone_s, ended))

        def end(replica: int, step: int, alone_s: float, ended: StepTiming | WorkerError) -> None:
            nonlocal late_s, num_left
            assert isinstance(ended, StepTiming)
            if SETTLING_STEPS <= step < WINDOW_STEPS:
                late_s += ended.total_s - alone_s
            num_left -= step == WINDOW_STEPS - 1
            if num_left:  # the others keep it company until all have been measured
                start(replica, step + 1)

        usual_s = predict_step_s([mean] * shape.num_micro_batches, num_layers) + overhead_s
        for replica in range(count):
            events.at(generator.random() * usual_s, start, replica, 0)
        events.run_until(math.inf)
        worker = execution.workers[0]
        whole_steps = count * (WINDOW_STEPS - SETTLING_STEPS) * num_layers / self._times.num_layers
        num_calls = self._times.num_layers * shape.num_micro_batches
        return Window(late_s / whole_steps, worker.busy_s / worker.num_calls * num_calls)


def _grain(value: float) -> int:
    return round(math.log(max(value, 1e-12)) / math.log1p(GRAIN))


def _near(count: int, up: bool = False) -> int:
    """The nearest number of steps that windows are executed for, not above the count, or not below it."""
    if count <= FEW:
        return count
    size = max(1, round(GRAIN * 2 ** math.floor(math.log2(count))))
    return -(-count // size) * size if up else count // size * size


@dataclass(slots=True, eq=False)
class Group:
    """FFN workers that the same replicas call: sums over the steps that are under way there. slowness: of each."""

    workers: list[int]
    slowness: float
    num_steps: int = 0
    attention_s: float = 0.0
    ffn_s: float = 0.0
    wire_s: float = 0.0
    tokens: float = 0.0
    overhead_s: float = 0.0
    busy_s: float = 0.0

    def add(self, step: WholeStep, sign: int) -> None:
        mean = step.mean
        self.num_steps += sign
        self.attention_s += sign * mean.attention_s
        self.ffn_s += sign * mean.ffn_s
        self.wire_s += sign * mean.wire_s
        self.tokens += sign * mean.tokens
        self.overhead_s += sign * step.overhead_s

    def shape(self, num_micro_batches: int) -> Shape:
        count = self.num_steps
        mean = HopTimes(self.tokens / count, self.attention_s / count, self.ffn_s / count, self.wire_s / count)
        return Shape(num_micro_batches, mean, self.slowness, self.overhead_s / count)


class WholeStep:
    """A step under way. It ends at a time, unless it stands still."""

    __slots__ = ("_ended", "_ends_s", "_events", "_is_over", "_left_s", "_life", "_timing", "groups", "mean", "overhead_s",
                 "replica")  # fmt: skip

    def __init__(self, events: Events, replica: int, mean: HopTimes, overhead_s: float, ended: Ended) -> None:
        self.replica = replica
        self.mean = mean
        self.overhead_s = overhead_s
        self.groups: Sequence[Group] = ()
        self._events = events
        self._ended = ended
        self._is_over = False
        self._life = 0
        self._left_s: float | None = None  # while it stands still

    @property
    def is_over(self) -> bool:
        return self._is_over

    def run(self, timing: StepTiming) -> None:
        self._timing = timing
        self._ends_s = self._events.now_s + timing.total_s
        self._events.at(self._ends_s, self._end, self._life)

    def stand_still(self, timeout_s: float, worker: str) -> None:
        """A worker that it needs is gone, and nobody stands in. After timeout_s it fails."""
        if self._left_s is None:
            self._left_s = self._ends_s - self._events.now_s
            self._life += 1
            self._events.at(self._events.now_s + timeout_s, self._expire, self._life, timeout_s, worker)

    def go_on(self) -> None:
        if self._left_s is not None:
            self._life += 1
            self._ends_s = self._events.now_s + self._left_s
            self._left_s = None
            self._events.at(self._ends_s, self._end, self._life)

    def cancel(self) -> None:
        if not self._is_over:
            self._leave()

    def _leave(self) -> None:
        self._is_over = True
        for group in self.groups:
            group.add(self, -1)

    def _expire(self, life: int, timeout_s: float, worker: str) -> None:
        if life == self._life and not self._is_over:
            self._leave()
            self._ended(WorkerTimeoutError(worker, f"out of reach for {timeout_s:g} s"))

    def _end(self, life: int) -> None:
        if life == self._life and not self._is_over:
            self._leave()
            self._ended(self._timing)


@dataclass
class WholeSteps:
    """All steps and all FFN workers; the fields are those of HopByHop."""

    events: Events
    times: LayerTimes
    num_shards: int = 1
    num_replicas: int = 1
    slowness: dict[int, float] = field(default_factory=dict)
    timeout_s: float = 60.0
    windows: Windows | None = None

    def __post_init__(self) -> None:
        self._windows = self.windows or Windows(self.times)
        self._workers: set[int] = set()
        self._down: set[int] = set()
        self._busy_s: dict[int, float] = {}
        self._steps: dict[int, WholeStep] = {}  # the last of each replica
        self._groups: dict[int, list[Group]] = {}
        self._stuck: dict[int, int] = {}  # replica -> a worker that it waits for
        self.resize(self.num_replicas)

    def know(self, replicas: Iterable[int]) -> None:
        self._groups |= {replica: [] for replica in replicas}
        self._regroup()

    def begin(self, replica: int, hops: Sequence[HopTimes], overhead_s: float, ended: Ended) -> WholeStep:
        groups = self._groups[replica]
        count, num_layers = len(hops), self.times.num_layers
        mean = hops[0] if count == 1 else HopTimes(
            *(sum(values) / count for values in zip(*((h.tokens, h.attention_s, h.ffn_s, h.wire_s) for h in hops), strict=True))
        )  # fmt: skip
        step = self._steps[replica] = WholeStep(self.events, replica, mean, overhead_s, ended)
        slowness = max((group.slowness for group in groups), default=1.0)
        if slowness != 1:
            hops = [HopTimes(h.tokens, h.attention_s, slowness * h.ffn_s, h.wire_s) for h in hops]
        alone_s = self._windows.alone_s(hops)
        step.groups = groups
        delays_s = []
        for group in groups:
            group.add(step, 1)
            window = self._windows.delay(group.num_steps, group.shape(count))
            delays_s.append(window.delay_s)
            group.busy_s += window.busy_s
        attention_s = num_layers * sum(each.attention_s for each in hops)
        total_s = max(alone_s + max(delays_s, default=0.0), attention_s)
        step.run(
            StepTiming(
                total_s=total_s + overhead_s,
                attention_s=attention_s,
                ffn_s=num_layers * sum(each.ffn_s for each in hops),
                wire_s=num_layers * sum(each.wire_s for each in hops),
                bubble_s=max(0.0, total_s - attention_s),
                num_hops=num_layers * count,
                num_micro_batches=count,
                num_tokens=int(sum(each.tokens for each in hops)),
            )
        )
        if replica in self._stuck:
            step.stand_still(self.timeout_s, f"ffn-{self._stuck[replica]}")
        return step

    # --- workers come and go ---------------------------------------------------------------------------------------

    def fail(self, worker: int) -> None:
        self._down.add(worker)
        self._regroup()

    def restore(self, worker: int) -> None:
        self._down.discard(worker)
        self._regroup()

    def resize(self, num_replicas: int) -> None:
        self._workers = set(range(num_replicas * self.num_shards))
        self._regroup()

    def busy_s(self) -> list[float]:
        for group in {id(group): group for groups in self._groups.values() for group in groups}.values():
            for worker in group.workers:
                self._busy_s[worker] += group.busy_s
            group.busy_s = 0.0
        return list(self._busy_s.values())

    def _regroup(self) -> None:
        """Who calls whom, anew."""
        self.busy_s()
        self._busy_s = dict.fromkeys(sorted(self._workers), 0.0) | self._busy_s
        replicas = list(self._groups)
        callers: dict[int, list[int]] = {}
        self._stuck = {}
        for replica in replicas:
            for choices in by_preference(self._workers, self.num_shards, replica):
                worker = next((index for index in choices if index not in self._down), None)
                if worker is None:
                    self._stuck[replica] = choices[0]
                else:
                    callers.setdefault(worker, []).append(replica)
        alike: dict[tuple[float, tuple[int, ...]], list[int]] = {}
        for worker, calling in callers.items():
            alike.setdefault((self.slowness.get(worker, 1.0), tuple(calling)), []).append(worker)
        self._groups = {replica: [] for replica in replicas}
        for (slowness, same_callers), workers in alike.items():
            group = Group(workers, slowness)
            for replica in same_callers:
                self._groups[replica].append(group)
        for step in self._steps.values():
            if step.is_over:
                continue
            step.groups = self._groups[step.replica]
            for group in step.groups:
                group.add(step, 1)
            if step.replica in self._stuck:
                step.stand_still(self.timeout_s, f"ffn-{self._stuck[step.replica]}")
            else:
                step.go_on()

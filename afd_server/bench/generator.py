"""The load generator: every request at its time or as soon as a place is free, and how well the generator itself kept up.

What lives here: pace, concurrency, deadlines. What does not: what is asked (dataset.py), HTTP (client.py), numbers
(statistics.py). A generator that is late measures itself, so it reports its own processor time and the delays of its event
loop, by which every time that it notes may be too long.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from afd_server.bench.client import Client
from afd_server.bench.dataset import Prompt
from afd_server.bench.outcome import UNFINISHED, Outcome
from afd_server.traffic import arrival_times

LOOK_EVERY_S = 0.01  # at how late the event loop is


@dataclass(frozen=True)
class Limits:
    """What bounds a run besides its schedule.

    max_concurrency: requests under way at a time; more wait for a place. until_s: none is sent later. patience_s: those that
    have not ended so long after the last was sent are given up. pause_s: for which the place of a request that failed stays
    taken.
    """

    max_concurrency: int | None = None
    until_s: float = math.inf
    patience_s: float | None = None
    pause_s: float = 0.0


@dataclass(frozen=True)
class Run:
    """What came of a schedule, in the order in which the requests ended.

    cpu_s: the generator's own, of one core. loop_late_s: by how much its event loop was late, sampled all the time.
    """

    outcomes: Sequence[Outcome]
    duration_s: float
    max_concurrent_requests: int
    cpu_s: float
    loop_late_s: Sequence[float]


def schedule(
    prompts: Sequence[Prompt], request_rate: float, burstiness: float = 1.0, seed: int | str = 0
) -> list[tuple[float, Prompt]]:
    """Each prompt with its time. An infinite rate sends all at once.

    Times are scaled so that the last request comes at the time that the rate says, as vLLM does it: the luck of few draws
    would change the load itself.
    """
    if math.isinf(request_rate):
        return [(0.0, prompt) for prompt in prompts]
    times = itertools.islice(arrival_times(request_rate, burstiness, random.Random(seed)), len(prompts))
    return replayed(list(zip(times, prompts, strict=True)), request_rate)


def replayed(
    timed: Sequence[tuple[float, Prompt]], request_rate: float = math.inf
) -> list[tuple[float, Prompt]]:
    """A schedule stretched or squeezed to a mean rate; an infinite one leaves it as it is."""
    last_s = timed[-1][0] if timed else 0.0
    scale = 1.0 if math.isinf(request_rate) or not last_s else len(timed) / request_rate / last_s
    return [(at_s * scale, prompt) for at_s, prompt in timed]


async def run(
    client: Client,
    timed: Iterable[tuple[float, Prompt]],
    limits: Limits = Limits(),
    on_outcome: Callable[[Outcome], None] = lambda _: None,
) -> Run:
    """Sends every request of a schedule and waits for all of them."""
    _allow_connections()
    began, cpu_began = time.perf_counter(), time.process_time()
    load = _Load(client, limits, on_outcome, lambda: time.perf_counter() - began)
    late_s: list[float] = []
    watch = asyncio.create_task(_watch_loop(late_s))
    try:
        await load.send_and_wait(iter(timed))
    finally:
        watch.cancel()
    return Run(
        load.outcomes,
        time.perf_counter() - began,
        load.most_under_way,
        time.process_time() - cpu_began,
        late_s or [0.0],
    )


class _Load:
    """The requests of one run that are under way."""

    def __init__(
        self,
        client: Client,
        limits: Limits,
        on_outcome: Callable[[Outcome], None],
        clock: Callable[[], float],
    ) -> None:
        self._client, self._limits, self._on_outcome, self._clock = client, limits, on_outcome, clock
        self._places = asyncio.Semaphore(limits.max_concurrency) if limits.max_concurrency else None
        self._under_way: set[asyncio.Task[None]] = set()
        self._is_giving_up = False
        self.outcomes: list[Outcome] = []
        self.most_under_way = 0

    async def send_and_wait(self, timed: Iterator[tuple[float, Prompt]]) -> None:
        async with asyncio.TaskGroup() as group:
            await self._send_all(timed, group)
            if self._under_way and self._limits.patience_s is not None:
                await asyncio.wait(list(self._under_way), timeout=self._limits.patience_s)
                self._is_giving_up = True
                for task in list(self._under_way):
                    task.cancel()

    async def _send_all(self, timed: Iterator[tuple[float, Prompt]], group: asyncio.TaskGroup) -> None:
        for due_s, prompt in timed:
            await asyncio.sleep(max(0.0, due_s - self._clock()))
            if self._places is not None:
                await self._places.acquire()
                due_s = max(due_s, self._clock())
            if self._clock() >= self._limits.until_s:
                return
            task = group.create_task(self._one(prompt, due_s))
            self._under_way.add(task)
            self.most_under_way = max(self.most_under_way, len(self._under_way))

    async def _one(self, prompt: Prompt, due_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            outcome = await self._client.send(prompt, due_s, self._clock)
        except asyncio.CancelledError:
            if not self._is_giving_up:
                raise
            outcome = Outcome(due_s, due_s, error=UNFINISHED, message="given up at the end of the run")
        finally:
            self._under_way.discard(task)
        self.outcomes.append(outcome)
        self._on_outcome(outcome)
        if self._places is not None:
            pause_s = 0.0 if outcome.is_complete else self._limits.pause_s
            asyncio.get_running_loop().call_later(pause_s, self._places.release)


async def _watch_loop(late_s: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + LOOK_EVERY_S
        await asyncio.sleep(LOOK_EVERY_S)
        late_s.append(max(0.0, loop.time() - due_s))


def _allow_connections() -> None:
    """As many open connections as the system grants this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""Simulated time: an asyncio event loop whose clock jumps to what happens next, and beside it a heap of plain events.

What lives here: the clock. What does not: what happens at a time. The router, admission and all that awaits run on the loop as
they are; the hops of a step, of which there are millions, are plain callbacks on the heap, at a tenth of the price of a task.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class Events:
    """Callbacks by time. now_s: seconds since the beginning; whoever runs the events moves it.

    woke: a callback has woken something that awaits on the loop, which is to run before the next event.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.woke = False
        self.num_run = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, at_s: float, callback: Callable[..., None], *args: Any) -> None:
        """Of events of one time, the one that was asked for first runs first."""
        self._number += 1
        heapq.heappush(self._heap, (at_s, self._number, callback, args))

    def run_until(self, limit_s: float) -> None:
        """Runs events up to a time, or to the first that wakes the loop."""
        heap, pop = self._heap, heapq.heappop
        self.woke = False
        while heap and heap[0][0] <= limit_s:
            self.now_s, _, callback, args = pop(heap)
            self.num_run += 1
            callback(*args)
            if self.woke:
                return
        if not math.isinf(limit_s):
            self.now_s = max(self.now_s, limit_s)


class _Jump:
    """Stands where an event loop waits for input: nothing comes from outside, and instead of waiting, time passes."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout != 0:
            limit_s = math.inf if timeout is None else self._events.now_s + timeout
            self._events.run_until(limit_s)
            assert timeout is not None or self._events.woke, "everyone waits and nothing is going to happen"
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Has no input or output, only time. events: plain callbacks in the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.events = Events()
        self._selector = _Jump(self.events)

    def time(self) -> float:
        return self.events.now_s

    def _process_events(self, event_list: list[Any]) -> None:
        """There is no input."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""


def current_events() -> Events:
    """Of the virtual loop that runs."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop), "this runs in simulated time only"
    return loop.events


def run_virtual(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """asyncio.run in simulated time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)

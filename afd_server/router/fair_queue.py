"""The order in which requests wait: by priority, and fairly between tenants of the same priority.

What lives here: that order. What does not: how long anyone may wait, and who is refused (admission.py, the only caller).

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): a request starts, in virtual time, when its tenant's request
before it ends, or now if the tenant has none, and takes as long as it costs. The earliest start goes first. So a tenant
with one request passes one with a hundred, two busy tenants get equal shares of the tokens, and the order is known at once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from afd_server.router.stream import Stream


@dataclass(slots=True, order=True)
class Waiting:
    """A request in the queue; compares by its turn. cost_tokens: what it takes from the others. end: in virtual time."""

    priority: int
    start: float
    number: int
    stream: Stream = field(compare=False)
    cost_tokens: float = field(compare=False)
    arrived_s: float = field(compare=False)
    end: float = field(compare=False)


class FairQueue:
    """Waiting requests, first to last."""

    def __init__(self) -> None:
        self._waiting: list[Waiting] = []
        self._now = 0.0
        self._ends: dict[str, float] = {}  # of each tenant's last request, in virtual time
        self._number = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting)

    def add(self, stream: Stream, cost_tokens: float, now_s: float) -> Waiting:
        """Gives the request its place, which only later ones of a better turn move back."""
        request = stream.request
        start = max(self._now, self._ends.get(request.tenant, 0.0))
        self._number += 1
        waiting = Waiting(
            request.priority, start, self._number, stream, cost_tokens, now_s, start + cost_tokens
        )
        self._ends[request.tenant] = waiting.end
        insort(self._waiting, waiting)
        return waiting

    def first(self) -> Waiting:
        return self._waiting[0]

    def last(self) -> Waiting:
        return self._waiting[-1]

    def ahead(self, waiting: Waiting) -> list[Waiting]:
        """Those whose turn comes before its own."""
        return self._waiting[: bisect_left(self._waiting, waiting)]

    def serve(self, waiting: Waiting) -> None:
        """Its turn has come."""
        self._now = max(self._now, waiting.start)
        self._take_out(waiting)

    def drop(self, waiting: Waiting) -> None:
        """It leaves without having been served: where it was its tenant's last, the tenant does not pay for it."""
        tenant = waiting.stream.request.tenant
        if self._ends.get(tenant) == waiting.end:
            self._ends[tenant] = waiting.start
        self._take_out(waiting)

    def _take_out(self, waiting: Waiting) -> None:
        place = bisect_left(self._waiting, waiting)
        assert self._waiting[place] is waiting, "it does not wait here"
        del self._waiting[place]
        if not self._waiting:  # nobody waits: nobody has had more than a fair share
            self._now, self._ends = 0.0, {}

"""Which attention replica serves a request, and how a request outlives that replica.

What lives here: the choice (the replica that knows the prompt's beginning, unless it is much busier than the least
loaded), the requests under way, and their move to another replica when theirs dies. What does not: how a replica is
reached (replica_client.py, transport/control.py) and what it does (engine/). Lives on the front-end's event loop.

A request that moves takes its prompt and its tokens so far with it. Its random numbers depend on its seed and the
position alone, so it goes on as if nothing had happened: the client sees a pause, and no token twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from afd_server.errors import ServingError, UnavailableError, WorkerDiedError, WorkerError
from afd_server.router.affinity import PrefixMemory
from afd_server.router.replica_client import ReplicaClient
from afd_server.types import GenerationRequest, ReplicaStats, ReplicaUpdate, RequestOutput

logger = logging.getLogger(__name__)

# How many requests more than the least loaded replica one may have and still be chosen for its cached prefix.
AFFINITY_SLACK = 4
# How long a request whose replica died waits for another one, or for the restart: loading weights takes its time.
FAILOVER_TIMEOUT_S = 120.0


@dataclass(slots=True, eq=False)
class _Flight:
    """A request under way. Its queue holds at most its own max_tokens: that bounds what a slow reader can leave."""

    request: GenerationRequest
    replica: _Replica | None = None
    token_ids: list[int] = field(default_factory=list)
    outputs: asyncio.Queue[RequestOutput | ServingError] = field(default_factory=asyncio.Queue)
    ended: bool = False
    deadline: asyncio.TimerHandle | None = None  # while it waits for a replica


@dataclass(slots=True, eq=False)
class _Replica:
    """One attention replica as it is now. `flights` are its requests; `reader` is None while it is gone."""

    client: ReplicaClient
    flights: dict[str, _Flight] = field(default_factory=dict)
    reader: asyncio.Task[None] | None = None


class Router:
    """`async with Router(clients) as router`, then `router.generate(request)`.

    on_stats is called with a replica's name and its state after each of its steps.
    """

    def __init__(
        self,
        clients: Sequence[ReplicaClient],
        on_stats: Callable[[str, ReplicaStats], None] | None = None,
        *,
        failover_timeout_s: float = FAILOVER_TIMEOUT_S,
    ) -> None:
        self._replicas = {client.worker: _Replica(client) for client in clients}
        self._on_stats = on_stats
        self._failover_timeout_s = failover_timeout_s
        self._prefixes = PrefixMemory()
        self._waiting: set[_Flight] = set()

    async def __aenter__(self) -> Self:
        for replica in self._replicas.values():
            self._listen(replica)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends what is under way with UnavailableError and lets go of every replica."""
        readers = [replica.reader for replica in self._replicas.values() if replica.reader]
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        for replica in self._replicas.values():
            for flight in list(replica.flights.values()):
                self._end(flight, UnavailableError("the server is shutting down"))
            replica.reader = None
            replica.client.close()
        for flight in list(self._waiting):
            self._end(flight, UnavailableError("the server is shutting down"))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """The request's outputs, the last one with a finish_reason. Closing the iterator early aborts the request.

        Raises UnavailableError when no replica is there to take it, or when its replica died and none came in time.
        """
        flight = _Flight(request)
        if not self._place(flight):
            raise UnavailableError("no attention worker is there to take the request")
        try:
            while True:
                output = await flight.outputs.get()
                if isinstance(output, ServingError):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if flight.replica is not None and not flight.ended:
                flight.replica.client.abort(request.request_id)
            self._forget(flight)

    def replace(self, name: str, client: ReplicaClient) -> None:
        """Replica `name` was restarted and is reached by this client now. Requests that wait for one are placed."""
        replica = self._replicas[name]
        if replica.reader is not None:  # it has not been noticed yet that the old one is gone
            self._lose(replica, WorkerDiedError(name, "was replaced"))
        replica.client = client
        self._listen(replica)
        for flight in list(self._waiting):
            self._place(flight)

    def health(self) -> list[str]:
        """One sentence for each replica that cannot be reached."""
        return [
            f"{name} is not connected" for name, replica in self._replicas.items() if replica.reader is None
        ]

    # --- the choice ------------------------------------------------------------------------------------------------

    def _place(self, flight: _Flight) -> bool:
        """Hands the request to the best replica. False when none is there."""
        while (replica := self._choose(flight.request)) is not None:
            request = dataclasses.replace(flight.request, resumed_output_token_ids=tuple(flight.token_ids))
            try:
                replica.client.submit(request)
            except WorkerError as error:
                self._lose(replica, error)
                continue
            self._forget(flight)
            flight.replica = replica
            replica.flights[request.request_id] = flight
            self._prefixes.note(request.prompt_token_ids, replica.client.worker)
            return True
        return False

    def _choose(self, request: GenerationRequest) -> _Replica | None:
        alive = [replica for replica in self._replicas.values() if replica.reader is not None]
        if not alive:
            return None
        least = min(alive, key=lambda replica: len(replica.flights))
        known = self._replicas.get(self._prefixes.find(request.prompt_token_ids) or "")
        if known in alive and len(known.flights) <= len(least.flights) + AFFINITY_SLACK:
            return known
        return least

    # --- what comes back -------------------------------------------------------------------------------------------

    def _listen(self, replica: _Replica) -> None:
        # Listening begins here and not when the task first runs: no update may be missed in between.
        updates = replica.client.updates()
        replica.reader = asyncio.create_task(
            self._read(replica, updates), name=f"router-{replica.client.worker}"
        )

    async def _read(self, replica: _Replica, updates: AsyncIterator[ReplicaUpdate]) -> None:
        try:
            async for update in updates:
                self._take(replica, update)
        except WorkerError as error:
            if replica.reader is asyncio.current_task():
                self._lose(replica, error)

    def _take(self, replica: _Replica, update: ReplicaUpdate) -> None:
        for output in update.outputs:
            flight = replica.flights.get(output.request_id)
            if flight is None:  # its reader left; the abort is on its way
                continue
            resumed = bool(flight.request.resumed_output_token_ids or flight.token_ids)
            flight.token_ids += output.token_ids
            if output.finish_reason is not None:
                flight.ended = True
                self._forget(flight)
            # Tokens that a replica finds in its cache after a move were told as computed before.
            flight.outputs.put_nowait(dataclasses.replace(output, cached_tokens=0) if resumed else output)
        if self._on_stats is not None:
            self._on_stats(replica.client.worker, update.stats)

    def _lose(self, replica: _Replica, error: WorkerError) -> None:
        """The replica is gone: its requests go to another one, or wait for the restart."""
        logger.warning("%s; %d requests move", error, len(replica.flights))
        if replica.reader is not None and replica.reader is not asyncio.current_task():
            replica.reader.cancel()
        replica.reader = None
        replica.client.close()
        for flight in list(replica.flights.values()):
            self._forget(flight)
            if not self._place(flight):
                self._wait(flight, error)

    def _wait(self, flight: _Flight, error: WorkerError) -> None:
        self._waiting.add(flight)
        too_late = UnavailableError(f"{error}; no other came within {self._failover_timeout_s:g} s")
        flight.deadline = asyncio.get_running_loop().call_later(
            self._failover_timeout_s, self._end, flight, too_late
        )

    def _end(self, flight: _Flight, error: ServingError) -> None:
        self._forget(flight)
        flight.ended = True
        flight.outputs.put_nowait(error)

    def _forget(self, flight: _Flight) -> None:
        """Takes the request out of every list that it is in."""
        self._waiting.discard(flight)
        if flight.deadline is not None:
            flight.deadline.cancel()
            flight.deadline = None
        if flight.replica is not None:
            flight.replica.flights.pop(flight.request.request_id, None)
            flight.replica = None

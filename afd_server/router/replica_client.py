"""How a router talks to one attention replica, wherever that runs.

What lives here: the verbs, and the client for a replica in this process. The one for a replica in another process is
transport.control.ControlClient. What does not: choosing between replicas (router.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from afd_server.types import GenerationRequest, ReplicaUpdate


class ReplicaClient(Protocol):
    """One replica. Used on one event loop; no verb but `updates` waits."""

    @property
    def worker(self) -> str:
        """The replica's name."""

    def submit(self, request: GenerationRequest) -> None:
        """Starts a request; its outputs come with `updates`. Raises WorkerDiedError when the replica is gone."""

    def abort(self, request_id: str) -> None:
        """Nobody waits for the request any more. Does nothing when it ended, or the replica is gone."""

    def updates(self) -> AsyncIterator[ReplicaUpdate]:
        """All that the replica tells, in order. Ends by WorkerError when the replica is gone."""

    def close(self) -> None:
        """Lets go of the replica."""


class Engine(Protocol):
    """What a local client hands requests to: engine.loop.EngineLoop. Both verbs may be called from any thread."""

    def submit(self, request: GenerationRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...


class LocalReplicaClient:
    """A replica on a thread of this process. It cannot die alone, so `updates` never ends.

    `deliver` is the engine's `on_update`; the engine is attached once it exists.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._engine: Engine | None = None
        self._receiver: tuple[asyncio.AbstractEventLoop, asyncio.Queue[ReplicaUpdate]] | None = None

    @property
    def worker(self) -> str:
        return self._worker

    def attach(self, engine: Engine) -> None:
        self._engine = engine

    def submit(self, request: GenerationRequest) -> None:
        assert self._engine is not None
        self._engine.submit(request)

    def abort(self, request_id: str) -> None:
        assert self._engine is not None
        self._engine.abort(request_id)

    def deliver(self, update: ReplicaUpdate) -> None:
        """Takes an update over from the engine's thread. Without a listener there is nobody to tell."""
        if self._receiver is None:
            return
        events, queue = self._receiver
        if not events.is_closed():
            events.call_soon_threadsafe(queue.put_nowait, update)

    def updates(self) -> AsyncIterator[ReplicaUpdate]:
        """Listens from now on, on the running event loop."""
        queue: asyncio.Queue[ReplicaUpdate] = asyncio.Queue()
        self._receiver = (asyncio.get_running_loop(), queue)
        return _items(queue)

    def close(self) -> None:
        """Stops listening; `updates` may be called again, on another event loop too."""
        self._receiver = None


async def _items(queue: asyncio.Queue[ReplicaUpdate]) -> AsyncIterator[ReplicaUpdate]:
    while True:
        yield await queue.get()

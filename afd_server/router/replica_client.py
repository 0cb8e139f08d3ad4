"""How the router reaches one attention replica: the verbs, and the client for a replica in the same process.

What lives here: `ReplicaClient` and `LocalReplicaClient`. What does not: the client over a connection, which is
transport/control.py's ControlClient, and any choice between replicas (router.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol

from afd_server.errors import UnavailableError, WorkerDiedError
from afd_server.types import GenerationRequest, ReplicaUpdate

if TYPE_CHECKING:
    from afd_server.engine.loop import EngineLoop


class ReplicaClient(Protocol):
    """One replica, as the router sees it. Used on one event loop."""

    worker: str
    """The replica's name."""

    def submit(self, request: GenerationRequest) -> None:
        """Sends a request and returns. Raises WorkerDiedError when the replica is gone."""

    def abort(self, request_id: str) -> None:
        """Says that nobody waits for the request any more. Never raises."""

    def updates(self) -> AsyncIterator[ReplicaUpdate]:
        """Every update from now on, in order. Ends by WorkerError when the replica is gone. Called once, at first."""

    def close(self) -> None:
        """The router leaves; the replica aborts what it had submitted."""


class LocalReplicaClient:
    """A replica in this process. It may be opened (`updates`) and closed again and again, on any event loop.

    Its memory: updates wait in a queue until the event loop comes to them, which it does before anything else can
    submit more, so there are never more of them than tokens of requests under way.
    """

    def __init__(self, name: str) -> None:
        self.worker = name
        self._engine_loop: EngineLoop | None = None
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Queue[ReplicaUpdate]] | None = None
        self._request_ids: set[str] = set()

    def attach(self, loop: EngineLoop) -> None:
        """The replica is running. It needs `deliver` to be made, and so comes after this client."""
        self._engine_loop = loop

    def deliver(self, update: ReplicaUpdate) -> None:
        """Hands an update to whoever is listening; without a listener it is dropped. Called on the engine's thread."""
        listener = self._listener
        if listener is not None:
            events, queue = listener
            with contextlib.suppress(RuntimeError):  # that event loop has ended, and with it whoever waited
                events.call_soon_threadsafe(queue.put_nowait, update)

    def submit(self, request: GenerationRequest) -> None:
        if self._engine_loop is None:
            raise WorkerDiedError(self.worker, "it has not been started")
        try:
            self._engine_loop.submit(request)
        except UnavailableError as error:
            raise WorkerDiedError(self.worker, str(error)) from None
        self._request_ids.add(request.request_id)

    def abort(self, request_id: str) -> None:
        self._request_ids.discard(request_id)
        if self._engine_loop is not None:
            self._engine_loop.abort(request_id)

    def updates(self) -> AsyncIterator[ReplicaUpdate]:
        # Not in the generator's body: what is submitted before its first step must already find the queue.
        queue: asyncio.Queue[ReplicaUpdate] = asyncio.Queue()
        self._listener = (asyncio.get_running_loop(), queue)
        return self._read(queue)

    async def _read(self, queue: asyncio.Queue[ReplicaUpdate]) -> AsyncIterator[ReplicaUpdate]:
        while True:
            update = await queue.get()
            self._request_ids.difference_update(
                output.request_id for output in update.outputs if output.finish_reason
            )
            yield update

    def close(self) -> None:
        self._listener = None
        for request_id in list(self._request_ids):
            self.abort(request_id)

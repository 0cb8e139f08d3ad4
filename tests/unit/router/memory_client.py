"""A replica for tests of the router: what it was told is recorded, what it says is said by the test."""

import asyncio

from afd_server.errors import WorkerDiedError
from afd_server.types import FinishReason, ReplicaStats, ReplicaUpdate, RequestOutput


class MemoryClient:
    def __init__(self, worker):
        self.worker = worker
        self.submitted, self.aborted = [], []
        self.closed = False
        self._dead = False
        self._updates = asyncio.Queue()

    # --- the router's side

    def submit(self, request):
        if self._dead:
            raise WorkerDiedError(self.worker, "the connection is closed")
        self.submitted.append(request)

    def abort(self, request_id):
        self.aborted.append(request_id)

    async def updates(self):
        while (update := await self._updates.get()) is not None:
            yield update
        raise WorkerDiedError(self.worker, "the connection ended")

    def close(self):
        self.closed = True

    # --- the replica's side

    def give(self, request_id, *token_ids, end=None, **fields):
        """An update with one output."""
        reason = FinishReason(end) if end else None
        output = RequestOutput(request_id, token_ids, finish_reason=reason, **fields)
        self._updates.put_nowait(ReplicaUpdate((output,), ReplicaStats(num_running=len(self.submitted))))

    def die(self):
        """The connection ends: noticed by whoever submits at once, by whoever reads when it comes to it."""
        self._dead = True
        self._updates.put_nowait(None)

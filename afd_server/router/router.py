"""Which attention replica serves a request, and what happens when that replica dies.

What lives here: the choice, and the requests under way. What does not: the replicas (engine/), how they are reached
(replica_client.py, transport/control.py), and their restart (cluster/, which calls `replace`). Called by the HTTP
front-end and by llm.py, on one event loop.

The choice: a replica's load is the prompt tokens that it has still to read plus REQUEST_TOKENS for every request under
way; from this go the tokens of the new prompt that its prefix cache should hold. The least wins. So a prompt goes where
its beginning is known, unless the queue there costs more than reading it again elsewhere.

After a death the requests of that replica go on elsewhere, with their output so far as known tokens. The random numbers
of sampling depend on seed and position alone, so the text is the one that was to come; the client notices a pause.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Self

from afd_server.errors import UnavailableError, WorkerError
from afd_server.router.admission import Admission, ReplicaLoad
from afd_server.router.affinity import PrefixMemory
from afd_server.router.replica_client import ReplicaClient
from afd_server.router.stream import Stream
from afd_server.telemetry.logs import about
from afd_server.types import GenerationRequest, ReplicaStats, ReplicaUpdate, RequestOutput

logger = logging.getLogger(__name__)

# What a request under way costs the others, in prompt tokens: it is in every step until it ends.
REQUEST_TOKENS = 64
# How long a request whose replica died waits for another one. A restart loads the model again.
FAILOVER_TIMEOUT_S = 120.0
# Between two looks whether a replica that drains has ended its requests.
DRAIN_POLL_S = 0.02


@dataclass(slots=True, eq=False)
class Replica:
    """A replica and the requests that it has, by id. down_since (monotonic seconds) and reason once it is lost; given_up
    when it will not come back; draining while it gets no more requests."""

    client: ReplicaClient
    streams: dict[str, Stream] = field(default_factory=dict)
    # Prompt tokens of those without output yet, by id, and their sum: with many replicas nobody has the time to count.
    reading: dict[str, int] = field(default_factory=dict)
    reading_tokens: int = 0
    reader: asyncio.Task[None] | None = None
    down_since: float | None = None
    reason: str = ""
    given_up: bool = False
    draining: bool = False
    stats: ReplicaStats = field(default_factory=ReplicaStats)

    @property
    def takes_requests(self) -> bool:
        return self.down_since is None and not self.draining

    @property
    def load(self) -> ReplicaLoad:
        """For admission."""
        return ReplicaLoad(
            self.client.worker, len(self.streams), len(self.reading), self.reading_tokens, self.stats.forecast
        )

    @property
    def load_tokens(self) -> int:
        return REQUEST_TOKENS * len(self.streams) + self.reading_tokens

    def take(self, stream: Stream) -> None:
        """It serves this request from now on."""
        self.streams[stream.request_id] = stream
        if not stream.has_output:
            self.reading[stream.request_id] = len(stream.request.prompt_token_ids)
            self.reading_tokens += self.reading[stream.request_id]

    def note_output(self, request_id: str) -> None:
        """The prompt has been read."""
        self.reading_tokens -= self.reading.pop(request_id, 0)

    def release(self, request_id: str) -> None:
        """It has the request no more."""
        del self.streams[request_id]
        self.note_output(request_id)

    def release_all(self) -> list[Stream]:
        released = list(self.streams.values())
        self.streams, self.reading, self.reading_tokens = {}, {}, 0
        return released


class Router:
    """All requests under way, and the replicas that serve them. An async context manager; open inside it only.

    on_stats: called with a replica's name and statistics after each of its updates. on_lost: with the name of a replica
    that was lost and the number of requests that it had.
    admission: what a request passes before it is placed; None: nothing.
    failover_timeout_s: how long a request may be without a live replica before it ends in UnavailableError.
    """

    def __init__(
        self,
        clients: Sequence[ReplicaClient],
        on_stats: Callable[[str, ReplicaStats], None] | None = None,
        on_lost: Callable[[str, int], None] | None = None,
        *,
        admission: Admission | None = None,
        failover_timeout_s: float = FAILOVER_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = {client.worker: Replica(client) for client in clients}
        self._on_stats = on_stats
        self._on_lost = on_lost
        self._admission = admission
        self._failover_timeout_s = failover_timeout_s
        self._clock = clock
        self._prefixes = PrefixMemory()
        # Every request under way, and among them those that no replica has.
        self._streams: dict[str, Stream] = {}
        self._orphans: dict[Stream, None] = {}
        self._closed = ""

    async def __aenter__(self) -> Self:
        for replica in self._replicas.values():
            self._start_reading(replica)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = "the server is shutting down"
        readers = [replica.reader for replica in self._replicas.values() if replica.reader is not None]
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        for replica in self._replicas.values():
            replica.client.close()
        for stream in self._streams.values():
            stream.keep_on()
            stream.fail(UnavailableError(self._closed))

    # --- requests --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """The request's outputs, the last of which has a finish_reason. No token comes twice; what waits together for the
        reader comes as one output.

        Closing the generator before that aborts the request at its replica, at once. Raises UnavailableError when for
        failover_timeout_s no replica has been there to take it, and when the router closes; OverloadedError when it is not
        admitted.
        """
        if self._closed:
            raise UnavailableError(self._closed)
        assert request.request_id not in self._streams, "request ids are unique"
        stream = self._streams[request.request_id] = Stream(request)
        try:
            if self._admission is None or self._is_given_up():
                self._place_or_wait(stream)
            else:
                self._admission.enter(stream, self)
            while True:
                output = await stream.next()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._leave(stream)

    # --- for admission ---------------------------------------------------------------------------------------------

    def loads(self) -> list[ReplicaLoad]:
        """Of every replica that takes requests."""
        return [replica.load for replica in self._replicas.values() if replica.takes_requests]

    def place(self, stream: Stream, among: Collection[str]) -> bool:
        """Submits the request to the best of these replicas; False when none of them lives."""
        return self._place(stream, among)

    # --- replicas --------------------------------------------------------------------------------------------------

    def replace(self, name: str, client: ReplicaClient) -> None:
        """Replica `name` was restarted and is reached by `client` now. Requests without a replica go on there."""
        old = self._replicas[name]
        self._lose(old, "it was replaced")
        if old.reader is not None:
            old.reader.cancel()
        self._prefixes.forget(name)
        self._open(client)

    def add(self, client: ReplicaClient) -> None:
        """A new replica takes requests, those without a replica first."""
        assert client.worker not in self._replicas, "names of replicas are unique"
        self._open(client)

    async def drain(self, name: str, timeout_s: float) -> None:
        """Replica `name` gets no more requests. Returns when those that it has have ended, or have been moved elsewhere
        because the time is over. `replace` ends the draining, `remove` the replica."""
        replica = self._replicas[name]
        replica.draining = True
        deadline = self._clock() + timeout_s
        while replica.streams and self._clock() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        self._move_streams(replica)

    def remove(self, name: str) -> None:
        """Replica `name` has left for good; what it still had goes on elsewhere."""
        replica = self._replicas.pop(name)
        if replica.reader is not None:
            replica.reader.cancel()
        self._move_streams(replica)
        replica.client.close()
        self._prefixes.forget(name)

    def give_up(self, name: str, reason: str) -> None:
        """Replica `name` will not come back. When there is no other, requests that wait for one end with this reason."""
        replica = self._replicas[name]
        self._lose(replica, reason)
        replica.given_up, replica.reason = True, reason
        if self._is_given_up():
            for stream in self._streams.values():  # no replica lives, so none of them runs
                stream.keep_on()
                stream.fail(UnavailableError(reason))

    def _is_given_up(self) -> bool:
        return all(replica.given_up for replica in self._replicas.values())

    def is_serving(self) -> bool:
        """Whether some replica can be reached."""
        return any(replica.down_since is None for replica in self._replicas.values())

    def lost(self) -> list[str]:
        """Names of the replicas that cannot be reached."""
        return [name for name, replica in self._replicas.items() if replica.down_since is not None]

    def health(self) -> list[str]:
        """One sentence for each replica that cannot be reached; none when all is well."""
        now = self._clock()
        return [
            f"{name} has been out of reach for {now - replica.down_since:.1f} s: {replica.reason}"
            for name, replica in self._replicas.items()
            if replica.down_since is not None and not replica.given_up  # whoever gave it up says so
        ]

    # --- inside ----------------------------------------------------------------------------------------------------

    def _open(self, client: ReplicaClient) -> None:
        replica = self._replicas[client.worker] = Replica(client)
        self._start_reading(replica)
        for stream in list(self._orphans):
            self._place(stream)
        self._advance()

    def _move_streams(self, replica: Replica) -> None:
        """The replica's requests go on elsewhere. What it still sends of them reaches nobody."""
        for stream in replica.release_all():
            replica.client.abort(stream.request_id)
            self._place_or_wait(stream)

    def _start_reading(self, replica: Replica) -> None:
        updates = replica.client.updates()
        # It outlives the request, to scale say, by which a replica has come: its log lines are not about that.
        replica.reader = asyncio.create_task(
            self._read(replica, updates), name=replica.client.worker, context=Context()
        )

    async def _read(self, replica: Replica, updates: AsyncIterator[ReplicaUpdate]) -> None:
        """Passes a replica's updates on until it dies."""
        try:
            async for update in updates:
                self._pass_on(replica, update)
            reason = "it sends no more updates"
        except WorkerError as error:
            reason = error.problem
        except Exception as error:  # requests must not wait for a task that has ended
            logger.exception("updates of %s cannot be passed on", replica.client.worker)
            reason = f"internal error: {type(error).__name__}: {error}"
        self._lose(replica, reason)

    def _advance(self) -> None:
        """A replica's load has changed: those who wait for admission may have their turn."""
        if self._admission is not None and not self._closed:
            self._admission.advance(self)

    def _pass_on(self, replica: Replica, update: ReplicaUpdate) -> None:
        replica.stats = update.stats
        for output in update.outputs:
            stream = replica.streams.get(output.request_id)
            if stream is None:
                continue  # its client has left
            stream.put(output)
            if stream.has_output:
                replica.note_output(output.request_id)
                if self._admission is not None:
                    self._admission.note_output(stream)
            if output.finish_reason is not None:
                replica.release(output.request_id)
                if self._admission is not None:
                    self._admission.note_end(stream.num_output_tokens)
        self._advance()
        if self._on_stats is not None:
            try:
                self._on_stats(replica.client.worker, update.stats)
            except Exception:  # a statistic is not worth a token
                logger.exception("statistics of %s cannot be passed on", replica.client.worker)

    def _place(self, stream: Stream, among: Collection[str] | None = None) -> bool:
        """Submits a request, or what is left of it, to the best live replica (of some); False when there is none."""
        while (replica := self._best_replica(stream.request.prompt_token_ids, among)) is not None:
            try:
                replica.client.submit(stream.resumed())
            except WorkerError as error:
                self._lose(replica, error.problem)
                continue
            replica.take(stream)
            self._prefixes.remember(stream.request.prompt_token_ids, replica.client.worker)
            self._orphans.pop(stream, None)
            stream.keep_on()
            return True
        return False

    def _place_or_wait(self, stream: Stream) -> None:
        """Where no replica lives the request waits for one that is restarted; it fails where none will be."""
        if self._place(stream):
            return
        if self._is_given_up():
            reasons = "; ".join(replica.reason for replica in self._replicas.values())
            stream.fail(UnavailableError(reasons))
            return
        self._orphans[stream] = None
        deaths = "; ".join(f"{name} died ({replica.reason})" for name, replica in self._replicas.items())
        stream.give_up_after(
            self._failover_timeout_s,
            f"no attention worker took over within {self._failover_timeout_s:g} s: {deaths}",
        )

    def _best_replica(
        self, prompt_token_ids: Sequence[int], among: Collection[str] | None = None
    ) -> Replica | None:
        known_tokens = self._prefixes.known_tokens(prompt_token_ids)
        return min(
            (
                replica
                for name, replica in self._replicas.items()
                if replica.takes_requests and (among is None or name in among)
            ),
            key=lambda replica: replica.load_tokens - known_tokens.get(replica.client.worker, 0),
            default=None,
        )

    def _lose(self, replica: Replica, reason: str) -> None:
        """The replica is gone: its requests go on elsewhere, or wait for the one that replaces it."""
        if replica.down_since is not None:
            return
        replica.down_since, replica.reason = self._clock(), reason
        replica.client.close()
        lost = replica.release_all()
        logger.error("%s is out of reach with %d requests: %s", replica.client.worker, len(lost), reason)
        if self._on_lost is not None:
            self._on_lost(replica.client.worker, len(lost))
        for stream in lost:
            with about(stream.request_id):
                logger.warning("the request goes on elsewhere, after %d tokens", stream.num_output_tokens)
            self._place_or_wait(stream)

    def _leave(self, stream: Stream) -> None:
        """Nobody reads this stream any more. If it has not ended, its replica is told."""
        stream.keep_on()
        self._orphans.pop(stream, None)
        if self._admission is not None:
            self._admission.leave(stream)
        del self._streams[stream.request_id]
        for replica in self._replicas.values():
            if replica.streams.get(stream.request_id) is stream:
                replica.release(stream.request_id)
                replica.client.abort(stream.request_id)
        self._advance()

"""The channel between the router and an attention replica: requests and aborts in, new tokens and statistics out.

Length-prefixed MessagePack over TCP, decoded into exactly the types of types.py, behind the same handshake as the
activation links. The replica is the server: a router whose connection is gone makes another and submits again what it
still wants. What was under way over the old one is aborted, and none of its output reaches the new one. What does not
live here: which replica a request goes to (router/) and what it does there (engine/).

Both ends run on an asyncio event loop; `ControlServer.publish` alone is called from the engine's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import msgspec

from afd_server.errors import ProtocolError, WorkerDiedError, WorkerError, WorkerTimeoutError
from afd_server.transport.base import Endpoint
from afd_server.transport.handshake import (
    CHALLENGE_BYTES,
    HANDSHAKE_TIMEOUT_S,
    MAX_CANDIDATES,
    HandshakeError,
    check_challenge,
    frame_bytes,
    new_challenge,
    new_hello,
    pack_hello,
    pack_rejection,
    pack_reply,
    unpack_hello,
    unpack_reply,
)
from afd_server.transport.keepalive import DEAD_AFTER_S, notice_dead_host
from afd_server.types import GenerationRequest, ReplicaUpdate, RequestOutput

logger = logging.getLogger(__name__)

# A prompt of a million tokens fits; a wild length does not.
MAX_FRAME_BYTES = 16 << 20
# What may lie unsent for one client: some minutes of tokens. A client further behind does not read any more.
MAX_UNSENT_BYTES = 32 << 20
# What may lie unsent for a replica. Requests beyond that wait as they are, and cost nothing besides.
MAX_BACKLOG_BYTES = 4 << 20

_LENGTH = struct.Struct("<I")


class Submit(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Start this request."""

    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Nobody waits for this request any more."""

    request_id: str


_encode = msgspec.msgpack.Encoder().encode
_decode_command = msgspec.msgpack.Decoder(Submit | Abort).decode
_decode_update = msgspec.msgpack.Decoder(ReplicaUpdate).decode


class FrameTooLongError(Exception):
    """A length prefix beyond MAX_FRAME_BYTES."""


class _Client:
    """One connected router: its writer, and the requests it has under way.

    engine_ids: what the engine calls each of them, by the router's own id.
    """

    def __init__(self, writer: asyncio.StreamWriter, max_unsent_bytes: int) -> None:
        self.engine_ids: dict[str, str] = {}
        self._writer = writer
        self._max_unsent_bytes = max_unsent_bytes

    def own_outputs(self, outputs: Iterable[RequestOutput]) -> Iterator[RequestOutput]:
        """Those of this client's requests, under its own ids. A request that ends is under way no more."""
        for output in outputs:
            request_id = _router_id(output.request_id)
            if self.engine_ids.get(request_id) == output.request_id:
                if output.finish_reason is not None:
                    del self.engine_ids[request_id]
                yield replace(output, request_id=request_id)

    def write(self, frame: bytes) -> None:
        """Queues a frame without waiting. A client that does not read loses its connection."""
        transport = self._writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() + len(frame) > self._max_unsent_bytes:
            logger.warning("a router that does not read its updates is dropped")
            self.drop()
            return
        self._writer.write(frame)

    def drop(self) -> None:
        """Ends the connection at once, with whatever is unsent."""
        self._writer.transport.abort()


class ControlServer:
    """The replica's end. Made anywhere; `start` and `close` run on the event loop that carries the connections.

    on_submit, on_abort: called on that loop; they must not block. on_abort also comes for every request under way of a
    client that disconnects. What on_submit raises is logged and drops the client.

    Both, and `publish`, name a request by an engine id, which no two submissions share. A router submits a request again
    under the same id when its connection breaks, while the engine, in the middle of a step, still has the first
    submission: neither the late tokens of that one nor its end may be taken for the second one's.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        name: str,
        node: str,
        host: str = "127.0.0.1",
        on_submit: Callable[[GenerationRequest], None],
        on_abort: Callable[[str], None],
        max_unsent_bytes: int = MAX_UNSENT_BYTES,
    ) -> None:
        self._secret = secret
        self._name, self._node, self._host = name, node, host
        self._on_submit, self._on_abort = on_submit, on_abort
        self._max_unsent_bytes = max_unsent_bytes
        self._candidates: dict[_Client, None] = {}  # have not introduced themselves yet; in order of arrival
        self._clients: set[_Client] = set()
        self._submissions = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Starts to listen. Raises OSError when the host is not this machine's."""
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self._loop = asyncio.get_running_loop()

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens. Only after `start`."""
        assert self._server is not None, "the control server has not been started"
        port = self._server.sockets[0].getsockname()[1]
        return Endpoint(self._name, self._node, None, self._host, port)

    def publish(self, update: ReplicaUpdate) -> None:
        """Sends every client the statistics and the outputs of its own requests. Any thread; never blocks.

        What nobody is there to hear is dropped: outputs of a client that left, of a request that its client has aborted,
        and everything before `start`.
        """
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the event loop ended: so did every connection
                self._loop.call_soon_threadsafe(self._publish, update)

    async def close(self) -> None:
        """Stops listening and ends every connection."""
        self._loop = None
        if self._server is not None:
            self._server.close()
        for client in [*self._candidates, *self._clients]:
            client.drop()

    def _publish(self, update: ReplicaUpdate) -> None:
        for client in list(self._clients):
            client.write(_frame(ReplicaUpdate(tuple(client.own_outputs(update.outputs)), update.stats)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        client = _Client(writer, self._max_unsent_bytes)
        try:
            # Both ends read whatever comes, on event loops that do nothing for long.
            notice_dead_host(writer.get_extra_info("socket"), peer_reads_at_once=True)
            await self._introduce(client, reader, writer)
            self._clients.add(client)
            while True:
                self._carry_out(client, _decode_command(await _read_frame(reader)))
        except TimeoutError:
            logger.warning("%s: %s has not replied for %g s and is dropped", self._name, peer, DEAD_AFTER_S)
        except (EOFError, OSError):
            pass  # it left
        except (HandshakeError, FrameTooLongError, msgspec.MsgspecError, ValueError) as error:
            logger.warning("%s: %s does not follow the protocol and is dropped: %s", self._name, peer, error)
        except Exception:
            logger.exception("%s: a command of %s failed; it is dropped", self._name, peer)
        finally:
            self._clients.discard(client)
            client.drop()
            for engine_id in client.engine_ids.values():
                self._on_abort(engine_id)

    async def _introduce(
        self, client: _Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Returns when the peer has proved itself. Raises HandshakeError, EOFError, OSError."""
        if len(self._candidates) >= MAX_CANDIDATES:
            logger.warning("%s: too many connections do not introduce themselves; one is dropped", self._name)
            oldest = next(iter(self._candidates))
            del self._candidates[oldest]
            oldest.drop()
        self._candidates[client] = None
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await self._welcome(reader, writer)
        except TimeoutError:
            raise HandshakeError(f"it did not introduce itself within {HANDSHAKE_TIMEOUT_S:g} s") from None
        finally:
            self._candidates.pop(client, None)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        challenge = new_challenge()
        writer.write(challenge)
        frame = await _read_handshake(reader)
        try:
            hello = unpack_hello(self._secret, challenge, frame)
        except HandshakeError:
            writer.write(pack_rejection())
            await writer.drain()
            raise
        refusal = "" if hello.purpose == "control" else "this is a control channel, it carries no activations"
        writer.write(pack_reply(self._secret, challenge, hello.nonce, refusal))
        await writer.drain()
        if refusal:
            raise HandshakeError(refusal)

    def _carry_out(self, client: _Client, command: Submit | Abort) -> None:
        if isinstance(command, Abort):
            engine_id = client.engine_ids.pop(command.request_id, None)
            if engine_id is not None:
                self._on_abort(engine_id)
            return
        request_id = command.request.request_id
        if request_id in client.engine_ids:
            raise ValueError(f"request {request_id} is under way already")
        engine_id = client.engine_ids[request_id] = _engine_id(next(self._submissions), request_id)
        self._on_submit(replace(command.request, request_id=engine_id))


class ControlClient:
    """The router's end, to one replica. `submit` and `abort` queue and return; `updates` brings what comes back.

    A replica that reads slowly, or is sent much at once, is no dead one: requests wait here, in order, until it has read.
    Whether it lives is for `updates` and for heartbeats to tell.
    """

    def __init__(self, worker: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Use `connect`."""
        self.worker = worker
        self._reader, self._writer = reader, writer
        writer.transport.set_write_buffer_limits(high=MAX_BACKLOG_BYTES)
        self._waiting: dict[str, GenerationRequest] = {}
        self._passing_on: asyncio.Task[None] | None = None  # while requests wait

    @classmethod
    async def connect(cls, endpoint: Endpoint, secret: bytes, timeout_s: float) -> ControlClient:
        """Raises WorkerDiedError (nobody listens), WorkerTimeoutError, or ProtocolError (other secret or protocol)."""
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
                notice_dead_host(writer.get_extra_info("socket"), peer_reads_at_once=True)
                challenge = await reader.readexactly(CHALLENGE_BYTES)
                check_challenge(challenge)
                hello = new_hello("control")
                writer.write(pack_hello(secret, challenge, hello))
                unpack_reply(secret, challenge, hello, await _read_handshake(reader))
                return cls(endpoint.worker, reader, writer)
        except BaseException as error:
            if writer is not None:
                writer.transport.abort()
            known = _explained(endpoint.worker, error, timeout_s)
            if known is None:
                raise
            raise known from None

    def submit(self, request: GenerationRequest) -> None:
        """Sends a request; its outputs come with `updates`. Raises WorkerDiedError when the replica is gone."""
        if self._passing_on is None and self._writer.transport.get_write_buffer_size() < MAX_BACKLOG_BYTES:
            self._send(Submit(request))
            return
        self._check_open()
        self._waiting[request.request_id] = request
        if self._passing_on is None:
            self._passing_on = asyncio.create_task(self._pass_on())

    def abort(self, request_id: str) -> None:
        """Says that nobody waits for the request any more: no output of it comes but what is on its way already.

        Does nothing when it ended, or the replica is gone.
        """
        if self._waiting.pop(request_id, None) is None:
            with contextlib.suppress(WorkerDiedError):
                self._send(Abort(request_id))

    async def updates(self) -> AsyncIterator[ReplicaUpdate]:
        """Every update from the replica, in order, until the connection ends: then it raises WorkerDiedError.

        A replica that dies ends it at once, a host that is gone within 20 s (keepalive.py). ProtocolError when it
        sends something else. A replica that hangs is not noticed: it is as silent as an idle one, and there is no deadline.
        """
        while True:
            try:
                yield _decode_update(await _read_frame(self._reader))
            except (EOFError, OSError) as error:
                self.close()
                raise WorkerDiedError(self.worker, "the control connection ended") from error
            except (FrameTooLongError, msgspec.MsgspecError, ValueError) as error:
                self.close()
                raise ProtocolError(self.worker, f"an update cannot be read: {error}") from None

    def close(self) -> None:
        """Ends the connection; the replica aborts this client's requests."""
        self._waiting.clear()
        self._writer.close()

    def _send(self, command: Submit | Abort) -> None:
        self._check_open()
        self._writer.write(_frame(command))

    def _check_open(self) -> None:
        if self._writer.transport.is_closing():
            raise WorkerDiedError(self.worker, "the control connection is closed")

    async def _pass_on(self) -> None:
        """Sends what waits, as the replica reads. Ends with the connection, of which `updates` tells."""
        try:
            while self._waiting:
                await self._writer.drain()
                while self._waiting and self._writer.transport.get_write_buffer_size() < MAX_BACKLOG_BYTES:
                    self._send(Submit(self._waiting.pop(next(iter(self._waiting)))))
        except (OSError, WorkerDiedError):
            self._waiting.clear()
        finally:
            self._passing_on = None


def _engine_id(submission: int, request_id: str) -> str:
    return f"{submission}:{request_id}"


def _router_id(engine_id: str) -> str:
    return engine_id.partition(":")[2]


def _frame(message: Any) -> bytes:
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_FRAME_BYTES:
        raise FrameTooLongError(f"a message of {length} bytes")
    return await reader.readexactly(length)


async def _read_handshake(reader: asyncio.StreamReader) -> bytes:
    received = b""
    while len(received) < (length := frame_bytes(received)):
        received += await reader.readexactly(length - len(received))
    return received


def _explained(worker: str, error: BaseException, timeout_s: float) -> WorkerError | None:
    """A failed connection in this server's own terms; None for what is not one (a cancellation, a bug)."""
    if isinstance(error, TimeoutError):
        return WorkerTimeoutError(worker, f"no control connection within {timeout_s:g} s")
    if isinstance(error, HandshakeError):
        return ProtocolError(worker, f"no control connection: {error}")
    if isinstance(error, (EOFError, OSError)):
        return WorkerDiedError(worker, f"cannot be reached: {error}")
    return None

"""One client's connection, bounded: how large a request's head may be, and how long its sender or reader may be silent.

What lives here: what uvicorn's own protocol leaves open. What does not: the bound on a body (gate.py) and what a client
that leaves had asked for (streaming.py), whose work ends with its connection. Made by server.py for each connection.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from afd_server.api.errors import error_body
from afd_server.api.request_ids import request_id_of
from afd_server.telemetry.logs import about

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 1024  # request line and headers
MAX_HEADERS = 100
# Requests that wait on one connection for the one before them.
MAX_PIPELINED = 8
# What a client must take of its answer within the timeout, once more of it waits than the sockets hold.
LEAST_READ_BYTES = 64 * 1024
# Looks at a connection within one timeout: how exact its end is.
LOOKS = 4


class Connection(HttpToolsProtocol):
    """timeout_s: within it a request must arrive, from its first byte to its last, and a client that has stopped reading
    its answer must go on. Whoever does not is dropped, and what the machine did for it ends."""

    def __init__(self, *args: Any, timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timeout_s = timeout_s
        self._in_head = self._in_body = False
        self._unfinished_bytes = self._header_bytes = self._num_headers = 0
        self._refusal = (400, "this is not an HTTP request")
        # Since when the client is the one to send, None while the server works for it; monotonic seconds.
        self._client_owes_since: float | None = None
        self._unread: tuple[float, int] | None = None  # since when this many bytes wait to be read
        self._next_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._client_owes_since = self.loop.time()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        super().connection_lost(exc)

    # --- what comes in ---------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        had_begun = self._in_head
        super().data_received(data)
        if had_begun and self._in_head and not self.transport.is_closing():
            self._unfinished_bytes += len(data)
            if self._unfinished_bytes > MAX_HEAD_BYTES:
                self._refusal = (431, f"the head of the request is longer than {MAX_HEAD_BYTES} bytes")
                self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._unfinished_bytes = self._header_bytes = self._num_headers = 0
        self._client_owes_since = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._header_bytes += len(name) + len(value)
        if self._num_headers > MAX_HEADERS:
            self._stop_parsing(431, f"there are more than {MAX_HEADERS} headers")
        if self._header_bytes > MAX_HEAD_BYTES:
            self._stop_parsing(431, f"the headers are longer than {MAX_HEAD_BYTES} bytes")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop_parsing(429, f"more than {MAX_PIPELINED} requests wait on one connection")
        if len(self.url) > MAX_HEAD_BYTES:
            self._stop_parsing(414, f"the URL is longer than {MAX_HEAD_BYTES} bytes")
        super().on_headers_complete()
        self._in_head, self._in_body = False, True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False
        is_answered = self.cycle.response_complete  # before its end: a body that was too large, say
        self._client_owes_since = self.loop.time() if is_answered else None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._client_owes_since is None:
            self._client_owes_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's word for a request that the parser gave up."""
        self._refuse()

    def _stop_parsing(self, status: int, reason: str) -> None:
        self._refusal = (status, reason)
        raise ValueError(reason)  # the parser hands it on as its own error

    def _refuse(self) -> None:
        """Ends the connection, with an answer where one cannot be taken for that of an earlier request."""
        status, reason = self._refusal
        logger.info("a connection of %s was ended: %s", self.client, reason)
        if self._in_body:
            may_answer = not self.pipeline and not self.cycle.response_started
        else:
            may_answer = self.cycle is None or self.cycle.response_complete
        if not may_answer:
            self.transport.abort()
            return
        body = msgspec.json.encode(error_body(reason, type="invalid_request_error"))
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    # --- time ------------------------------------------------------------------------------------------------------

    def _look_later(self) -> None:
        self._next_look = self.loop.call_later(self._timeout_s / LOOKS, self._look)

    def _look(self) -> None:
        now = self.loop.time()
        if self._has_stopped_reading(now):
            with about(request_id_of(self.cycle.scope) if self.cycle is not None else ""):
                logger.info("%s has not read its answer for %g s and is dropped", self.client, self._timeout_s)
            self.transport.abort()
            return
        if not self.transport.is_closing() and self._has_stopped_sending(now):
            self._refusal = (408, f"the request was not complete within {self._timeout_s:g} s")
            if self._in_head or self._in_body:
                self._refuse()
            else:
                self.transport.close()
        self._look_later()  # also at one that is closing: its last bytes may lie unread

    def _has_stopped_reading(self, now: float) -> bool:
        waiting_bytes = self.transport.get_write_buffer_size()
        if not waiting_bytes or not (self.flow.write_paused or self.transport.is_closing()):
            self._unread = None
            return False
        if self._unread is None or waiting_bytes <= self._unread[1] - LEAST_READ_BYTES:
            self._unread = (now, waiting_bytes)
        return now - self._unread[0] >= self._timeout_s

    def _has_stopped_sending(self, now: float) -> bool:
        if self._client_owes_since is None:
            return False
        earlier_runs = not self._in_body and self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or earlier_runs:
            self._client_owes_since = now  # nothing is read from it meanwhile
        return now - self._client_owes_since >= self._timeout_s

"""Sending the answer: as one JSON body, or as server-sent events while it grows.

What lives here: the order of chunks, and what happens when the client leaves: its work ends at once. What does not:
the chunks' content (answers/). Source of the event format: html.spec.whatwg.org, server-sent events.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from afd_server.api.answers.answer import Answer, Usage, joined
from afd_server.api.errors import describe
from afd_server.api.generation import Piece
from afd_server.api.protocol.generation import GenerationFields
from afd_server.errors import ServingError, UnavailableError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
# Characters that JSON lets stand, and at which clients cut lines that read them by str.splitlines (httpx does).
LINE_ENDS = {end.encode(): f"\\u{ord(end):04x}".encode() for end in "\x85\u2028\u2029"}
FAREWELL_TIMEOUT_S = 1.0
# From so many prompt tokens on, their log-probabilities are written on another thread, so that the streams of others go on.
MANY_LOGPROBS = 1000


class ClientLeftError(Exception):
    """The client closed its connection before its answer was ready."""


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled, and awaited to its end, when the client disconnects first.

    `receive` belongs to a request whose body has been read. Raises ClientLeftError, and UnavailableError when the
    server ends and waits no longer (it cancels the request's task then).
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_until_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if watching.done():  # first: a server may say it only once
            raise ClientLeftError
        return working.result()
    except asyncio.CancelledError:
        raise UnavailableError("the server is shutting down") from None
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(pieces: AsyncGenerator[Piece, None], answer: Answer, usage: Usage) -> dict[str, Any]:
    """The whole answer, when every choice has ended. Raises ServingError."""
    of_choice: dict[int, list[Piece]] = defaultdict(list)
    async with aclosing(pieces):
        async for piece in pieces:
            usage.add(piece)
            of_choice[piece.choice.index].append(piece)
    whole = {index: joined(parts) for index, parts in of_choice.items()}
    if sum(len(piece.prompt_logprobs) for piece in whole.values()) > MANY_LOGPROBS:
        return await asyncio.to_thread(answer.whole, whole, usage)
    return answer.whole(whole, usage)


async def events(
    pieces: AsyncGenerator[Piece, None], answer: Answer, usage: Usage, body: GenerationFields
) -> AsyncGenerator[bytes, None]:
    """The answer as events. A failure before the first one is raised; later ones become the stream's last event."""
    options = body.stream_options
    with_usage = options is not None and options.include_usage
    always = with_usage and options is not None and options.continuous_usage_stats
    opened: set[int] = set()
    begun = False

    def event(chunk: dict[str, Any]) -> bytes:
        nonlocal begun
        begun = True
        if with_usage and "usage" not in chunk:  # OpenAI: null in every chunk but the last
            chunk["usage"] = usage.body() if always else None
        return encoded(chunk)

    try:
        async with aclosing(pieces):
            async for piece in pieces:
                usage.add(piece)
                if piece.choice.index not in opened:
                    opened.add(piece.choice.index)
                    opening = answer.opening(piece.choice)
                    if opening is not None:
                        yield event(opening)
                if _worth_sending(piece, body) and (chunk := answer.chunk(piece)) is not None:
                    yield event(chunk)
    except Exception as error:
        if not begun:
            raise
        if not isinstance(error, ServingError):
            logger.exception("a stream failed")
        yield encoded(describe(error)[1])
        return
    if with_usage:
        yield event(answer.last(usage))
    yield DONE


class InParts(Protocol):
    """An answer whose events have names of their own (their `type`), made of parts."""

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]: ...

    def whole(self) -> dict[str, Any]:
        """After the last piece was taken."""
        ...

    def failure(self, error: Exception) -> dict[str, Any]:
        """The last event of a stream that has failed."""
        ...


async def collect_parts(pieces: AsyncGenerator[Piece, None], answer: InParts) -> dict[str, Any]:
    """The whole answer, when its choice has ended. Raises ServingError."""
    async with aclosing(pieces):
        async for piece in pieces:
            for _ in answer.take(piece):
                pass
    return answer.whole()


async def events_of_parts(pieces: AsyncGenerator[Piece, None], answer: InParts) -> AsyncGenerator[bytes, None]:
    """The answer as named events. A failure before the first one is raised; later ones become the stream's last event."""
    begun = False
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                for event in answer.take(piece):
                    begun = True
                    yield named(event)
    except Exception as error:
        if not begun:
            raise
        if not isinstance(error, ServingError):
            logger.exception("a stream failed")
        yield named(answer.failure(error))


def named(event: dict[str, Any]) -> bytes:
    return b"event: " + event["type"].encode() + b"\n" + encoded(event)


def _worth_sending(piece: Piece, body: GenerationFields) -> bool:
    return bool(piece.text or piece.finish_reason or piece.logprobs or body.return_token_ids)


def encoded(chunk: dict[str, Any]) -> bytes:
    """An event of one line, whatever its reader takes for the end of one."""
    data = msgspec.json.encode(chunk)
    for end, escaped in LINE_ENDS.items():
        data = data.replace(end, escaped)
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """An answer of events. `first` was awaited before the status line is sent, so that early failures have theirs."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # unknown; the server sends chunks
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self._send_all(send))
        except UnavailableError as error:
            # The server waits no longer, least of all for a client that does not read.
            with suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_TIMEOUT_S):
                    await _send_part(send, encoded(describe(error)[1]))
                    await _send_part(send, b"", more=False)
        except (ClientLeftError, OSError):
            logger.debug("a client left its stream")

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send_part(send, self._first)
            async for event in self._rest:
                await _send_part(send, event)
        await _send_part(send, b"", more=False)


async def _send_part(send: Send, part: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": more})

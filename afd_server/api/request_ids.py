"""X-Request-Id: taken from the client, or made; given back with every answer; in every log line of the request.

What lives here: the header. What does not: the request's own id, which is made of it (admission.py) and goes to the workers.
Plain ASGI, before everything else, so that refusals and failures have it too.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afd_server.telemetry.logs import concerning

HEADER = "X-Request-Id"
REQUEST_ID = "afd.request_id"
WELL_FORMED = re.compile(rb"[\x21-\x7e]{1,128}")


def request_id_of(scope: Mapping[str, object]) -> str:
    """The id that the answer will carry, "" before it has one."""
    return str(scope.get(REQUEST_ID, ""))


def name_by_body(scope: Scope, request_id: str | None) -> str:
    """The id of a request whose body asks for this one: as in vLLM, the header is stronger."""
    if request_id is not None and _sent(scope) is None:
        _name(scope, request_id)
    return request_id_of(scope)


class RequestIds:
    """Names every request. What a client sends and is no id (1 to 128 printable characters) is replaced, as if it were missing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _name(scope, _sent(scope) or secrets.token_hex(16))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id_of(scope)
            await send(message)

        await self._app(scope, receive, send_with_id)


def _name(scope: Scope, request_id: str) -> None:
    scope[REQUEST_ID] = request_id
    concerning(request_id)


def _sent(scope: Scope) -> str | None:
    sent = dict(scope["headers"]).get(HEADER.lower().encode(), b"")
    return sent.decode() if WELL_FORMED.fullmatch(sent) else None

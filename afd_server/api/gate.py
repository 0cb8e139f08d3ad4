"""What stands before every route: the key and its limit of requests, and the bound on a body's size.

Plain ASGI, so that nothing of a refused request is read or parsed, and streams pass through untouched.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afd_server.api.errors import error_body, error_response, in_form_of
from afd_server.api.keys import ApiKey, KeyRing
from afd_server.api.rate_limits import Allowance, Allowances
from afd_server.errors import RateLimitError

ALLOWANCE = "afd.allowance"
ACCESS = "afd.access"


@dataclass(frozen=True, slots=True)
class Access:
    """What a request's sender may do here: ask the model (/v1), operate the server (/admin)."""

    asks_for_key: bool
    may_ask: bool
    may_operate: bool


def access_of(scope: Scope) -> Access:
    access: Access = scope[ACCESS]
    return access


def tenant_of(scope: Scope) -> str:
    """The name of the API key that a request came with, "" where none is asked for."""
    allowance = allowance_of(scope)
    return "" if allowance is None else allowance.key.name


def allowance_of(scope: Scope) -> Allowance | None:
    """What that key may use, None where none is asked for."""
    allowance: Allowance | None = scope.get(ALLOWANCE)
    return allowance


class Gate:
    """Lets a request pass, or answers it itself: 401 below /v1 and /admin without a key, 429 for one at its limit of requests,
    413 for a body that says it is too large. A body that turns out too large while it is read ends in 413 too. An operator's
    keys alone open /admin; where no key is asked for, /admin is for this host."""

    def __init__(
        self, app: ASGIApp, keys: KeyRing, allowances: Allowances, max_body_bytes: int, root_path: str
    ) -> None:
        self._app = app
        self._keys = keys
        self._allowances = allowances
        self._max_body_bytes = max_body_bytes
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = self._root_path
        headers = dict(scope["headers"])
        key = self._key_of(headers)
        access = scope[ACCESS] = self._access(scope, headers, key)
        refusal = self._refusal(scope, headers, access)
        if refusal is None and key is not None:
            allowance = scope[ALLOWANCE] = self._allowances.of(key)
            send = _with_headers(send, allowance)
            refusal = self._refusal_at_limit(scope, allowance)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, bounded, send)

    def _access(self, scope: Scope, headers: dict[bytes, bytes], key: ApiKey | None) -> Access:
        if self._keys.is_asked_for:
            return Access(True, key is not None, key is not None and key.is_operator)
        return Access(False, True, _is_from_here(scope, headers))

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], access: Access) -> JSONResponse | None:
        path = _route(scope)
        for_operators = path.startswith("/admin")
        if (for_operators or path.startswith("/v1")) and not access.may_ask:
            body = error_body(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                type="authentication_error",
                code="invalid_api_key",
            )
            return JSONResponse(in_form_of(path, 401, body), 401, {"WWW-Authenticate": "Bearer"})
        if for_operators and not access.may_operate:
            if access.asks_for_key:
                return _forbidden("this API key does not open /admin: an operator's does")
            return _forbidden("without --api-key, /admin is for clients on the server's own host")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            body = error_body(self._too_large(), type="invalid_request_error")
            return JSONResponse(in_form_of(path, 413, body), 413)
        return None

    def _refusal_at_limit(self, scope: Scope, allowance: Allowance) -> JSONResponse | None:
        """What is asked of the model counts as a request, whatever comes of it."""
        if scope["method"] == "POST" and _route(scope).startswith("/v1"):
            try:
                allowance.admit_request()
            except RateLimitError as error:
                return error_response(error, scope["path"])
        return None

    def _key_of(self, headers: dict[bytes, bytes]) -> ApiKey | None:
        """The key that came with a request, if it is one of ours."""
        scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            sent = headers.get(b"x-api-key", b"")  # as Anthropic's clients send it
        return self._keys.find(sent.strip()) if sent and self._keys.is_asked_for else None

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_body_bytes} bytes"


def _with_headers(send: Send, allowance: Allowance) -> Send:
    """Every answer tells what is left to the key, as OpenAI's do."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(allowance.headers())
        await send(message)

    return send_with_headers


def _route(scope: Scope) -> str:
    """The path as the routes have it: a proxy may have left --root-path before it, or have taken it away."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and (path + "/").startswith(root + "/") else path


def _forbidden(message: str) -> JSONResponse:
    return JSONResponse(error_body(message, type="authentication_error", code="forbidden"), 403)


def _is_from_here(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether a program on this host asks for itself: not for others, as a proxy does, nor for another's page, as a browser does."""
    if any(name in headers for name in (b"forwarded", b"x-forwarded-for", b"origin")):
        return False
    # A browser names no origin where a page shows an image of ours, say.
    if headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        return False
    try:
        address = ipaddress.ip_address(scope["client"][0])
    except (KeyError, TypeError, ValueError):
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback

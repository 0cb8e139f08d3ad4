"""What stands before every route: the key, and the bound on a body's size.

Plain ASGI, so that nothing of a refused request is read or parsed, and streams pass through untouched.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afd_server.api.errors import error_body
from afd_server.config import separate_keys

TENANT = "afd.tenant"
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
    """The identity of the API key that a request came with, "" where none is asked for. It does not tell the key."""
    tenant: str = scope.get(TENANT, "")
    return tenant


class Gate:
    """Lets a request pass, or answers it itself: 401 below /v1 and /admin without a key, 413 for a body that says it is
    too large. A body that turns out too large while it is read ends in 413 too. Of several keys the first one alone opens
    /admin; without a key, /admin is for this host."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._keys = [] if api_key is None else [key.encode() for key in separate_keys(api_key)]
        self._max_body_bytes = max_body_bytes
        # A key of this process: who sees an identity, in a log or a memory dump, cannot try keys on it.
        self._identity_key = secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        key = self._key_of(headers)
        access = scope[ACCESS] = self._access(scope, headers, key)
        refusal = self._refusal(scope, headers, access)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if key is not None:
            scope[TENANT] = hashlib.blake2b(key, key=self._identity_key, digest_size=8).hexdigest()
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, bounded, send)

    def _access(self, scope: Scope, headers: dict[bytes, bytes], key: bytes | None) -> Access:
        if self._keys:
            return Access(True, key is not None, key == self._keys[0])
        return Access(False, True, _is_from_here(scope, headers))

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], access: Access) -> JSONResponse | None:
        for_operators = scope["path"].startswith("/admin")
        if (for_operators or scope["path"].startswith("/v1")) and not access.may_ask:
            body = error_body(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                type="authentication_error",
                code="invalid_api_key",
            )
            return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        if for_operators and not access.may_operate:
            if access.asks_for_key:
                return _forbidden("this API key does not open /admin: the first of --api-key does")
            return _forbidden("without --api-key, /admin is for clients on the server's own host")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return JSONResponse(error_body(self._too_large(), type="invalid_request_error"), 413)
        return None

    def _key_of(self, headers: dict[bytes, bytes]) -> bytes | None:
        """The key that came with a request, if it is one of ours."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # In constant time: how long it takes must not tell how much of a guess was right, nor of which key.
        matching = [key for key in self._keys if hmac.compare_digest(given.strip(), key)]
        return matching[0] if matching and scheme.lower() == b"bearer" else None

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_body_bytes} bytes"


def _forbidden(message: str) -> JSONResponse:
    return JSONResponse(error_body(message, type="authentication_error", code="forbidden"), 403)


def _is_from_here(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether a program on this host asks for itself: not for others, as a proxy does, nor for a page, as a browser does."""
    if any(name in headers for name in (b"forwarded", b"x-forwarded-for", b"origin")):
        return False
    try:
        address = ipaddress.ip_address(scope["client"][0])
    except (KeyError, TypeError, ValueError):
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback

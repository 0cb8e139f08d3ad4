"""How many requests are under way in the front-end: those that ask the model for something, as long as they are answered.

Plain ASGI: it costs something when a request begins and ends, and nothing in between.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class Load:
    """The count. Of one application."""

    def __init__(self) -> None:
        self.num_requests = 0


class CountLoad:
    """Counts what passes it."""

    def __init__(self, app: ASGIApp, load: Load) -> None:
        self._app, self._load = app, load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or "/v1/" not in scope["path"]:
            await self._app(scope, receive, send)
            return
        self._load.num_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._load.num_requests -= 1

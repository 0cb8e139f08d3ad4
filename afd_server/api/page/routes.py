"""The routes of the page: its files, what it must know to begin, and the live view's stream.

What lives here: headers and the table of files. What does not: who may look (gate.py: the stream lies below /admin), and
what is sent (live.py). None of these routes is in the OpenAPI document: they serve the page alone.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from afd_server.api.gate import access_of
from afd_server.api.page.live import Live
from afd_server.api.respond import streamed
from afd_server.api.settings import ApiSettings, Service
from afd_server.telemetry.metrics import Metrics

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
# Nothing from elsewhere, nothing inline, nothing that text could become.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and answered 304 while nothing has changed
}


def add_page_routes(app: FastAPI, settings: ApiSettings, service: Service, metrics: Metrics) -> Live:
    """Gives what must be closed when the server ends: its views would go on for ever."""
    live = Live(service, metrics)

    @app.get("/page/settings.json", include_in_schema=False)
    async def page_settings(request: Request) -> JSONResponse:
        """Open to all, so that the page can ask for a key before it sends anything that would be refused."""
        access = access_of(request.scope)
        told: dict[str, Any] = {"asks_for_key": access.asks_for_key, "may_ask": access.may_ask}
        if access.may_ask:
            told |= {
                "model": settings.model_name,
                "max_model_len": settings.max_model_len,
                "may_watch": access.may_operate,
            }
        return JSONResponse(told, headers={"Cache-Control": "no-store"})

    @app.get("/admin/live", include_in_schema=False)
    async def watch(request: Request) -> Response:
        return await streamed(request, live.updates())

    _add_files(app)
    return live


def _add_files(app: FastAPI) -> None:
    found = _files()

    async def serve_file(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in found:
            raise HTTPException(404, "Not Found")
        content, media_type, tag = found[name]
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    app.add_route("/", serve_file, include_in_schema=False)
    app.add_route("/page/{name:path}", serve_file, include_in_schema=False)


def _files() -> dict[str, tuple[bytes, str, str]]:
    """Path below static/ -> (content, media type, tag of this content). Read once: they are 200 KB."""
    found = {}
    waiting = [("", files(__package__) / "static")]
    while waiting:
        prefix, directory = waiting.pop()
        for entry in directory.iterdir():
            name = f"{prefix}{entry.name}"
            if entry.is_dir():
                waiting.append((f"{name}/", entry))
            elif (suffix := PurePosixPath(name).suffix) in MEDIA_TYPES:
                content = entry.read_bytes()
                found[name] = (content, MEDIA_TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found

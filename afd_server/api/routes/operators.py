"""What operators and their tools ask of the server: is it well, how does it do. See also admin.py."""

from __future__ import annotations

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from afd_server.api.errors import RETRY_AFTER_S, error_body
from afd_server.api.load import Load
from afd_server.api.settings import ApiSettings, Service
from afd_server.telemetry.metrics import Metrics


def add_operator_routes(
    app: FastAPI, settings: ApiSettings, service: Service, metrics: Metrics, load: Load
) -> None:
    # What keeps containers alive asks for /ping, with GET or POST.
    @app.get("/health", response_model=None)
    @app.api_route("/ping", methods=["GET", "POST"], response_model=None)
    async def health() -> Response:
        problems = service.health()
        if service.is_serving():
            return JSONResponse({"problems": problems} if problems else {})
        body = error_body("; ".join(problems), type="service_unavailable", code="unavailable")
        return JSONResponse({**body, "problems": problems}, 503, {"Retry-After": str(RETRY_AFTER_S)})

    @app.get("/load")
    async def server_load() -> dict[str, int]:
        return {"server_load": load.num_requests}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": settings.version}

    @app.get("/metrics", response_model=None)
    async def prometheus() -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

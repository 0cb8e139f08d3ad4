"""The routes of whoever looks closer at the workers: every hop for a while, and which of them is slow.

What lives here: the requests' form. What does not: the recording (cluster/recording.py), its form (telemetry/chrome_trace.py), the
report (telemetry/stragglers.py), and who may ask (gate.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response

from afd_server.api.settings import Service
from afd_server.telemetry.chrome_trace import chrome_trace

MAX_TRACE_S = 60.0


def add_watching_routes(app: FastAPI, service: Service) -> None:
    @app.get("/admin/trace", response_class=Response)
    async def trace(seconds: Annotated[float, Query(gt=0, le=MAX_TRACE_S)] = 2.0) -> Response:
        """Every hop of every worker for so long, as a Chrome trace."""
        traces = await service.workers.trace(seconds)
        content = await asyncio.to_thread(chrome_trace, traces)
        return Response(content, media_type="application/json")

    @app.get("/admin/stragglers")
    async def stragglers() -> dict[str, Any]:
        """Which worker, layer or expert is slow, of the last minute."""
        return dataclasses.asdict(await service.stragglers())

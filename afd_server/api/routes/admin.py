"""The routes of whoever operates the server: its workers, more or fewer of them, each of them anew.

What lives here: the requests' form. What does not: the changes (cluster/rescale.py), and who may ask for them (gate.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from afd_server.api.settings import Service
from afd_server.errors import RequestError

MAX_WORKERS = 1024


class ScaleRequest(BaseModel):
    """What is left out stays as it is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    attention_workers: int | None = Field(None, ge=1, le=MAX_WORKERS)
    ffn_replicas: int | None = Field(None, ge=1, le=MAX_WORKERS)


def add_admin_routes(app: FastAPI, service: Service) -> None:
    def workers_now() -> dict[str, Any]:
        states = [dataclasses.asdict(state) for state in service.workers.worker_states()]
        return {"change": service.workers.change_under_way() or None, "workers": states}

    async def carry_out(change: Coroutine[Any, Any, None]) -> dict[str, Any]:
        # A change is carried through, whether its caller waits for it or not.
        task = asyncio.ensure_future(change)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)
        return workers_now()

    @app.get("/admin/workers")
    async def workers() -> dict[str, Any]:
        return workers_now()

    @app.post("/admin/scale")
    async def scale(body: ScaleRequest) -> dict[str, Any]:
        if body.attention_workers is None and body.ffn_replicas is None:
            raise RequestError("attention_workers or ffn_replicas must be given")
        return await carry_out(service.workers.scale(body.attention_workers, body.ffn_replicas))

    @app.post("/admin/restart")
    async def restart() -> dict[str, Any]:
        return await carry_out(service.workers.restart())

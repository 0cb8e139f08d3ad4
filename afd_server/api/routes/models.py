"""The list of models: one."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from afd_server.api.settings import ApiSettings
from afd_server.errors import ModelNotFoundError


def add_model_routes(app: FastAPI, settings: ApiSettings) -> None:
    card = {
        "id": settings.model_name,
        "object": "model",
        "created": settings.created,
        "owned_by": "afd-server",
        "max_model_len": settings.max_model_len,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != settings.model_name:
            raise ModelNotFoundError(f"the model {name!r} is not served here", "model")
        return card

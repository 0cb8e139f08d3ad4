"""The front-end as one ASGI application: what stands before the routes, and the routes."""

from __future__ import annotations

from fastapi import FastAPI

from afd_server.api.errors import add_error_handlers
from afd_server.api.gate import Gate
from afd_server.api.load import CountLoad, Load
from afd_server.api.routes.admin import add_admin_routes
from afd_server.api.routes.generation import add_generation_routes
from afd_server.api.routes.models import add_model_routes
from afd_server.api.routes.operators import add_operator_routes
from afd_server.api.routes.tokens import add_token_routes
from afd_server.api.routes.watching import add_watching_routes
from afd_server.api.settings import ApiSettings, Service
from afd_server.telemetry.metrics import Metrics
from afd_server.text.tokenizer import Tokenizer


def create_app(settings: ApiSettings, service: Service, tokenizer: Tokenizer, metrics: Metrics) -> FastAPI:
    """The whole front-end as an ASGI application. `service` may become ready later; until then requests get 503."""
    app = FastAPI(title="afd-server", version=settings.version)
    app.add_middleware(Gate, api_key=settings.api_key, max_body_bytes=settings.max_body_bytes)
    load = Load()
    app.add_middleware(CountLoad, load=load)
    add_error_handlers(app)
    add_generation_routes(app, settings, service, tokenizer, metrics)
    add_token_routes(app, settings, tokenizer)
    add_model_routes(app, settings)
    add_operator_routes(app, settings, service, metrics, load)
    add_admin_routes(app, service)
    add_watching_routes(app, service)
    return app

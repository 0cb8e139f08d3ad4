"""The front-end as one ASGI application: what stands before the routes, and the routes."""

from __future__ import annotations

from fastapi import FastAPI

from afd_server.api.errors import add_error_handlers
from afd_server.api.gate import Gate
from afd_server.api.page.routes import add_page_routes
from afd_server.api.routes.admin import add_admin_routes
from afd_server.api.routes.generation import add_generation_routes
from afd_server.api.routes.models import add_model_routes
from afd_server.api.routes.operators import add_operator_routes
from afd_server.api.routes.watching import add_watching_routes
from afd_server.api.settings import ApiSettings, Service
from afd_server.telemetry.metrics import Metrics
from afd_server.text.tokenizer import Tokenizer


def create_app(settings: ApiSettings, service: Service, tokenizer: Tokenizer, metrics: Metrics) -> FastAPI:
    """The whole front-end as an ASGI application. `service` may become ready later; until then requests get 503.

    Its state has `on_end`, to be called when the server begins to end: see server.serve.
    """
    app = FastAPI(title="afd-server", version=settings.version)
    app.state.on_end = lambda: None
    app.add_middleware(Gate, api_key=settings.api_key, max_body_bytes=settings.max_body_bytes)
    add_error_handlers(app)
    add_generation_routes(app, settings, service, tokenizer, metrics)
    add_model_routes(app, settings)
    add_operator_routes(app, settings, service, metrics)
    add_admin_routes(app, service)
    add_watching_routes(app, service)
    if settings.page:
        app.state.on_end = add_page_routes(app, settings, service, metrics).close
    return app

"""The front-end as one ASGI application: what stands before the routes, and the routes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from afd_server.api.admission import Admission
from afd_server.api.document import add_document
from afd_server.api.errors import add_error_handlers
from afd_server.api.gate import Gate
from afd_server.api.load import CountLoad, Load
from afd_server.api.page.routes import add_page_routes
from afd_server.api.rate_limits import LIMIT_HEADERS, Allowances
from afd_server.api.request_ids import HEADER, RequestIds
from afd_server.api.respond import Responder
from afd_server.api.routes.admin import add_admin_routes
from afd_server.api.routes.generation import add_generation_routes
from afd_server.api.routes.messages import add_messages_routes
from afd_server.api.routes.models import add_model_routes
from afd_server.api.routes.operators import add_operator_routes
from afd_server.api.routes.responses import add_responses_route
from afd_server.api.routes.tokens import add_token_routes
from afd_server.api.routes.watching import add_watching_routes
from afd_server.api.settings import ApiSettings, Service
from afd_server.telemetry.metrics import Metrics
from afd_server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from afd_server.telemetry.traces import Traces


def create_app(
    settings: ApiSettings,
    service: Service,
    tokenizer: Tokenizer,
    metrics: Metrics,
    traces: Traces | None = None,
) -> FastAPI:
    """The whole front-end as an ASGI application. `service` may become ready later; until then requests get 503.

    Its state has `on_end`, to be called when the server begins to end: see server.serve.
    """
    app = FastAPI(title="afd-server", version=settings.version, docs_url=None, redoc_url=None)
    app.state.on_end = lambda: None
    app.add_middleware(
        Gate,
        keys=settings.keys,
        allowances=Allowances(metrics.keys),
        max_body_bytes=settings.max_body_bytes,
        root_path=settings.root_path,
    )
    load = Load()
    app.add_middleware(CountLoad, load=load)
    if settings.cross_origin is not None:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cross_origin.origins,
            allow_methods=settings.cross_origin.methods,
            allow_headers=settings.cross_origin.headers,
            allow_credentials=settings.cross_origin.credentials,
            expose_headers=[HEADER, "Retry-After", *LIMIT_HEADERS],
        )
    app.add_middleware(RequestIds)  # the last one that is added comes first
    add_error_handlers(app)
    admission = Admission(settings, tokenizer)
    responder = Responder(service, tokenizer, metrics, traces)
    add_generation_routes(app, settings, admission, responder, tokenizer)
    add_responses_route(app, settings, admission, responder, tokenizer)
    add_messages_routes(app, settings, admission, responder)
    add_token_routes(app, settings, admission, tokenizer)
    add_model_routes(app, settings)
    add_operator_routes(app, settings, service, metrics, load)
    add_admin_routes(app, service)
    add_watching_routes(app, service)
    if settings.page:
        app.state.on_end = add_page_routes(app, settings, service, metrics).close
    add_document(app, needs_key=settings.keys.is_asked_for)
    return app

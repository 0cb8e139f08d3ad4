"""The routes: OpenAI's two, the model list, and what operators ask (health, version, metrics; see also admin.py).

Each handler here is a few lines: admit, run, answer. The rooms' other files hold how.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from afd_server.api.admin import add_admin_routes
from afd_server.api.admission import Admission, Job
from afd_server.api.errors import RETRY_AFTER_S, add_error_handlers, error_body
from afd_server.api.gate import Gate, tenant_of
from afd_server.api.generation import interleave, run_choice
from afd_server.api.protocol import ChatCompletionRequest, CompletionRequest, GenerationFields
from afd_server.api.responses import Answer, ChatAnswer, CompletionAnswer, Usage
from afd_server.api.settings import ApiSettings, Service
from afd_server.api.streaming import ClientLeftError, EventStream, collect, events, unless_client_leaves
from afd_server.errors import ModelNotFoundError
from afd_server.telemetry.metrics import Metrics
from afd_server.text.tokenizer import Tokenizer

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is what access logs call the case


def create_app(settings: ApiSettings, service: Service, tokenizer: Tokenizer, metrics: Metrics) -> FastAPI:
    """The whole front-end as an ASGI application. `service` may become ready later; until then requests get 503."""
    app = FastAPI(title="afd-server", version=settings.version)
    app.add_middleware(Gate, api_key=settings.api_key, max_body_bytes=settings.max_body_bytes)
    add_error_handlers(app)
    _add_generation_routes(app, settings, service, tokenizer, metrics)
    _add_model_routes(app, settings)
    _add_operator_routes(app, settings, service, metrics)
    add_admin_routes(app, service)
    return app


def _add_generation_routes(
    app: FastAPI, settings: ApiSettings, service: Service, tokenizer: Tokenizer, metrics: Metrics
) -> None:
    admission = Admission(settings, tokenizer)

    async def respond(request: Request, body: GenerationFields, job: Job, answer: Answer) -> Response:
        pieces = interleave([run_choice(service, choice, body, tokenizer, metrics) for choice in job.choices])
        usage = Usage(job)
        try:
            if not body.stream:
                whole = collect(pieces, answer, usage)
                return JSONResponse(await unless_client_leaves(request.receive, whole))
            stream = events(pieces, answer, usage, body)
            try:
                first = await unless_client_leaves(request.receive, anext(stream))
            except BaseException:
                await stream.aclose()
                raise
            return EventStream(first, stream)
        except ClientLeftError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        job = await admission.admit_completion(body, tenant_of(request.scope))
        return await respond(request, body, job, CompletionAnswer(body, job, settings.model_name, tokenizer))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        job = await admission.admit_chat(body, tenant_of(request.scope))
        return await respond(request, body, job, ChatAnswer(body, job, settings.model_name, tokenizer))


def _add_model_routes(app: FastAPI, settings: ApiSettings) -> None:
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


def _add_operator_routes(app: FastAPI, settings: ApiSettings, service: Service, metrics: Metrics) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        problems = service.health()
        if service.is_serving():
            return JSONResponse({"problems": problems} if problems else {})
        body = error_body("; ".join(problems), type="service_unavailable", code="unavailable")
        return JSONResponse({**body, "problems": problems}, 503, {"Retry-After": str(RETRY_AFTER_S)})

    @app.get("/ping")
    async def ping() -> dict[str, Any]:
        return {}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": settings.version}

    @app.get("/metrics", response_model=None)
    async def prometheus() -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

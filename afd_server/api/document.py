"""/openapi.json: what FastAPI reads off the routes, and what it cannot know: answers, examples, errors, keys.

What lives here: a row for each route. What does not: the answers' form (answers/schema.py), the bodies' (protocol/). There are
no /docs and /redoc: FastAPI's need scripts from elsewhere.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from afd_server.api.answers import schema

ERRORS = {
    400: "A field is wrong: `param` names it.",
    401: "The API key is missing or wrong.",
    403: "This key, or this client, may not.",
    404: "There is no such model.",
    408: "The request has not arrived within --client-timeout.",
    409: "It cannot be done now.",
    413: "The body is too large.",
    429: "The promises to others, the limits of this key, or recordings under way leave no room: Retry-After says when to try again.",
    500: "The request failed within the server.",
    503: "No worker can take it now.",
}
EVENTS = "text/event-stream"
HELLO = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass(frozen=True)
class Row:
    """summary: of the route. answer: what a 200 holds, None for other JSON objects, text for text/plain. chunk: of its stream,
    where it has one. errors: statuses besides those of every route, and error their body. example: a body. named_events: what
    the stream is, where its events have names."""

    tag: str
    summary: str
    answer: type[BaseModel] | str | None
    errors: tuple[int, ...] = ()
    chunk: type[BaseModel] | None = None
    example: dict[str, Any] | None = None
    named_events: str | None = None
    error: type[BaseModel] = schema.ErrorBody


GENERATES = (400, 404, 408, 413, 429, 503)
BODY = (400, 404, 408, 413)
ROWS = {
    ("post", "/v1/completions"): Row(
        "generation", "Continue texts", schema.Completion, GENERATES, schema.Completion,
        {"model": "default", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
    ),
    ("post", "/v1/chat/completions"): Row(
        "generation", "Answer in a chat", schema.ChatCompletion, GENERATES, schema.ChatCompletionChunk,
        {"model": "default", "messages": HELLO, "max_tokens": 32},
    ),
    ("post", "/v1/responses"): Row(
        "generation", "Answer, in OpenAI's newer form", schema.ResponseObject, GENERATES, None,
        {"model": "default", "input": "What is the capital of France?", "max_output_tokens": 32},
        "OpenAI's events, `response.created` to `response.completed`.",
    ),
    ("post", "/v1/messages"): Row(
        "generation", "Answer, in Anthropic's form", schema.MessageObject, GENERATES, None,
        {"model": "default", "messages": HELLO, "max_tokens": 32},
        "Anthropic's events, `message_start` to `message_stop`.", schema.MessagesErrorBody,
    ),
    ("post", "/v1/messages/count_tokens"): Row(
        "tokens", "The tokens of a prompt of that form", schema.InputTokens, (*BODY, 429), None,
        {"model": "default", "messages": HELLO}, None, schema.MessagesErrorBody,
    ),
    ("get", "/v1/models"): Row("models", "The models: one", schema.ModelList),
    ("get", "/v1/models/{name}"): Row("models", "A model", schema.ModelCard, (404,)),
    ("post", "/tokenize"): Row(
        "tokens", "The tokens of a text or a chat", schema.Tokens, BODY, None, {"prompt": "Hello!"}
    ),
    ("post", "/detokenize"): Row(
        "tokens", "The text of tokens", schema.DetokenizedText, BODY, None, {"tokens": [72, 105]}
    ),
    ("get", "/tokenizer_info"): Row("tokens", "The tokenizer's configuration", None),
    ("get", "/health"): Row("operation", "Whether requests get on", schema.Health, (503,)),
    ("get", "/ping"): Row("operation", "As /health", schema.Health, (503,)),
    ("post", "/ping"): Row("operation", "As /health", schema.Health, (503,)),
    ("get", "/load"): Row("operation", "Requests under way", schema.ServerLoad),
    ("get", "/version"): Row("operation", "The server's version", schema.Version),
    ("get", "/metrics"): Row("operation", "Metrics in Prometheus' text format", "text/plain"),
    ("get", "/admin/workers"): Row("admin", "Every worker", schema.Workers, (403,)),
    ("post", "/admin/scale"): Row(
        "admin", "More or fewer workers", schema.Workers, (400, 403, 408, 409, 413, 503), None, {"attention_workers": 2}
    ),
    ("post", "/admin/restart"): Row("admin", "Each worker anew", schema.Workers, (403, 409, 503)),
    ("get", "/admin/trace"): Row("admin", "Every hop for a while", None, (400, 403, 429, 503)),
    ("get", "/admin/stragglers"): Row("admin", "What is slow", None, (403, 503)),
}  # fmt: skip


def add_document(app: FastAPI, needs_key: bool) -> None:
    """To be called when all routes are there. needs_key: whether the server asks for one."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete(app, needs_key)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def complete(app: FastAPI, needs_key: bool) -> dict[str, Any]:
    with warnings.catch_warnings():  # of two methods with one name: they get names below
        warnings.simplefilter("ignore", UserWarning)
        document = get_openapi(title=app.title, version=app.version, routes=app.routes, servers=app.servers)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas.update(_answer_schemas())
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            row = ROWS.get((method, path))
            if row is not None:
                _describe(operation, row)
            operation["operationId"] = _operation_id(method, path)
            operation["responses"].pop("422", None)  # what is wrong with a body is 400 here
            if needs_key and path.startswith(("/v1", "/admin")):
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = _error(401, schema.ErrorBody if row is None else row.error)
    return document


def _describe(operation: dict[str, Any], row: Row) -> None:
    operation["tags"], operation["summary"] = [row.tag], row.summary
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if isinstance(row.answer, str):
        content = {row.answer: {"schema": {"type": "string"}}}
    elif row.answer is not None:
        content["application/json"]["schema"] = _reference(row.answer)
    if row.chunk is not None:
        words = f"Server-sent events, each with a {row.chunk.__name__}, or an error; the last one is [DONE]."
        content[EVENTS] = {"schema": {"type": "string", "description": words}}
    if row.named_events is not None:
        fields = {"event": {"type": "string"}, "data": {"type": "string"}}
        content[EVENTS] = {"schema": {"type": "object", "properties": fields, "description": row.named_events}}
    answers = {"200": {"description": "Successful", "content": content}}
    operation["responses"] = {
        **answers,
        **{str(status): _error(status, row.error) for status in sorted({*row.errors, 500})},
    }
    if row.example is not None:
        operation["requestBody"]["content"]["application/json"]["examples"] = {"usual": {"value": row.example}}


def _error(status: int, body: type[BaseModel] = schema.ErrorBody) -> dict[str, Any]:
    return {
        "description": ERRORS[status],
        "content": {"application/json": {"schema": _reference(body)}},
    }


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _answer_schemas() -> dict[str, Any]:
    models: set[type[BaseModel]] = {row.error for row in ROWS.values()}
    models |= {row.chunk for row in ROWS.values() if row.chunk is not None}
    models |= {
        row.answer for row in ROWS.values() if row.answer is not None and not isinstance(row.answer, str)
    }
    ordered = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "serialization") for model in ordered], ref_template="#/components/schemas/{model}"
    )
    found: dict[str, Any] = definitions["$defs"]
    return found


def _operation_id(method: str, path: str) -> str:
    words = path.replace("{", "").replace("}", "").replace("-", "_").strip("/").split("/")
    return "_".join([method, *words])

"""Every refusal and failure in OpenAI's form: {"error": {"message", "type", "param", "code"}}.

What lives here: the mapping from the error tree, from pydantic's findings and from the framework's own refusals to
status and body. What does not: the sentences of the tree (afd_server.errors), and when they are raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from afd_server.api.request_ids import HEADER, request_id_of
from afd_server.errors import (
    OverloadedError,
    RateLimitError,
    RequestError,
    ServingError,
    UnavailableError,
    WorkerError,
)

RETRY_AFTER_S = 5
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class GenerationFailedError(ServingError):
    """A request ended in an error inside the machine. The message is the machine's own sentence."""


def error_body(message: str, *, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) of anything that can go wrong with a request. What is not in the tree is for the log."""
    if isinstance(error, RequestError):
        code = None if error.code == RequestError.code else error.code
        body = error_body(str(error), type="invalid_request_error", param=error.field, code=code)
        return error.status, body
    if isinstance(error, RateLimitError):
        return 429, error_body(str(error), type=error.what, code="rate_limit_exceeded")  # OpenAI's words
    if isinstance(error, OverloadedError):
        return 429, error_body(str(error), type="overloaded_error", code="overloaded")
    if isinstance(error, UnavailableError | WorkerError):
        return 503, error_body(str(error), type="service_unavailable", code="unavailable")
    if isinstance(error, ServingError):
        return 500, error_body(str(error), type="server_error", code="generation_failed")
    return 500, error_body("the server failed; its log has the details", type="server_error")


def anthropic_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body), as Anthropic's routes say it."""
    status, body = describe(error)
    return status, in_form_of(ANTHROPIC_PATH, status, body)


def in_form_of(path: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's body of an error in the form that clients of this path read."""
    if ANTHROPIC_PATH not in path:  # a proxy may have left its own path before it
        return body
    kind = ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}


def error_response(error: Exception, path: str) -> JSONResponse:
    """path: of the request, which decides the body's form."""
    status, body = describe(error)
    wait_s = error.retry_after_s if isinstance(error, OverloadedError | RateLimitError) else RETRY_AFTER_S
    headers = {"Retry-After": str(wait_s)} if status in (429, 503) else None
    return JSONResponse(in_form_of(path, status, body), status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Every answer of `app` that is not a success carries OpenAI's body from now on."""

    async def serving_error(request: Request, error: Exception) -> JSONResponse:
        response = error_response(error, request.url.path)
        # That of a bug is sent from outside all middleware.
        response.headers[HEADER] = request_id_of(request.scope)
        return response

    async def invalid_body(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = explain(error.errors(), request.headers.get("content-type", ""))
        body = error_body(message, type="invalid_request_error", param=param)
        return JSONResponse(in_form_of(request.url.path, 400, body), 400)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        where = f" ({request.method} {request.url.path})" if error.status_code in (404, 405) else ""
        body = error_body(f"{error.detail}{where}", type="invalid_request_error")
        return JSONResponse(
            in_form_of(request.url.path, error.status_code, body), error.status_code, error.headers
        )

    app.add_exception_handler(ServingError, serving_error)
    app.add_exception_handler(RequestValidationError, invalid_body)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, serving_error)


def explain(problems: Sequence[Any], content_type: str = "") -> tuple[str, str | None]:
    """(message, field) of the first of pydantic's findings. An unknown field goes first: it is the likeliest cause."""
    problem = min(problems, key=lambda each: each["type"] != "extra_forbidden")
    place = [part for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", problem["msg"])
        return f"the body is not JSON: {reason}", None
    if not place:
        json_type = content_type.split(";")[0].strip().lower() == "application/json"
        hint = "" if json_type else " sent with Content-Type: application/json"
        return f"the body must be a JSON object{hint}", None
    param = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        return f"{param}: there is no such field", param
    if problem["type"] == "missing":
        return f"{param}: the field is required", param
    return f"{param}: {problem['msg'].removeprefix('Value error, ')}", param

"""OpenAI's two routes that generate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI, Request, Response

from afd_server.api.admission import Admission, Job
from afd_server.api.answers.answer import Answer, Usage
from afd_server.api.answers.chat import ChatAnswer
from afd_server.api.answers.completion import CompletionAnswer
from afd_server.api.gate import allowance_of, tenant_of
from afd_server.api.generation import interleave, run_choice
from afd_server.api.protocol.chat import ChatCompletionRequest
from afd_server.api.protocol.generation import CompletionRequest, GenerationFields
from afd_server.api.rate_limits import counted
from afd_server.api.request_ids import name_by_body
from afd_server.api.settings import ApiSettings, Service
from afd_server.api.streaming import ClientLeftError, EventStream, collect, events, unless_client_leaves
from afd_server.telemetry.metrics import Metrics
from afd_server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from afd_server.telemetry.traces import Traces

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is what access logs call the case


def add_generation_routes(
    app: FastAPI,
    settings: ApiSettings,
    service: Service,
    tokenizer: Tokenizer,
    metrics: Metrics,
    traces: Traces | None,
) -> None:
    admission = Admission(settings, tokenizer)

    async def respond(request: Request, body: GenerationFields, job: Job, answer: Answer) -> Response:
        record = None if traces is None else traces.recorder(request.headers)
        marks = job.message_format.marks
        record = None if traces is None else traces.recorder(request.headers)
        pieces = interleave(
            [run_choice(service, choice, body, tokenizer, metrics, marks, record) for choice in job.choices]
        )
        allowance = allowance_of(request.scope)
        if allowance is not None:
            allowance.admit_prompt(sum(len(prompt.token_ids) for prompt in job.prompts))
            pieces = counted(pieces, allowance)
        usage = Usage(job)
        try:
            if not body.stream:
                whole = collect(pieces, answer, usage)
                answered = await unless_client_leaves(request.receive, whole)
                return Response(msgspec.json.encode(answered), media_type="application/json")
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
        job = await admission.admit_completion(body, *_identity(request, body))
        return await respond(request, body, job, CompletionAnswer(body, job, settings.model_name, tokenizer))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        job = await admission.admit_chat(body, *_identity(request, body))
        return await respond(request, body, job, ChatAnswer(body, job, settings.model_name, tokenizer))


def _identity(request: Request, body: GenerationFields) -> tuple[str, str]:
    """Who asks, and what the request is called."""
    return tenant_of(request.scope), name_by_body(request.scope, body.request_id)

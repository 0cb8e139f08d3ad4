"""OpenAI's two routes that generate."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from afd_server.api.admission import Admission
from afd_server.api.answers.chat import ChatAnswer
from afd_server.api.answers.completion import CompletionAnswer
from afd_server.api.protocol.chat import ChatCompletionRequest
from afd_server.api.protocol.generation import CompletionRequest
from afd_server.api.respond import Responder, identity_of
from afd_server.api.settings import ApiSettings
from afd_server.text.tokenizer import Tokenizer


def add_generation_routes(
    app: FastAPI, settings: ApiSettings, admission: Admission, responder: Responder, tokenizer: Tokenizer
) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        job = await admission.admit_completion(body, *identity_of(request, body.request_id))
        answer = CompletionAnswer(body, job, settings.model_name, tokenizer)
        return await responder.respond(request, body, job, answer)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        job = await admission.admit_chat(body, *identity_of(request, body.request_id))
        return await responder.respond(
            request, body, job, ChatAnswer(body, job, settings.model_name, tokenizer)
        )

"""OpenAI's newer route, /v1/responses, without a memory: whoever goes on with a conversation sends all of it."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from afd_server.api.admission import Admission
from afd_server.api.answers.responses import ResponsesAnswer
from afd_server.api.gateways.chat_body import in_words_of
from afd_server.api.gateways.responses import NAMES, to_chat
from afd_server.api.protocol.responses import ResponsesRequest
from afd_server.api.respond import Responder, identity_of
from afd_server.api.settings import ApiSettings
from afd_server.text.tokenizer import Tokenizer


def add_responses_route(
    app: FastAPI, settings: ApiSettings, admission: Admission, responder: Responder, tokenizer: Tokenizer
) -> None:
    @app.post("/v1/responses", response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        with in_words_of(NAMES):
            chat = to_chat(body)
            job = await admission.admit_chat(chat, *identity_of(request))
        answer = ResponsesAnswer(body, job, settings.model_name, tokenizer)
        return await responder.respond_in_parts(request, chat, job, answer)

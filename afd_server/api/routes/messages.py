"""Anthropic's routes: /v1/messages, and the count of tokens that one would take."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from afd_server.api.admission import Admission
from afd_server.api.answers.messages import MessagesAnswer
from afd_server.api.gateways.chat_body import in_words_of
from afd_server.api.gateways.messages import NAMES, to_chat
from afd_server.api.protocol.messages import CountTokensRequest, MessagesRequest
from afd_server.api.respond import Responder, identity_of
from afd_server.api.settings import ApiSettings


def add_messages_routes(
    app: FastAPI, settings: ApiSettings, admission: Admission, responder: Responder
) -> None:
    @app.post("/v1/messages", response_model=None)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        with in_words_of(NAMES):
            chat = to_chat(body)
            job = await admission.admit_chat(chat, *identity_of(request))
        return await responder.respond_in_parts(request, chat, job, MessagesAnswer(job, settings.model_name))

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest) -> dict[str, Any]:
        with in_words_of(NAMES):
            prompt, _ = await admission.read_chat(to_chat(body))
        return {"input_tokens": len(prompt.token_ids)}

"""Text to tokens and back, as vLLM's routes have it; nothing is asked of the workers."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI

from afd_server.api.admission import LONG_TEXT, Admission
from afd_server.api.protocol.tokens import DetokenizeRequest, TokenizeRequest
from afd_server.api.settings import ApiSettings
from afd_server.errors import RequestError
from afd_server.text.tokenizer import Tokenizer


def add_token_routes(app: FastAPI, settings: ApiSettings, admission: Admission, tokenizer: Tokenizer) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        admission.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("either prompt or messages must be given", "prompt")
        if body.prompt is None:
            prompt, _ = await admission.read_chat(body.as_chat())
            token_ids = prompt.token_ids
        else:
            if body.of_chat:
                raise RequestError(f"{body.of_chat[0]}: goes with messages alone", body.of_chat[0])
            with_special = body.add_special_tokens is not False
            token_ids = tuple((await admission.encode([body.prompt], with_special, "prompt"))[0])
        spelled = [tokenizer.id_to_token(token_id) or "" for token_id in token_ids]
        return {
            "count": len(token_ids),
            "max_model_len": settings.max_model_len,
            "tokens": token_ids,
            "token_strs": spelled if body.return_token_strs else None,
        }

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        admission.check_model(body.model)
        admission.check_ids(body.tokens, "tokens")
        if len(body.tokens) > LONG_TEXT:
            return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, False)}
        return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}

    if settings.tokenizer_info is not None:

        @app.get("/tokenizer_info")
        async def tokenizer_info() -> dict[str, Any]:
            return dict(settings.tokenizer_info or {})

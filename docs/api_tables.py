"""The tables of docs/api.md: every route, and every field of every body with its state. Called by generate.py.

What a field means stands below it in afd_server/api/protocol/, what a route does in afd_server/api/document.py.
"""

import json

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from afd_server.api.document import ROWS
from afd_server.api.protocol.chat import ChatCompletionRequest, Message
from afd_server.api.protocol.fields import ChangesNothing, Refusal
from afd_server.api.protocol.generation import CompletionRequest, GenerationFields, StreamOptions
from afd_server.api.protocol.messages import CountTokensRequest, MessagesRequest
from afd_server.api.protocol.responses import ResponsesRequest
from afd_server.api.protocol.tokens import DetokenizeRequest, TokenizeRequest

Rows = list[tuple[str, ...]]

BODIES: dict[str, type[BaseModel]] = {
    "both": GenerationFields,
    "completions": CompletionRequest,
    "chat": ChatCompletionRequest,
    "message": Message,
    "stream_options": StreamOptions,
    "responses": ResponsesRequest,
    "count_tokens": CountTokensRequest,
    "messages": MessagesRequest,
    "tokenize": TokenizeRequest,
    "detokenize": DetokenizeRequest,
}


def routes() -> Rows:
    return [
        (f"`{method.upper()} {path}`", row.summary, ", ".join(map(str, sorted({200, *row.errors, 500}))))
        for (method, path), row in ROWS.items()
    ]


def fields(body: str) -> Rows:
    """Those of a route's own: what both routes have in common is a table of its own."""
    model = BODIES[body]
    shared = next(
        (
            each
            for each in (GenerationFields, CountTokensRequest)
            if model is not each and issubclass(model, each)
        ),
        None,
    )
    common = set() if shared is None else set(shared.model_fields)
    return [
        (f"`{field.alias or name}`", state(field), default(field), meaning(field))
        for name, field in model.model_fields.items()
        if name not in common
    ]


def state(field: FieldInfo) -> str:
    for mark in field.metadata:
        if isinstance(mark, ChangesNothing):
            return "changes nothing"
        if isinstance(mark, Refusal):
            harmless = ", ".join(f"`{json.dumps(value)}`" for value in mark.harmless)
            return f"refused but for {harmless}" if harmless else "refused"
    return "served"


def default(field: FieldInfo) -> str:
    if state(field) != "served":
        return ""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value is None else f"`{json.dumps(value)}`"


def meaning(field: FieldInfo) -> str:
    """Empty where the state says it all."""
    words = field.description or ""
    return "" if words == "accepted; changes nothing" else words

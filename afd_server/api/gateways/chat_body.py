"""A chat's body made by the server itself, and what the chat refuses in the words of the client's own form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from afd_server.api.errors import explain
from afd_server.api.protocol.chat import ChatCompletionRequest
from afd_server.errors import RequestError


def chat_body(fields: dict[str, Any]) -> ChatCompletionRequest:
    """fields: those that the client has set; None is as if it had not. Raises RequestError."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatCompletionRequest.model_validate(given)
    except ValidationError as error:
        message, field = explain(error.errors())
        raise RequestError(message, field) from None


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """names: a chat's field -> the client's. A refusal of the former names the latter."""
    try:
        yield
    except RequestError as error:
        field, inner = _split(error.field)
        if field not in names:
            raise
        message = str(error)
        if message.startswith(field):
            message = names[field] + message.removeprefix(field)
        raise type(error)(message, names[field] + inner) from None


def _split(field: str | None) -> tuple[str, str]:
    """(the body's field, the place within it)"""
    name, dot, rest = (field or "").partition(".")
    return name, dot + rest

"""The bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, StrictBool, StrictStr

from afd_server.api.protocol.chat import MAX_MESSAGES, ChatCompletionRequest, Message
from afd_server.api.protocol.fields import FIRST, Body, NotServed
from afd_server.api.protocol.generation import is_ids


def _token_ids(value: Any) -> Any:
    if not is_ids(value):
        raise ValueError("must be a list of token ids")
    return value


class TokenizeRequest(Body):
    """A text, or a chat as its template renders it."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[Message], FIRST, Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: StrictBool | None = None
    return_token_strs: StrictBool = False
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[StrictStr, Any] | None = None
    chat_template: NotServed = None
    media_io_kwargs: NotServed = None
    mm_processor_kwargs: NotServed = None

    @property
    def of_chat(self) -> list[str]:
        """The given fields that only a chat has."""
        names = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        return [name for name in names if name in self.model_fields_set]

    def as_chat(self) -> ChatCompletionRequest:
        """The chat whose prompt is asked for."""
        given = {name: getattr(self, name) for name in ("messages", *self.of_chat)}
        given["add_special_tokens"] = self.add_special_tokens or False
        return ChatCompletionRequest.model_construct(set(given), **given)


class DetokenizeRequest(Body):
    model: StrictStr | None = None
    tokens: Annotated[list[int], PlainValidator(_token_ids, list[Annotated[int, Field(ge=0)]])]

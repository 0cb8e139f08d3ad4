"""The bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, StrictBool, StrictStr

from afd_server.api.protocol.chat import MAX_MESSAGES, ChatCompletionRequest, Message
from afd_server.api.protocol.fields import FIRST, Body, NotServed
from afd_server.api.protocol.functions import MAX_TOOLS, Tool
from afd_server.api.protocol.generation import is_ids


def _token_ids(value: Any) -> Any:
    if not is_ids(value):
        raise ValueError("must be a list of token ids")
    return value


class TokenizeRequest(Body):
    """A text, or a chat as its template renders it."""

    model: StrictStr | None = None
    """The name under which the model is served; another one is 404."""
    prompt: StrictStr | None = None
    """A text. Either this or messages."""
    messages: Annotated[list[Message], FIRST, Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    """A chat. Its prompt is the one that /v1/chat/completions would run."""
    add_special_tokens: StrictBool | None = None
    """The tokenizer's special tokens stand around the text. Default: around a prompt yes, around a chat no."""
    return_token_strs: StrictBool = False
    """The answer has each token in the vocabulary's own spelling."""
    add_generation_prompt: StrictBool = True
    """The chat ends with the beginning of the assistant's answer."""
    continue_final_message: StrictBool = False
    """The chat ends within its last message."""
    chat_template_kwargs: dict[StrictStr, Any] | None = None
    """More names for the chat template."""
    tools: Annotated[list[Tool], FIRST, Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    """The functions that the chat offers."""
    chat_template: NotServed = None
    media_io_kwargs: NotServed = None
    mm_processor_kwargs: NotServed = None

    @property
    def of_chat(self) -> list[str]:
        """The given fields that only a chat has."""
        names = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
        return [name for name in names if name in self.model_fields_set]

    def as_chat(self) -> ChatCompletionRequest:
        """The chat whose prompt is asked for."""
        given = {name: getattr(self, name) for name in ("messages", *self.of_chat)}
        given["add_special_tokens"] = self.add_special_tokens or False
        return ChatCompletionRequest.model_construct(set(given), **given)


class DetokenizeRequest(Body):
    """Tokens that become text, special ones too."""

    model: StrictStr | None = None
    """The name under which the model is served; another one is 404."""
    tokens: Annotated[list[int], PlainValidator(_token_ids, list[Annotated[int, Field(ge=0)]])]
    """Token ids."""

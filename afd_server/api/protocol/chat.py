"""The body of /v1/chat/completions: messages, tools, and what a chat may ask for besides."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictStr

from afd_server.api.protocol.fields import FIRST, Body, NotServed, Unused, refuse_except
from afd_server.api.protocol.generation import GenerationFields, MaxTokens, NumLogprobs

MAX_MESSAGES = 4096


def _content(value: Any) -> Any:
    """A message of text parts is their texts, one to a line."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"only text parts are served, not {kind or part!r}")
        texts.append(part["text"])
    return "\n".join(texts)


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[StrictStr, BeforeValidator(_content)]
    name: StrictStr | None = None
    refusal: NotServed = None
    annotations: NotServed = None
    audio: NotServed = None
    tool_calls: NotServed = None
    tool_call_id: NotServed = None
    function_call: NotServed = None
    reasoning_content: NotServed = None


class ChatCompletionRequest(GenerationFields):
    messages: Annotated[list[Message], FIRST, Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: StrictBool = False
    top_logprobs: NumLogprobs | None = None
    add_special_tokens: StrictBool = False
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[StrictStr, Any] | None = None

    tools: NotServed = None
    tool_choice: Annotated[Any, refuse_except("none", "auto")] = None
    functions: NotServed = None
    function_call: Annotated[Any, refuse_except("none", "auto")] = None
    parallel_tool_calls: Unused = None
    include_reasoning: Unused = None
    reasoning_effort: Annotated[Any, refuse_except("none")] = None
    verbosity: NotServed = None
    modalities: Annotated[Any, refuse_except(["text"])] = None
    audio: NotServed = None
    prediction: NotServed = None
    store: NotServed = None
    web_search_options: NotServed = None
    echo: NotServed = False
    best_of: Annotated[Any, refuse_except(1)] = None
    documents: NotServed = None
    chat_template: NotServed = None
    mm_processor_kwargs: NotServed = None

    @property
    def output_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:  # OpenAI's newer name goes first
            return "max_completion_tokens", self.max_completion_tokens
        return super().output_limit

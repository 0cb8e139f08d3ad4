"""The body of /v1/responses, without what needs a memory of earlier ones: each request carries its whole conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt, StrictStr, Tag

from afd_server.api.protocol.fields import FIRST, Body, NotServed, Unused, finite, refuse_except
from afd_server.api.protocol.generation import INT32, INT64, MAX_TOP_K
from afd_server.api.protocol.parts import by_type, text_of

MAX_ITEMS = 4096
INCLUDED = "message.output_text.logprobs"


def _items(value: Any) -> Any:
    """A text is a message of the user."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _only_logprobs(value: list[str]) -> list[str]:
    if any(each != INCLUDED for each in value):
        raise ValueError(f"only {INCLUDED!r} can be included")
    return value


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[StrictStr, BeforeValidator(text_of("input_text", "output_text", "text"))]
    # What an answer's own items hold besides, when they are sent back.
    id: Unused = None
    status: Unused = None
    phase: Unused = None


class FunctionCallItem(Body):
    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: StrictStr
    id: Unused = None
    status: Unused = None


class FunctionCallOutput(Body):
    type: Literal["function_call_output"]
    call_id: StrictStr
    output: Annotated[StrictStr, BeforeValidator(text_of("input_text", "output_text", "text"))]
    id: Unused = None
    status: Unused = None


class ReasoningItem(Body):
    """What the model thought before. Summaries are not shown to it again, as the text itself is there."""

    type: Literal["reasoning"]
    content: Annotated[StrictStr, BeforeValidator(text_of("reasoning_text"))] | None = None
    summary: Unused = None
    id: Unused = None
    status: Unused = None
    encrypted_content: NotServed = None


ITEMS = ("message", "function_call", "function_call_output", "reasoning")
Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    by_type(ITEMS, default="message"),
]


class FunctionTool(Body):
    type: Literal["function"]
    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[StrictStr, Any] | None = None
    strict: Unused = None


class NamedTool(Body):
    type: Literal["function"]
    name: StrictStr


class TextFormat(Body):
    """json_schema has a name and a schema; text and json_object have neither."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: StrictStr | None = None
    schema_: dict[StrictStr, Any] | None = Field(None, alias="schema")
    description: StrictStr | None = None
    strict: StrictBool | None = None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: Annotated[Any, refuse_except("medium")] = None


class ReasoningOptions(Body):
    effort: StrictStr | None = None
    summary: Annotated[Any, refuse_except("auto")] = None
    generate_summary: NotServed = None


class ResponseStreamOptions(Body):
    include_obfuscation: NotServed = None


class ResponsesRequest(Body):
    model: StrictStr | None = None
    input: Annotated[list[Item], FIRST, BeforeValidator(_items), Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: Annotated[StrictStr, Field(description="the system message, before all of input")] | None = (
        None
    )
    stream: StrictBool = False
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[float, finite(ge=0)] | None = None
    top_p: Annotated[float, finite(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=MAX_TOP_K)] | None = None
    seed: Annotated[StrictInt, Field(ge=-INT64, lt=INT64)] | None = None
    presence_penalty: Annotated[float, finite(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, finite(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, finite(ge=1e-3, le=1e3)] | None = None
    priority: Annotated[StrictInt, Field(ge=-INT32, lt=INT32)] = 0
    ignore_eos: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0)] | None = None
    include: Annotated[list[StrictStr], AfterValidator(_only_logprobs)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[FunctionTool], FIRST] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    metadata: dict[StrictStr, StrictStr] | None = None

    user: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    service_tier: Annotated[Any, refuse_except("auto", "default")] = None
    truncation: Annotated[Any, refuse_except("disabled")] = None

    # Nothing is kept from one request to the next.
    store: NotServed = None
    previous_response_id: NotServed = None
    conversation: NotServed = None
    background: NotServed = None
    prompt: NotServed = None
    max_tool_calls: NotServed = None
    context_management: NotServed = None

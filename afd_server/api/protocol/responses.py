"""The body of /v1/responses, without what needs a memory of earlier ones: each request carries its whole conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr, Tag

from afd_server.api.protocol.fields import FIRST, WHOLE, Body, NotServed, Unused, finite, refuse_except
from afd_server.api.protocol.generation import INT32, INT64, MAX_TOP_K, NumLogprobs
from afd_server.api.protocol.parts import ConversationText, ReasoningText, by_type

MAX_ITEMS = 4096
INCLUDED = "message.output_text.logprobs"


def _items(value: Any) -> Any:
    """A text is a message of the user."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ConversationText
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
    output: ConversationText
    id: Unused = None
    status: Unused = None


class ReasoningItem(Body):
    """What the model thought before. Summaries are not shown to it again, as the text itself is there."""

    type: Literal["reasoning"]
    content: ReasoningText | None = None
    summary: Unused = None
    id: Unused = None
    status: Unused = None
    encrypted_content: NotServed = None


ITEMS = ("message", "function_call", "function_call_output", "reasoning")
Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    by_type(ITEMS, default="message"),
]


Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]


class ResponsesTool(Body):
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
    """The name under which the model is served; another one is 404."""
    input: Annotated[
        list[Item], FIRST, BeforeValidator(_items, StrictStr | Items), Field(min_length=1, max_length=MAX_ITEMS)
    ]
    """A text of the user, or messages, calls, their outputs and reasoning, in order."""
    instructions: StrictStr | None = None
    """The system message, before all of input."""
    stream: StrictBool = False
    """The answer as named server-sent events."""
    stream_options: ResponseStreamOptions | None = None
    """Of a stream only."""
    max_output_tokens: Annotated[StrictInt, Field(ge=1), WHOLE] | None = None
    """Reasoning included. Default: all that the context has room for."""
    temperature: Annotated[float, finite(ge=0)] | None = None
    """Sampling, as in a chat."""
    top_p: Annotated[float, finite(gt=0, le=1)] | None = None
    """As in a chat."""
    top_k: Annotated[StrictInt, Field(ge=-1, le=MAX_TOP_K), WHOLE] | None = None
    """As in a chat."""
    seed: Annotated[StrictInt, Field(ge=-INT64, lt=INT64), WHOLE] | None = None
    """The same seed and body give the same output."""
    presence_penalty: Annotated[float, finite(ge=-2, le=2)] | None = None
    """As in a chat."""
    frequency_penalty: Annotated[float, finite(ge=-2, le=2)] | None = None
    """As in a chat."""
    repetition_penalty: Annotated[float, finite(ge=1e-3, le=1e3)] | None = None
    """As in a chat."""
    priority: Annotated[StrictInt, Field(ge=-INT32, lt=INT32), WHOLE] = 0
    """Where requests queue (--tpot-sla-ms), lower ones go first; elsewhere it must be 0."""
    ignore_eos: StrictBool = False
    """The model's end token does not end the output."""
    top_logprobs: NumLogprobs | None = None
    """So many of the most likely tokens at each place."""
    include: list[Literal["message.output_text.logprobs"]] | None = None
    """Log-probabilities with the text."""
    text: TextOptions | None = None
    """The form of the output."""
    reasoning: ReasoningOptions | None = None
    """How much the model thinks, where its chat template has a choice."""
    tools: Annotated[list[ResponsesTool], FIRST] | None = None
    """Functions that the model may call."""
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    """Whether it may, must not, or must, and which."""
    parallel_tool_calls: StrictBool | None = None
    """false: one call at most."""
    metadata: dict[StrictStr, StrictStr] | None = None
    """Given back with the answer."""

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

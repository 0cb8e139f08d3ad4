"""The bodies of Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr, Tag

from afd_server.api.protocol.chat import MAX_MESSAGES
from afd_server.api.protocol.fields import FIRST, WHOLE, Body, NotServed, Unused, finite, refuse_except
from afd_server.api.protocol.generation import MAX_STOP_STRINGS, MAX_TOP_K, StopString
from afd_server.api.protocol.parts import Text, by_type


def _blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextBlock(Body):
    type: Literal["text"]
    text: StrictStr
    cache_control: Unused = None
    citations: Unused = None


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: StrictStr
    signature: Unused = None


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: StrictStr
    name: StrictStr
    input: dict[StrictStr, Any]
    cache_control: Unused = None
    caller: Unused = None


class ToolResultBlock(Body):
    """is_error changes nothing: the content says what went wrong."""

    type: Literal["tool_result"]
    tool_use_id: StrictStr
    content: Text = ""
    is_error: Unused = None
    cache_control: Unused = None


BLOCKS = ("text", "thinking", "tool_use", "tool_result")
Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    by_type(BLOCKS),
]


class MessagesTurn(Body):
    role: Literal["user", "assistant"]
    content: Annotated[list[Block], FIRST, BeforeValidator(_blocks, StrictStr | list[Block])]


class MessagesTool(Body):
    name: StrictStr
    input_schema: dict[StrictStr, Any]
    description: StrictStr | None = None
    type: Annotated[Any, refuse_except("custom")] = None
    cache_control: Unused = None
    strict: Unused = None


class MessagesToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool = False


class Thinking(Body):
    """budget_tokens changes nothing: max_tokens bounds thinking and answer together."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Unused = None
    display: Unused = None


class CountTokensRequest(Body):
    model: StrictStr
    """The name under which the model is served; another one is 404."""
    messages: Annotated[list[MessagesTurn], FIRST, Field(min_length=1, max_length=MAX_MESSAGES)]
    """Of user and assistant, as texts or blocks: text, thinking, tool_use, tool_result."""
    system: Text | None = None
    """The system message."""
    tools: Annotated[list[MessagesTool], FIRST] | None = None
    """Tools that the model may call."""
    tool_choice: MessagesToolChoice | None = None
    """Whether it may (auto), must (any, or tool with a name), or must not (none)."""
    thinking: Thinking | None = None
    """Whether the model thinks first, where its chat template has a choice."""
    cache_control: Unused = None


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[StrictInt, Field(ge=1), WHOLE]
    """Tokens of output, thinking included."""
    stream: StrictBool = False
    """The answer as Anthropic's named events."""
    stop_sequences: Annotated[list[StopString], FIRST, Field(max_length=MAX_STOP_STRINGS)] | None = None
    """Texts at which the output ends; they are not part of it."""
    temperature: Annotated[float, finite(ge=0)] | None = None
    """Sampling, as in a chat; above 1, too."""
    top_p: Annotated[float, finite(gt=0, le=1)] | None = None
    """As in a chat."""
    top_k: Annotated[StrictInt, Field(ge=-1, le=MAX_TOP_K), WHOLE] | None = None
    """As in a chat."""
    metadata: Unused = None
    service_tier: Annotated[Any, refuse_except("auto", "standard_only")] = None
    container: NotServed = None
    mcp_servers: NotServed = None
    context_management: NotServed = None
    output_config: NotServed = None
    output_format: NotServed = None

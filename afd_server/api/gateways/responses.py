"""A request of /v1/responses as a chat: items become messages.

A call, and the reasoning before it, belong to the assistant's message that they follow, or make one: chat templates know
messages only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from afd_server.api.gateways.chat_body import chat_body
from afd_server.api.protocol.chat import ChatCompletionRequest
from afd_server.api.protocol.responses import (
    INCLUDED,
    FunctionCallItem,
    FunctionCallOutput,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
    TextFormat,
)

# Fields that mean the same under the same name.
SAME = (
    "model", "stream", "temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "priority", "ignore_eos", "parallel_tool_calls",
)  # fmt: skip
# Of a refusal by the chat: the client's own word.
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def to_chat(body: ResponsesRequest) -> ChatCompletionRequest:
    """Raises RequestError."""
    return chat_body(
        {
            **{name: getattr(body, name) for name in SAME},
            "messages": _messages(body),
            "max_completion_tokens": body.max_output_tokens,
            "response_format": _response_format(body.text.format if body.text else None),
            "reasoning_effort": body.reasoning.effort if body.reasoning else None,
            "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
            "tool_choice": _tool_choice(body),
            "logprobs": True if wants_logprobs(body) else None,
            "top_logprobs": body.top_logprobs if wants_logprobs(body) else None,
        }
    )


def wants_logprobs(body: ResponsesRequest) -> bool:
    return body.top_logprobs is not None or INCLUDED in (body.include or ())


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    reasoning: list[str] = []
    for item in body.input:
        match item:
            case MessageItem():
                message = {"role": item.role, "content": item.content}
                messages.append(_with_reasoning(message, reasoning) if item.role == "assistant" else message)
            case ReasoningItem():
                reasoning += [item.content] if item.content else []
            case FunctionCallItem():
                function = {"name": item.name, "arguments": item.arguments}
                caller = _caller(messages, reasoning)
                caller.setdefault("tool_calls", []).append(
                    {"id": item.call_id, "type": "function", "function": function}
                )
            case FunctionCallOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
    return messages


def _caller(messages: list[dict[str, Any]], reasoning: list[str]) -> dict[str, Any]:
    """The assistant's message that a call goes to: the last one, unless reasoning came after it."""
    if not messages or messages[-1]["role"] != "assistant" or reasoning:
        messages.append(_with_reasoning({"role": "assistant"}, reasoning))
    return messages[-1]


def _with_reasoning(message: dict[str, Any], reasoning: list[str]) -> dict[str, Any]:
    if reasoning:
        message["reasoning_content"] = "\n".join(reasoning)
        reasoning.clear()
    return message


def _tool(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {
        "type": "function",
        "function": {name: value for name, value in function.items() if value is not None},
    }


def _tool_choice(body: ResponsesRequest) -> Any:
    if body.tool_choice is None or isinstance(body.tool_choice, str):
        return body.tool_choice
    return {"type": "function", "function": {"name": body.tool_choice.name}}


def _response_format(form: TextFormat | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    schema = {"name": form.name, "description": form.description, "schema": form.schema_, "strict": form.strict}
    return {"type": "json_schema", "json_schema": _given(schema.items())}


def _given(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if value is not None}

"""A request of Anthropic's /v1/messages as a chat: blocks become texts, calls and messages of tools."""

from __future__ import annotations

import json
from typing import Any

from afd_server.api.gateways.chat_body import chat_body
from afd_server.api.protocol.chat import ChatCompletionRequest
from afd_server.api.protocol.messages import (
    CountTokensRequest,
    MessagesRequest,
    MessagesToolChoice,
    MessagesTurn,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from afd_server.errors import RequestError

NAMES = {"stop": "stop_sequences", "max_completion_tokens": "max_tokens"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(body: CountTokensRequest) -> ChatCompletionRequest:
    """Raises RequestError."""
    fields = {
        "model": body.model,
        "messages": _messages(body),
        "tools": [
            {"type": "function", "function": {
                "name": tool.name, "parameters": tool.input_schema,
                **({"description": tool.description} if tool.description else {}),
            }}
            for tool in body.tools
        ] if body.tools else None,
        "tool_choice": _tool_choice(body.tool_choice),
        "chat_template_kwargs": _thinking(body),
    }  # fmt: skip
    if body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "stream": body.stream,
            "stop": body.stop_sequences,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
        }
    return chat_body(fields)


def _messages(body: CountTokensRequest) -> list[dict[str, Any]]:
    messages = [] if body.system is None else [{"role": "system", "content": body.system}]
    for number, message in enumerate(body.messages):
        turn = _assistant(message, number) if message.role == "assistant" else _user(message, number)
        messages += turn
    return messages


def _user(message: MessagesTurn, number: int) -> list[dict[str, Any]]:
    """Results of tools, each a message of its own, then what the user says."""
    results, texts = [], []
    for block in message.content:
        match block:
            case ToolResultBlock():
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": block.content})
            case TextBlock():
                texts.append(block.text)
            case _:
                raise _misplaced(block, number)
    return [*results, {"role": "user", "content": "\n".join(texts)}] if texts or not results else results


def _assistant(message: MessagesTurn, number: int) -> list[dict[str, Any]]:
    texts, thoughts, calls = [], [], []
    for block in message.content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case _:
                raise _misplaced(block, number)
    whole: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        whole["reasoning_content"] = "\n".join(thoughts)
    if calls:
        whole["tool_calls"] = calls
    return [whole]


def _misplaced(block: Any, number: int) -> RequestError:
    field = f"messages.{number}.content"
    return RequestError(f"{field}: a {block.type} block does not belong to this role", field)


def _tool_choice(choice: MessagesToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type != "tool":
        return CHOICES[choice.type]
    if choice.name is None:
        raise RequestError("tool_choice.name: the field is required", "tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _thinking(body: CountTokensRequest) -> dict[str, Any] | None:
    """The name that templates with a choice know it by (Qwen3, DeepSeek-V3.1: thinking)."""
    if body.thinking is None or body.thinking.type == "adaptive":
        return None
    wanted = body.thinking.type == "enabled"
    return {"enable_thinking": wanted, "thinking": wanted}

"""What a chat's body becomes: the prompt, and how the model's output is to be read.

What lives here: messages, tools and reasoning in the form that chat templates know, and the choice among tools. What does
not: types of single fields (protocol/), tokens and limits (admission.py), the formats of models (text/).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afd_server.api.protocol.chat import ChatCompletionRequest, Message
from afd_server.api.protocol.functions import NamedChoice, PastCall
from afd_server.api.settings import ApiSettings
from afd_server.errors import RequestError
from afd_server.text.chat_template import ChatTemplate
from afd_server.text.message import Function
from afd_server.text.message_parser import MANY, MessageFormat

# A template's switches for reasoning that are on or off, where it has no levels: Qwen's and DeepSeek's.
SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    text: str
    message_format: MessageFormat


def chat_prompt(body: ChatCompletionRequest, settings: ApiSettings) -> ChatPrompt:
    """Raises RequestError, naming the field, also for a model without a chat template."""
    template = settings.chat_template
    if template is None:
        raise RequestError("this model has no chat template; use /v1/completions", "messages")
    reads_calls, functions = _choice(body, settings, template)
    tools = _shown_tools(body) if body.tools else None
    if body.tool_choice == "none" and settings.exclude_tools_when_tool_choice_none:
        tools = None
    text = template.render(
        [_as_template_has_it(message, template) for message in body.messages],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        tools=tools,
        variables=_variables(body, settings, template),
    )
    return ChatPrompt(
        text,
        MessageFormat(
            reasoning_parser=settings.reasoning_parser,
            tool_call_parser=settings.tool_call_parser,
            reads_calls=reads_calls,
            functions=functions,
            prompt_tail=text[-200:],
            shows_reasoning=body.include_reasoning,
            most_calls=MANY if body.parallel_tool_calls else 1,
        ),
    )


def _choice(
    body: ChatCompletionRequest, settings: ApiSettings, template: ChatTemplate
) -> tuple[str | None, tuple[Function, ...]]:
    """(MessageFormat.reads_calls, the functions that may be called). Raises RequestError for what cannot be."""
    functions = tuple(Function(tool.function.name, tool.function.parameters or {}) for tool in body.tools)
    choice = body.tool_choice or "auto"
    if isinstance(choice, NamedChoice):
        named = [function for function in functions if function.name == choice.function.name]
        if not named:
            raise RequestError(f"tool_choice: no tool is named {choice.function.name!r}", "tool_choice")
        return "named", tuple(named[:1])
    if choice == "none":
        return None, ()
    if not functions:
        if choice == "required":
            raise RequestError("tool_choice: there are no tools", "tool_choice")
        return None, ()
    if choice == "required":
        return "required", functions
    if settings.enable_auto_tool_choice and settings.tool_call_parser is not None:
        return "auto", functions
    raise RequestError(f"tools: {_why_not_auto(settings, template)}", "tools")


def _why_not_auto(settings: ApiSettings, template: ChatTemplate) -> str:
    remedy = 'tool_choice "required", or a function\'s name, is served'
    if not settings.enable_auto_tool_choice:
        return f"the model is not to choose them here (--no-enable-auto-tool-choice); {remedy}"
    if not template.shows_tools:
        return (
            f"the model's chat template does not show them to the model, which so cannot choose one; {remedy}"
        )
    return f"it is not known how this model writes its calls (see --tool-call-parser); {remedy}"


def _shown_tools(body: ChatCompletionRequest) -> list[dict[str, Any]]:
    """As models have seen them in training: strict is the server's business."""
    tools = []
    for tool in body.tools:
        function = tool.function
        shown = {"name": function.name, "description": function.description, "parameters": function.parameters}
        given = {name: value for name, value in shown.items() if value is not None}
        tools.append({"type": "function", "function": given})
    return tools


def _as_template_has_it(message: Message, template: ChatTemplate) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.name is not None:
        shown["name"] = message.name
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None:  # templates know it by one name or the other
        shown |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if message.tool_calls:
        shown["tool_calls"] = _past_calls(message.tool_calls, template)
    return shown


def _past_calls(calls: Sequence[PastCall], template: ChatTemplate) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.function.name,
                "arguments": (
                    call.function.arguments
                    if template.wants_arguments_as_text
                    else _parsed(call.function.arguments)
                ),
            },
        }
        for call in calls
    ]


def _parsed(arguments: str) -> Any:
    """As an object. What a model once wrote wrong stays the text that it is."""
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _variables(body: ChatCompletionRequest, settings: ApiSettings, template: ChatTemplate) -> dict[str, Any]:
    """reasoning_effort under the names by which the template knows it, and whatever else the client gives it."""
    given = body.chat_template_kwargs or {}
    effort = body.reasoning_effort
    if effort is None:
        return given
    variables: dict[str, Any] = {name: effort != "none" for name in SWITCHES if name in template.names}
    if "reasoning_effort" in template.names:
        variables["reasoning_effort"] = effort
    if not variables and (effort != "none" or settings.reasoning_parser is not None):
        raise RequestError(
            "reasoning_effort: the model's chat template has no such setting", "reasoning_effort"
        )
    return {**variables, **given}

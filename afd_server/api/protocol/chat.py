"""The body of /v1/chat/completions: messages, tools, and what a chat may ask for besides."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictStr, ValidationInfo

from afd_server.api.protocol.fields import FIRST, Body, NotServed, refuse_except
from afd_server.api.protocol.functions import MAX_CALLS, MAX_TOOLS, PastCall, Tool, ToolChoice
from afd_server.api.protocol.generation import GenerationFields, MaxTokens, NumLogprobs

MAX_MESSAGES = 4096

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


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


def _calls(value: Any, info: ValidationInfo) -> Any:
    if value and info.data.get("role") not in (None, "assistant"):
        raise ValueError("only the assistant's messages have them")
    return value


def _call_id(value: Any, info: ValidationInfo) -> Any:
    """Says which call a tool's message answers."""
    role = info.data.get("role")
    if value is None and role == "tool":
        raise ValueError("a tool's message must have it")
    if value is not None and role not in (None, "tool"):
        raise ValueError("only a tool's messages have it")
    return value


def _needed_content(value: Any, info: ValidationInfo) -> Any:
    if value is None and not info.data.get("tool_calls"):
        raise ValueError("the field is required")
    return value


CHECKED = Field(validate_default=True)


class Message(Body):
    """content goes last: whether it may be missing depends on what stands before it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who says it."""
    name: StrictStr | None = None
    """For the chat template."""
    refusal: NotServed = None
    annotations: NotServed = None
    audio: NotServed = None
    function_call: NotServed = None
    reasoning_content: StrictStr | None = None
    """What the assistant thought before its answer, for templates that show it."""
    reasoning: StrictStr | None = None
    """The same under its newer name."""
    tool_calls: Annotated[list[PastCall] | None, FIRST, AfterValidator(_calls), Field(max_length=MAX_CALLS)] = (
        None
    )
    """The calls that the assistant made."""
    tool_call_id: Annotated[StrictStr | None, AfterValidator(_call_id), CHECKED] = None
    """The call that a tool's message answers."""
    content: Annotated[
        StrictStr | None, BeforeValidator(_content), AfterValidator(_needed_content), CHECKED
    ] = None
    """A text, or text parts, which become one a line. May be missing beside tool_calls."""


class ChatCompletionRequest(GenerationFields):
    messages: Annotated[list[Message], FIRST, Field(min_length=1, max_length=MAX_MESSAGES)]
    """The chat so far."""
    max_completion_tokens: MaxTokens | None = None
    """As max_tokens, which it goes before."""
    logprobs: StrictBool = False
    """The log-probability of each token of output. Of the model itself, before temperature and rules."""
    top_logprobs: NumLogprobs | None = None
    """With logprobs: so many of the most likely tokens at each place; -1: all."""
    add_special_tokens: StrictBool = False
    """The tokenizer's special tokens stand around what the chat template made."""
    add_generation_prompt: StrictBool = True
    """The prompt ends with the beginning of the assistant's answer."""
    continue_final_message: StrictBool = False
    """The prompt ends within the last message, which the output continues."""
    chat_template_kwargs: dict[StrictStr, Any] | None = None
    """More names for the chat template."""

    tools: Annotated[list[Tool], FIRST, Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    """The functions that the model may call."""
    tool_choice: ToolChoice = None
    """none, auto, required, or the function that must be called. Default: auto where there are tools."""
    parallel_tool_calls: StrictBool = True
    """Whether there may be more than one call."""
    functions: NotServed = None
    function_call: Annotated[Any, refuse_except("none", "auto")] = None
    include_reasoning: StrictBool = True
    """Whether the answer has what the model thought."""
    reasoning_effort: ReasoningEffort | None = None
    """Where the chat template has such a setting, or a switch, which none turns off."""
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

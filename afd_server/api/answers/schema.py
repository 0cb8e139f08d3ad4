"""What every answer looks like, for /openapi.json alone: answers are written as plain JSON, which tests hold to this.

What does not live here: the bodies that clients send (protocol/).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class PromptTokensDetails(_Answer):
    cached_tokens: int


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(_Answer):
    logprob: float
    rank: int
    """1 for the most likely token."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
FinishReason = Literal["stop", "length", "tool_calls"]


class CompletionLogprobs(_Answer):
    """OpenAI's legacy form. An entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for the first token of an echoed prompt alone."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    """The stop string, or the id of stop_token_ids, that ended the output."""
    prompt_logprobs: PromptLogprobs | None = None
    """Of whole answers."""
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(_Answer):
    """Whole, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ReportedToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Answer):
    content: list[ReportedToken]


class FunctionCall(_Answer):
    name: str
    arguments: str


class ToolCall(_Answer):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(_Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class _ChatChoice(_Answer):
    index: int
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChoice(_ChatChoice):
    message: AssistantMessage


class _Chat(_Answer):
    id: str
    created: int
    model: str
    prompt_token_ids: list[int] | None = None


class ChatCompletion(_Chat):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None


class FunctionDelta(_Answer):
    name: str | None = None
    arguments: str


class ToolCallDelta(_Answer):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class MessageDelta(_Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(_ChatChoice):
    delta: MessageDelta


class ChatCompletionChunk(_Chat):
    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(_Answer):
    prompt: str


class Health(_Answer):
    problems: list[str] = Field(default_factory=list)
    """What is wrong while requests get on all the same."""


class ServerLoad(_Answer):
    server_load: int
    """Requests below /v1 that are not answered yet."""


class Version(_Answer):
    version: str


class WorkerState(_Answer):
    name: str
    role: str
    state: str
    since_s: float
    node: str | None
    pid: int | None
    restarts: int
    reason: str


class Workers(_Answer):
    change: str | None
    workers: list[WorkerState]


class Problem(_Answer):
    message: str
    type: str
    param: str | None
    """The field that is wrong."""
    code: str | None


class ErrorBody(_Answer):
    error: Problem
    problems: list[str] | None = None
    """Of /health alone."""


AnyObject = dict[str, Any]


class InputTokensDetails(_Answer):
    cached_tokens: int


class OutputTokensDetails(_Answer):
    reasoning_tokens: int


class ResponseUsage(_Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(_Answer):
    """Whole, or within the first and last events of a stream."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[dict[str, Any]]
    """Items: reasoning, message, function_call."""
    usage: ResponseUsage | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float | None
    """As asked for; null: the model's recommendation. So is top_p."""
    top_p: float | None
    top_logprobs: int
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    text: dict[str, Any]
    reasoning: dict[str, Any]
    truncation: Literal["disabled"]
    store: Literal[False]
    background: Literal[False]
    previous_response_id: None


class MessagesUsage(_Answer):
    input_tokens: int
    """Those that were not found in the prefix cache."""
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(_Answer):
    """Anthropic's."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    """Blocks: thinking, text, tool_use."""
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessagesUsage


class InputTokens(_Answer):
    input_tokens: int


class MessagesErrorKind(_Answer):
    type: str
    message: str


class MessagesErrorBody(_Answer):
    """Anthropic's."""

    type: Literal["error"]
    error: MessagesErrorKind

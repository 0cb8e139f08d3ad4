"""The bodies that clients may send: every field of OpenAI's and vLLM's two routes, served or refused by name.

What lives here: names, types and ranges, checked before anything else is done. What does not: what depends on the
model or on other fields (admission.py). Unknown fields are refused; so are known ones that are not served, unless they
hold a value that asks for nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationInfo,
    model_validator,
)

MAX_CHOICES = 128  # of one prompt
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters
MAX_MESSAGES = 4096
MAX_TOKEN_RULES = 1024  # biases, and ids that stop: each goes to the worker with every choice
INT32 = 2**31
MAX_TOP_K = INT32 - 1
INT64 = 2**63


def _finite(**bounds: Any) -> Any:
    return Field(strict=True, allow_inf_nan=False, **bounds)


def _refuse(value: Any, info: ValidationInfo) -> Any:
    """Passes what asks for nothing: null, false, 0, empty."""
    if value:
        raise ValueError(f"{info.field_name} is not served")
    return value


def _refuse_except(*harmless: Any) -> AfterValidator:
    def check(value: Any, info: ValidationInfo) -> Any:
        return value if value in harmless else _refuse(value, info)

    return AfterValidator(check)


def _refuse_prompt_logprobs(value: Any) -> Any:
    if value is not None and value is not False:  # 0 asks for those of the prompt's own tokens
        raise ValueError("prompt_logprobs is not served")
    return value


def _prompts(value: Any) -> Any:
    """A single prompt becomes a list of one. A prompt is text or token ids."""
    if isinstance(value, str) or (value and _is_ids(value)):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(each, str) or _is_ids(each) for each in value):
        raise ValueError("must be a text, a list of token ids, or a list of either")
    if not value:
        raise ValueError("is empty")
    return value


def _is_ids(value: Any) -> bool:
    """At the speed of C: a body may hold a million of them. A bool is no id."""
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_TOKEN_RULES:
        raise ValueError(f"more than {MAX_TOKEN_RULES} tokens")
    if isinstance(value, dict) and not all(map(_is_bias, value.values())):
        raise ValueError("its values are numbers from -100 to 100")
    return value


def _is_bias(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100


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


# Of every list, the first mistake is enough: explaining each of a million would hold up the event loop for seconds.
FIRST = Field(fail_fast=True)
NotServed = Annotated[Any, AfterValidator(_refuse)]
Unused = Annotated[Any, Field(description="accepted; changes nothing")]
StopString = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
PromptJSON = str | list[int] | list[str | list[int]]
MaxTokens = Annotated[StrictInt, Field(ge=0)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_means_the_default(cls, given: Any) -> Any:
        """Client libraries send null for what their user has not set. Of unknown fields the first is enough to refuse."""
        if not isinstance(given, dict):
            return given
        fields = _fields(cls)
        unknown = next((name for name in given if name not in fields), None)
        if unknown is not None:
            return {unknown: given[unknown]}
        return {name: value for name, value in given.items() if value is not None or fields[name]}


@cache
def _fields(body: type[Body]) -> dict[str, bool]:
    """Field -> whether it is required. A body may hold thousands of messages."""
    return {name: field.is_required() for name, field in body.model_fields.items()}


class StreamOptions(Body):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False
    include_obfuscation: NotServed = None


class GenerationFields(Body):
    """What both routes have in common. None: the model's recommendation, then OpenAI's default."""

    model: StrictStr | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None

    max_tokens: MaxTokens | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float, _finite(ge=0)] | None = None
    top_p: Annotated[float, _finite(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=MAX_TOP_K)] | None = None
    min_p: Annotated[float, _finite(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-INT64, lt=INT64)] | None = None
    presence_penalty: Annotated[float, _finite(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, _finite(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, _finite(ge=1e-3, le=1e3)] | None = None
    logit_bias: Annotated[dict[StrictStr, float], BeforeValidator(_biases)] | None = None

    stop: Annotated[list[StopString], FIRST, BeforeValidator(_strings), Field(max_length=MAX_STOP_STRINGS)] = []
    stop_token_ids: Annotated[list[StrictInt], FIRST, Field(max_length=MAX_TOKEN_RULES)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0)] = 0
    ignore_eos: StrictBool = False
    include_stop_str_in_output: StrictBool = False
    skip_special_tokens: StrictBool = True
    spaces_between_special_tokens: StrictBool = True
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = None
    return_token_ids: StrictBool = False
    return_tokens_as_token_ids: StrictBool = False
    priority: Annotated[StrictInt, Field(ge=-INT32, lt=INT32)] = 0
    request_id: Annotated[StrictStr, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None

    # Words about the client, not about the output.
    user: Unused = None
    metadata: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    service_tier: Annotated[Any, _refuse_except("auto", "default")] = None

    response_format: Annotated[Any, _refuse_except({"type": "text"})] = None
    length_penalty: Annotated[Any, _refuse_except(1)] = 1.0
    use_beam_search: NotServed = False
    prompt_logprobs: Annotated[Any, AfterValidator(_refuse_prompt_logprobs)] = None
    allowed_token_ids: NotServed = None
    bad_words: NotServed = None
    logits_processors: NotServed = None
    structured_outputs: NotServed = None
    guided_json: NotServed = None
    guided_regex: NotServed = None
    guided_choice: NotServed = None
    guided_grammar: NotServed = None
    guided_decoding_backend: NotServed = None
    guided_whitespace_pattern: NotServed = None
    structural_tag: NotServed = None
    cache_salt: NotServed = None
    kv_transfer_params: NotServed = None
    vllm_xargs: NotServed = None
    lora_request: NotServed = None

    @property
    def output_limit(self) -> tuple[str, int | None]:
        """(the field that bounds the output, its value)."""
        return "max_tokens", self.max_tokens


class CompletionRequest(GenerationFields):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts, PromptJSON)]
    echo: StrictBool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: StrictBool = True
    best_of: Annotated[StrictInt, Field(ge=1)] | None = None
    suffix: NotServed = None
    prompt_embeds: NotServed = None


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
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: StrictBool = False
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[StrictStr, Any] | None = None

    tools: NotServed = None
    tool_choice: Annotated[Any, _refuse_except("none", "auto")] = None
    functions: NotServed = None
    function_call: Annotated[Any, _refuse_except("none", "auto")] = None
    parallel_tool_calls: Unused = None
    include_reasoning: Unused = None
    reasoning_effort: Annotated[Any, _refuse_except("none")] = None
    verbosity: NotServed = None
    modalities: Annotated[Any, _refuse_except(["text"])] = None
    audio: NotServed = None
    prediction: NotServed = None
    store: NotServed = None
    web_search_options: NotServed = None
    echo: NotServed = False
    best_of: Annotated[Any, _refuse_except(1)] = None
    documents: NotServed = None
    chat_template: NotServed = None
    mm_processor_kwargs: NotServed = None

    @property
    def output_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:  # OpenAI's newer name goes first
            return "max_completion_tokens", self.max_completion_tokens
        return super().output_limit

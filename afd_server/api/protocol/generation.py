"""What may be asked of every generation, and the body of /v1/completions.

What does not live here: the chat's own fields (chat.py).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, StrictBool, StrictInt, StrictStr

from afd_server.api.protocol.fields import FIRST, Body, NotServed, Unused, finite, refuse_except
from afd_server.api.protocol.structure import Gone, ResponseFormat, StructuredOutputs

MAX_CHOICES = 128  # of one prompt
MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 256
MAX_STOP_LENGTH = 1024  # characters
MAX_TOKEN_RULES = 1024  # biases, ids that stop, ids that are allowed: each goes to the worker with every choice
INT32 = 2**31
MAX_TOP_K = INT32 - 1
INT64 = 2**63


def _no_report(value: Any) -> Any:
    """False asks for none; 0 for those of the prompt's own tokens."""
    return None if value is False else value


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


StopString = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
PromptJSON = str | list[int] | list[str | list[int]]
MaxTokens = Annotated[StrictInt, Field(ge=0)]
NumLogprobs = Annotated[StrictInt, Field(ge=-1)]  # -1: of the whole vocabulary


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
    temperature: Annotated[float, finite(ge=0)] | None = None
    top_p: Annotated[float, finite(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=MAX_TOP_K)] | None = None
    min_p: Annotated[float, finite(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-INT64, lt=INT64)] | None = None
    presence_penalty: Annotated[float, finite(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, finite(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, finite(ge=1e-3, le=1e3)] | None = None
    logit_bias: Annotated[dict[StrictStr, float], BeforeValidator(_biases)] | None = None

    stop: Annotated[list[StopString], FIRST, BeforeValidator(_strings), Field(max_length=MAX_STOP_STRINGS)] = (
        Field(default_factory=list)
    )
    stop_token_ids: Annotated[list[StrictInt], FIRST, Field(max_length=MAX_TOKEN_RULES)] | None = None
    allowed_token_ids: (
        Annotated[list[StrictInt], FIRST, Field(min_length=1, max_length=MAX_TOKEN_RULES)] | None
    ) = None
    bad_words: Annotated[list[StopString], FIRST, Field(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: Annotated[NumLogprobs | None, BeforeValidator(_no_report)] = None
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
    service_tier: Annotated[Any, refuse_except("auto", "default")] = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    length_penalty: Annotated[Any, refuse_except(1)] = 1.0
    use_beam_search: NotServed = False
    logits_processors: NotServed = None
    guided_json: Gone = None
    guided_regex: Gone = None
    guided_choice: Gone = None
    guided_grammar: Gone = None
    guided_decoding_backend: Gone = None
    guided_whitespace_pattern: Gone = None
    structural_tag: Gone = None
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
    logprobs: NumLogprobs | None = None
    add_special_tokens: StrictBool = True
    best_of: Annotated[StrictInt, Field(ge=1)] | None = None
    suffix: NotServed = None
    prompt_embeds: NotServed = None

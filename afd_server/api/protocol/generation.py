"""What may be asked of every generation, and the body of /v1/completions.

What does not live here: the chat's own fields (chat.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, StrictBool, StrictInt, StrictStr, WithJsonSchema

from afd_server.api.protocol.fields import FIRST, WHOLE, Body, NotServed, Unused, finite, refuse_except
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
    if isinstance(value, str) or (value and is_ids(value)):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(each, str) or is_ids(each) for each in value):
        raise ValueError("must be a text, a list of token ids, or a list of either")
    if not value:
        raise ValueError("is empty")
    return value


def is_ids(value: Any) -> bool:
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
StopJSON = StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Text = Annotated[str, Field(min_length=1)]
PromptJSON = _Text | _Ids | Annotated[list[_Text | _Ids], Field(min_length=1)]
BiasJSON = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_TOKEN_RULES,
}
ReportJSON = {"anyOf": [{"type": "integer", "minimum": -1}, {"const": False}, {"type": "null"}]}
MaxTokens = Annotated[StrictInt, Field(ge=0), WHOLE]
NumLogprobs = Annotated[StrictInt, Field(ge=-1), WHOLE]  # -1: of the whole vocabulary


class StreamOptions(Body):
    include_usage: StrictBool = False
    """A last chunk without choices has the usage; in all others it is null."""
    continuous_usage_stats: StrictBool = False
    """With include_usage: every chunk has the usage so far."""
    include_obfuscation: NotServed = None


class GenerationFields(Body):
    """What both routes have in common. None: the model's recommendation, then OpenAI's default."""

    model: StrictStr | None = None
    """The name under which the model is served; another one is 404."""
    stream: StrictBool = False
    """The answer as server-sent events, the last of which is `[DONE]`."""
    stream_options: StreamOptions | None = None
    """Of a stream only."""

    max_tokens: MaxTokens | None = None
    """Tokens of output, at most. The prompt and it must fit --max-model-len."""
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES), WHOLE] = 1
    """Choices of each prompt. With a seed, choice i has the seed plus i."""
    temperature: Annotated[float, finite(ge=0)] | None = None
    """0 takes the most likely token."""
    top_p: Annotated[float, finite(gt=0, le=1)] | None = None
    """The most likely tokens that together have this probability are left."""
    top_k: Annotated[StrictInt, Field(ge=-1, le=MAX_TOP_K), WHOLE] | None = None
    """So many of the most likely tokens are left; 0 or -1: all."""
    min_p: Annotated[float, finite(ge=0, le=1)] | None = None
    """Tokens are left that are at least this many times as likely as the most likely one."""
    seed: Annotated[StrictInt, Field(ge=-INT64, lt=INT64), WHOLE] | None = None
    """The same seed and body give the same output, whatever else runs. Without one the server draws one."""
    presence_penalty: Annotated[float, finite(ge=-2, le=2)] | None = None
    """Off the logit of every token that the output has."""
    frequency_penalty: Annotated[float, finite(ge=-2, le=2)] | None = None
    """Off the logit of a token for each time that the output has it."""
    repetition_penalty: Annotated[float, finite(ge=1e-3, le=1e3)] | None = None
    """Divides positive logits, and multiplies negative ones, of the tokens that prompt or output have."""
    logit_bias: Annotated[dict[StrictStr, float], BeforeValidator(_biases), WithJsonSchema(BiasJSON)] | None = (
        None
    )
    """Token id -> -100 to 100, added to its logit."""

    stop: Annotated[
        list[StopString], FIRST, BeforeValidator(_strings, StopJSON), Field(max_length=MAX_STOP_STRINGS)
    ] = Field(default_factory=list)
    """Texts at which the output ends; they are not part of it."""
    stop_token_ids: Annotated[list[StrictInt], FIRST, Field(max_length=MAX_TOKEN_RULES)] | None = None
    """Tokens at which the output ends."""
    allowed_token_ids: (
        Annotated[list[StrictInt], FIRST, Field(min_length=1, max_length=MAX_TOKEN_RULES)] | None
    ) = None
    """No other tokens come. Where other rules forbid all of these, these go first."""
    bad_words: Annotated[list[StopString], FIRST, Field(max_length=MAX_BAD_WORDS)] | None = None
    """Words that the output does not have: their last token does not come where it would complete one."""
    prompt_logprobs: Annotated[NumLogprobs | None, BeforeValidator(_no_report), WithJsonSchema(ReportJSON)] = (
        None
    )
    """So many of the most likely tokens at each place of the prompt from the second on, with the own one. 0: the own one alone; -1: all. Not in a stream."""
    min_tokens: Annotated[StrictInt, Field(ge=0), WHOLE] = 0
    """Before so many tokens neither end token, stop text nor stop token ends the output."""
    ignore_eos: StrictBool = False
    """The model's end token does not end the output."""
    include_stop_str_in_output: StrictBool = False
    """What stopped the output is part of its text."""
    skip_special_tokens: StrictBool = True
    """Special tokens are left out of the text."""
    spaces_between_special_tokens: StrictBool = True
    """A space between special tokens that follow one another."""
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1), WHOLE] | None = None
    """The prompt is cut to so many tokens; -1: to what max_tokens leaves of --max-model-len."""
    truncation_side: Literal["left", "right"] = "left"
    """Where truncate_prompt_tokens cuts: left keeps the end of the prompt."""
    return_token_ids: StrictBool = False
    """The answer has the ids of its tokens and of the prompt."""
    return_tokens_as_token_ids: StrictBool = False
    """Log-probabilities name tokens `token_id:ID`."""
    priority: Annotated[StrictInt, Field(ge=-INT32, lt=INT32), WHOLE] = 0
    """Where requests queue (--tpot-sla-ms), lower ones go first; elsewhere it must be 0."""
    request_id: Annotated[StrictStr, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    """Part of the id of the answer."""

    # Words about the client, not about the output.
    user: Unused = None
    metadata: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    service_tier: Annotated[Any, refuse_except("auto", "default")] = None
    """There is one."""

    response_format: ResponseFormat | None = None
    """The form of the output: text, json_object, json_schema or structural_tag."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's form of the same, and also regex, choice and grammar."""
    length_penalty: Annotated[Any, refuse_except(1)] = 1.0
    """Of beam search."""
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
    """A text, a list of token ids, or a list of either: each its own choices."""
    echo: StrictBool = False
    """The prompt comes before the output; with logprobs also its own, null for its first token. max_tokens may be 0 then."""
    logprobs: NumLogprobs | None = None
    """The log-probability of each token of output, and of so many of the most likely ones; -1: of all. Of the model itself, before temperature and rules."""
    add_special_tokens: StrictBool = True
    """The tokenizer's special tokens stand around a text."""
    best_of: Annotated[StrictInt, Field(ge=1), WHOLE] | None = None
    """Only the same as n."""
    suffix: NotServed = None
    prompt_embeds: NotServed = None

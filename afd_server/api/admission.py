"""From a body that is well formed to requests that the machine can run, or a refusal that names the field.

What lives here: encoding of prompts, the checks that need the model (lengths, ids) or several fields, the defaults,
the seeds. What does not: types and ranges of single fields (protocol/). Nothing is computed for a refused request.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from afd_server.api.chat_prompt import chat_prompt
from afd_server.api.constraints import ConstraintCheck
from afd_server.api.protocol.chat import ChatCompletionRequest
from afd_server.api.protocol.generation import CompletionRequest, GenerationFields
from afd_server.api.settings import ApiSettings
from afd_server.errors import ModelNotFoundError, PromptTooLongError, RequestError
from afd_server.text.message_parser import MessageFormat
from afd_server.text.tokenizer import Tokenizer
from afd_server.types import GenerationRequest, SamplingParams

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; a chat may use all that is left
# All prompts and choices of one body: each costs memory before the scheduler sees it.
MAX_CHOICES_IN_ALL = 2048
# Every choice carries its prompt to the worker: many long ones would fill the channel that all requests share.
MAX_PROMPT_TOKENS_IN_ALL = 2**20
# The log-probabilities of prompts in an answer, and of a choice that wants more than a few of them at each token: they are
# objects in several processes, and the answer's text.
MAX_PROMPT_LOGPROBS_IN_ALL = 2**20
MAX_LOGPROBS_OF_CHOICE = 2**20
FEW_LOGPROBS = 20
# From this many characters on, texts are encoded on another thread, so that the streams of others go on.
LONG_TEXT = 20_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """text: as the client wrote it, None for token ids."""

    token_ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One output to generate. index: its place among all choices of the answer."""

    index: int
    prompt_index: int
    prompt: Prompt
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Job:
    """All that one body asks for. prompts: as they are run, after truncation. message_format: how a chat's output is read."""

    response_id: str
    created: int
    prompts: tuple[Prompt, ...]
    choices: tuple[Choice, ...]
    message_format: MessageFormat = MessageFormat()  # noqa: RUF009  frozen


class Admission:
    """Admits requests for one model. Without a seed of its own, a request gets one from the server's."""

    def __init__(self, settings: ApiSettings, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._constraints = ConstraintCheck(tokenizer)
        self._seeds = random.Random(settings.seed)

    async def admit_completion(self, body: CompletionRequest, tenant: str, request_id: str) -> Job:
        """tenant: who asks, see GenerationRequest. request_id: see request_ids.py. Raises RequestError."""
        self.check_model(body.model)
        if body.best_of is not None and body.best_of != body.n:
            raise RequestError("best_of is not served beyond n", "best_of")
        if len(body.prompt) * body.n > MAX_CHOICES_IN_ALL:
            raise RequestError(f"prompt: more than {MAX_CHOICES_IN_ALL} choices in all", "prompt")
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        encoded = iter(await self.encode(texts, body.add_special_tokens, "prompt"))
        prompts = [
            Prompt(tuple(prompt)) if isinstance(prompt, list) else Prompt(tuple(next(encoded)), prompt)
            for prompt in body.prompt
        ]
        num_logprobs = self._num_logprobs(body.logprobs, "logprobs")
        constraint = await self._constraints.of_body(body, len(body.prompt) * body.n)
        name = f"cmpl-{request_id}"
        return self._job(name, body, tenant, prompts, "prompt", num_logprobs, COMPLETION_MAX_TOKENS, constraint)

    async def admit_chat(self, body: ChatCompletionRequest, tenant: str, request_id: str) -> Job:
        """As admit_completion. Raises RequestError, also for a model without a chat template."""
        self.check_model(body.model)
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        prompt, message_format = await self.read_chat(body)
        num_logprobs = self._num_logprobs(body.top_logprobs or 0, "top_logprobs") if body.logprobs else None
        constraint = await self._constraints.of_chat(body, message_format)
        name = f"chatcmpl-{request_id}"
        job = self._job(name, body, tenant, [prompt], "messages", num_logprobs, None, constraint)
        return replace(job, message_format=message_format)

    async def read_chat(self, body: ChatCompletionRequest) -> tuple[Prompt, MessageFormat]:
        """A chat's prompt, whatever its length, and how its output is read. Raises RequestError."""
        if body.continue_final_message and body.add_generation_prompt:
            if "add_generation_prompt" in body.model_fields_set:
                raise RequestError(
                    "add_generation_prompt and continue_final_message exclude each other",
                    "add_generation_prompt",
                )
            body = body.model_copy(update={"add_generation_prompt": False})
        chat = chat_prompt(body, self._settings)
        (token_ids,) = await self.encode([chat.text], body.add_special_tokens, "messages")
        return Prompt(tuple(token_ids), chat.text), chat.message_format

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError for another one than the server's."""
        served = self._settings.model_name
        if name is not None and name != served:
            raise ModelNotFoundError(f"the model {name!r} is not served here; {served!r} is", "model")

    def _num_logprobs(self, asked: int | None, field: str) -> int | None:
        """How many are reported at each place besides the token's own; None for no report."""
        if asked is None:
            return None
        most = self._settings.max_logprobs
        number = self._settings.vocab_size if asked == -1 else asked
        if number > most:
            raise RequestError(
                f"{field}: {number} are asked for, at most {most} are given (--max-logprobs)", field
            )
        return number

    async def encode(self, texts: Sequence[str], add_special_tokens: bool, field: str) -> list[list[int]]:
        """Each text's tokens. Raises RequestError for what is no text."""
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
            raise RequestError(f"{field}: is not Unicode text: {error.reason}", field) from error
        if sum(map(len, texts)) < LONG_TEXT:
            return [self._tokenizer.encode(text, add_special_tokens) for text in texts]
        return await asyncio.to_thread(self._tokenizer.encode_batch, texts, add_special_tokens)

    def _job(
        self,
        response_id: str,
        body: GenerationFields,
        tenant: str,
        prompts: Sequence[Prompt],
        prompt_field: str,
        num_logprobs: int | None,
        default_max_tokens: int | None,
        constraint: str | None,
    ) -> Job:
        """One choice for each of the prompts and 0..n-1."""
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")
        if body.priority and not self._settings.priorities:
            raise RequestError("priority: requests do not queue here, see --tpot-sla-ms", "priority")
        if body.stream and body.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs: are not given in a stream", "prompt_logprobs")
        prompts = [self._fitted(prompt, body, prompt_field) for prompt in prompts]
        self._check_all_together(prompts, body.n, prompt_field)
        num_prompt_logprobs = self._num_logprobs(body.prompt_logprobs, "prompt_logprobs")
        if getattr(body, "echo", False) and num_logprobs is not None:
            num_prompt_logprobs = max(num_logprobs, num_prompt_logprobs or 0)
        self._check_report(prompts, body.n, num_prompt_logprobs)
        bad_words = self._bad_words(body.bad_words or ())
        choices = []
        for prompt_index, prompt in enumerate(prompts):
            room = self._settings.max_model_len - len(prompt.token_ids)
            limit = self._max_tokens(body, default_max_tokens, room)
            for number in range(body.n):
                index = prompt_index * body.n + number
                # The suffix keeps ids apart that a client uses twice.
                name = f"{response_id}-{index}-{secrets.token_hex(4)}"
                sampling = self._sampling(
                    body, limit, number, num_logprobs, num_prompt_logprobs, bad_words, constraint
                )
                request = GenerationRequest(
                    name, prompt.token_ids, sampling, priority=body.priority, tenant=tenant
                )
                choices.append(Choice(index, prompt_index, prompt, request))
        return Job(response_id, int(time.time()), tuple(prompts), tuple(choices))

    def _fitted(self, prompt: Prompt, body: GenerationFields, prompt_field: str) -> Prompt:
        """The prompt, cut where the client asks for it. Raises when it is empty, too long or not ids."""
        longest = self._settings.max_model_len
        _, max_tokens = body.output_limit
        keep = body.truncate_prompt_tokens
        if keep == -1:
            keep = longest - max(1, max_tokens or 1)
        if keep is not None and keep > longest:
            raise RequestError(f"truncate_prompt_tokens: at most {longest}", "truncate_prompt_tokens")
        if keep is not None and keep < len(prompt.token_ids):
            first = 0 if body.truncation_side == "right" else len(prompt.token_ids) - max(keep, 0)
            prompt = Prompt(prompt.token_ids[first : first + max(keep, 0)])
        if not prompt.token_ids:
            raise RequestError(f"{prompt_field}: there is no token to continue", prompt_field)
        if len(prompt.token_ids) + (max_tokens != 0) > longest:
            raise PromptTooLongError(
                f"the prompt has {len(prompt.token_ids)} tokens; prompt and output together may have {longest}",
                prompt_field,
            )
        self.check_ids(prompt.token_ids, prompt_field)
        return prompt

    def check_ids(self, token_ids: Sequence[int], field: str) -> None:
        """Raises RequestError for ids that the model does not have."""
        bound = self._settings.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < bound:
            raise RequestError(f"{field}: token ids are 0 to {bound - 1}", field)

    def _check_all_together(self, prompts: Sequence[Prompt], n: int, prompt_field: str) -> None:
        most = max(MAX_PROMPT_TOKENS_IN_ALL, self._settings.max_model_len)
        num_tokens = n * sum(len(prompt.token_ids) for prompt in prompts)
        if num_tokens > most:
            raise RequestError(
                f"{prompt_field}: {num_tokens} tokens in all prompts of all choices; at most {most}, send several requests",
                prompt_field,
            )

    def _check_report(self, prompts: Sequence[Prompt], n: int, num_logprobs: int | None) -> None:
        """num_logprobs: at each token of the prompts."""
        if num_logprobs is None:
            return
        entries = n * (1 + num_logprobs) * sum(len(prompt.token_ids) for prompt in prompts)
        if entries > MAX_PROMPT_LOGPROBS_IN_ALL:
            raise RequestError(
                f"prompt_logprobs: {entries} in all prompts of all choices, those of echo with logprobs too; at most "
                f"{MAX_PROMPT_LOGPROBS_IN_ALL}, ask for fewer or send several requests",
                "prompt_logprobs",
            )

    def _max_tokens(self, body: GenerationFields, default: int | None, room: int) -> int:
        """How long an output may get. room: what the prompt leaves of the context."""
        field, given = body.output_limit
        if given is not None:
            if given > room:
                raise PromptTooLongError(
                    f"{field}: {given} are asked for, but the prompt leaves {room} of "
                    f"{self._settings.max_model_len} tokens",
                    field,
                )
            if given == 0 and not getattr(body, "echo", False):
                raise RequestError(f"{field}: must be at least 1", field)
            return given
        limits = (room, default, self._settings.default_sampling.get("max_tokens"))
        return int(min(limit for limit in limits if limit is not None))

    def _sampling(
        self,
        body: GenerationFields,
        max_tokens: int,
        number: int,
        num_logprobs: int | None,
        num_prompt_logprobs: int | None,
        bad_words: tuple[tuple[int, ...], ...],
        constraint: str | None,
    ) -> SamplingParams:
        """number: the choice's place among those of its prompt; each draws from a seed of its own."""
        if body.min_tokens > max_tokens:
            raise RequestError(f"min_tokens: is above max_tokens, {max_tokens}", "min_tokens")
        if num_logprobs is not None and num_logprobs > FEW_LOGPROBS:
            entries = num_logprobs * max_tokens
            if entries > MAX_LOGPROBS_OF_CHOICE:
                raise RequestError(
                    f"logprobs: {entries} of {max_tokens} tokens; at most {MAX_LOGPROBS_OF_CHOICE} beyond "
                    f"{FEW_LOGPROBS} of each, ask for fewer or lower max_tokens",
                    "logprobs",
                )
        seed = self._seeds.getrandbits(63) if body.seed is None else body.seed + number
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            temperature=self._value(body, "temperature", 1.0),
            top_p=self._value(body, "top_p", 1.0),
            top_k=max(0, int(self._value(body, "top_k", 0))),
            min_p=self._value(body, "min_p", 0.0),
            repetition_penalty=self._value(body, "repetition_penalty", 1.0),
            presence_penalty=self._value(body, "presence_penalty", 0.0),
            frequency_penalty=self._value(body, "frequency_penalty", 0.0),
            logit_bias=self._logit_bias(body.logit_bias or {}),
            logprobs=num_logprobs,
            prompt_logprobs=num_prompt_logprobs,
            stop_token_ids=self._token_ids(body.stop_token_ids or (), "stop_token_ids"),
            allowed_token_ids=(
                None
                if body.allowed_token_ids is None
                else self._token_ids(body.allowed_token_ids, "allowed_token_ids")
            ),
            bad_words=bad_words,
            min_tokens=body.min_tokens,
            ignore_eos=body.ignore_eos,
            constraint=constraint,
        )

    def _value(self, body: GenerationFields, name: str, default: float) -> float:
        given = getattr(body, name)
        return self._settings.default_sampling.get(name, default) if given is None else given

    def _token_ids(self, token_ids: Sequence[int], field: str) -> tuple[int, ...]:
        self.check_ids(token_ids, field)
        return tuple(dict.fromkeys(token_ids))

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word's tokens, as vLLM has them: at the beginning of a text, and after a space where that makes another token."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip()
            plain, spaced = (tuple(self._tokenizer.encode(text, False)) for text in (bare, f" {bare}"))
            if not plain:
                raise RequestError(f"bad_words: {word!r} has no token", "bad_words")
            sequences[plain] = None
            if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                sequences[spaced] = None
        return tuple(sequences)

    def _logit_bias(self, given: dict[str, float]) -> dict[int, float]:
        bound = self._settings.vocab_size
        digits = len(str(bound))  # int() itself refuses thousands of them
        if not all(
            key.isascii() and key.isdigit() and len(key) <= digits and int(key) < bound for key in given
        ):
            raise RequestError(f"logit_bias: its keys are token ids, 0 to {bound - 1}", "logit_bias")
        return {int(key): bias for key, bias in given.items()}

"""A request inside its replica: its tokens so far, its blocks, and when it ends.

What lives here: the state that the scheduler keeps per request, what it refuses, and the finish rules. What does not:
any choice between requests (scheduler.py) and how tokens are chosen (attention/sampler.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from afd_server.errors import PromptTooLongError, RequestError
from afd_server.types import (
    FinishReason,
    GenerationRequest,
    PromptReport,
    RequestOutput,
    SampledToken,
    ScheduledRequest,
    StartedRequest,
    TokenLogprobs,
)

# Whether the model knows an id is the front-end's to check; this is what the account of blocks can take.
LARGEST_TOKEN_ID = 2**31 - 1


@dataclass(slots=True, eq=False)
class RequestState:
    """One request from its arrival to its end.

    token_ids: prompt and output. num_computed: how many of them are in the KV cache; num_scheduled: how many more the
    step under way puts there. blocks: held ones, in order. keys: of the full blocks of token_ids, as far as they were
    needed; num_registered: how many of them the prefix cache has been told. cached_tokens: prompt tokens that the prefix
    cache had when the request was first admitted, None before. num_reported: prompt tokens whose log-probabilities have
    been given, here or by another replica. arrival: its place in the order of arrival.
    first_token_at: when this replica gave its first token, in the clock of whoever promises a pace (pace.py).
    """

    request: GenerationRequest
    token_ids: list[int]
    num_computed: int = 0
    num_scheduled: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    cached_tokens: int | None = None
    num_reported: int = 0
    has_reported: bool = False
    arrival: int = 0
    first_token_at: float | None = None

    @classmethod
    def accept(cls, request: GenerationRequest, max_model_len: int, arrival: int = 0) -> RequestState:
        """The state of a request that arrives. Raises RequestError for one with nothing to do."""
        known = len(request.prompt_token_ids) + len(request.resumed_output_token_ids)
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty", "prompt")
        if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) <= LARGEST_TOKEN_ID:
            raise RequestError("the prompt has token ids that no model knows", "prompt")
        only_reads = request.sampling.max_tokens == 0 and request.sampling.prompt_logprobs is not None
        if known + (not only_reads) > max_model_len:
            raise PromptTooLongError(
                f"{known} tokens leave no room for output within the {max_model_len} of this server"
            )
        if request.sampling.max_tokens <= len(request.resumed_output_token_ids) and not only_reads:
            raise RequestError(
                f"max_tokens is {request.sampling.max_tokens}: there is nothing to generate", "max_tokens"
            )
        token_ids = [*request.prompt_token_ids, *request.resumed_output_token_ids]
        return cls(request, token_ids, arrival=arrival, num_reported=request.resumed_prompt_logprobs)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that are not in the KV cache: 1 while decoding, more while the prompt is being read."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output(self) -> int:
        """Output tokens, those of another replica included."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_unreported(self) -> int:
        """Prompt tokens whose log-probabilities are still to be given."""
        wanted = 0 if self.request.sampling.prompt_logprobs is None else self.num_prompt - 1
        return max(0, wanted - self.num_reported)

    @property
    def reported_entries(self) -> int:
        """What is reported with each prompt token that is read; 0 where nothing is."""
        return 1 + (self.request.sampling.prompt_logprobs or 0) if self.num_unreported else 0

    @property
    def was_admitted(self) -> bool:
        """It has run, here or on a replica that died: it does not ask for admission again."""
        return self.cached_tokens is not None or bool(self.request.resumed_output_token_ids)

    def forget_computed(self) -> None:
        """It has been preempted: everything is to be computed again. The caller has released its blocks."""
        self.blocks, self.num_computed = [], 0

    def scheduled(self) -> ScheduledRequest:
        """Its part in the step under way."""
        end = self.num_computed + self.num_scheduled
        return ScheduledRequest(
            self.request_id,
            self.num_computed,
            tuple(self.token_ids[self.num_computed : end]),
            tuple(self.blocks),
            samples=end == len(self.token_ids) and self.request.sampling.max_tokens > 0,
            report=self._report(end) if self.num_unreported else None,
        )

    def _report(self, end: int) -> PromptReport | None:
        """Of the step that reads as far as `end`."""
        first = max(self.num_computed, self.num_reported)
        token_ids = self.request.prompt_token_ids[first + 1 : end + 1]
        if not token_ids:
            return None
        return PromptReport(first - self.num_computed, token_ids, self.request.sampling.prompt_logprobs or 0)

    def started(self) -> StartedRequest:
        """What the sampler must know of it."""
        return StartedRequest(
            self.request_id,
            self.request.prompt_token_ids,
            tuple(self.token_ids[self.num_prompt :]),
            self.request.sampling,
        )

    def read(self, prompt_logprobs: tuple[TokenLogprobs, ...]) -> RequestOutput | None:
        """A step without a token is over. Gives what the client is to know of it; None: nothing."""
        self.num_reported += len(prompt_logprobs)
        ends = self.num_uncomputed == 0  # otherwise it would have a token
        if not (ends or prompt_logprobs):
            return None
        reason = FinishReason.LENGTH if ends else None
        return RequestOutput(self.request_id, finish_reason=reason, prompt_logprobs=prompt_logprobs)

    def append(
        self,
        sampled: SampledToken,
        eos_token_ids: Collection[int],
        max_model_len: int,
        prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> RequestOutput:
        """Takes the next token in and gives what the client is to know of it."""
        if sampled.error is not None:
            return RequestOutput(self.request_id, finish_reason=FinishReason.ERROR, error=sampled.error)
        self.num_reported += len(prompt_logprobs)
        token_id = sampled.token_id
        self.token_ids.append(token_id)
        reason = self._finish_reason(token_id, eos_token_ids, max_model_len)
        cached_tokens = 0 if self.has_reported else (self.cached_tokens or 0)
        self.has_reported = True
        return RequestOutput(
            self.request_id,
            (token_id,),
            () if sampled.logprobs is None else (sampled.logprobs,),
            reason,
            stop_token_id=token_id if reason is FinishReason.STOP else None,
            cached_tokens=cached_tokens,
            prompt_logprobs=prompt_logprobs,
        )

    def _finish_reason(
        self, token_id: int, eos_token_ids: Collection[int], max_model_len: int
    ) -> FinishReason | None:
        sampling = self.request.sampling
        num_output = self.num_output
        ends = token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos)
        # Under a constraint the sampler holds an end back only while there is anything else to say.
        if ends and (num_output > sampling.min_tokens or sampling.constraint is not None):
            return FinishReason.STOP
        if num_output >= sampling.max_tokens or len(self.token_ids) >= max_model_len:
            return FinishReason.LENGTH
        return None

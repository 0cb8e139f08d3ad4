"""The nouns that cross rooms: what a request is, what a step is asked to do, what it gave back.

Pure data on the standard library alone, so that decisions (scheduler, router, planner) can be tested in milliseconds
and every message can be encoded without pickle. Positions and lengths count tokens; `_s` is seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a request ended. The first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. vLLM's names and meanings.

    seed: always set (the front-end draws one when the client gives none). The random number for output token i is a
        function of (seed, i) alone, so a request can move between steps, batches and replicas.
    top_k: 0 keeps the whole vocabulary.
    logprobs: None reports none; k reports the chosen token and the k most likely ones.
    prompt_logprobs: the same for the prompt's tokens, from the second on. With max_tokens 0 that is all there is to do.
    allowed_token_ids: None allows all. bad_words: sequences of tokens; none of them is completed in the output.
    stop_token_ids: end the request as eos does. `ignore_eos` touches the model's eos only, `min_tokens` holds back both.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue, as the router hands it to an attention replica.

    resumed_output_token_ids: output that another replica produced before it died. It counts as output everywhere
    (positions of random numbers, max_tokens, min_tokens, penalties) and is not sent again.
    resumed_prompt_logprobs: how many of the prompt's log-probabilities came from there. They are not sent again either.
    priority: where requests queue, the lower value goes first. vLLM's name and meaning.
    tenant: who asks, for fairness between them: the identity of an API key and never the key; "" without one.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    resumed_output_token_ids: tuple[int, ...] = ()
    resumed_prompt_logprobs: int = 0
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, before temperature and truncation.

    top: the most likely (token id, logprob), as many as the request asked for, most likely first. rank: the token's place
    among all, 1 for the most likely one; of prompt tokens only.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step (or the end) of a request gave: the new tokens only, never those sent before.

    logprobs: one entry per new token when the request asked for them, else empty.
    stop_token_id: the token that ended the request when finish_reason is STOP. It is the last of token_ids.
    cached_tokens: prompt tokens that were found in the prefix cache; set on the first output.
    error: the sentence to show when finish_reason is ERROR.
    prompt_logprobs: of prompt tokens, in their order from the second on, when the request asked for them: those that the
        step came to. All have come before the first new token, or with it.
    prefill_s: from the first step that the request was in to the end of the one that gave its first token; set on the first
        output.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Of one request, in monotonic seconds of this process. What it has not come to is None.

    scheduled_s: when its attention worker first had it in a step. first_token_s and last_token_s: when they came here.
    """

    arrived_s: float
    scheduled_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    ended_s: float


@dataclass(frozen=True, slots=True)
class PromptReport:
    """Prompt tokens whose log-probabilities a step reports.

    token_ids: the prompt's tokens, each after one of the request's tokens in the step; the first of them after the one in
    place `first`. num_top: how many of the most likely tokens are reported with each.
    """

    first: int
    token_ids: tuple[int, ...]
    num_top: int


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's part in one step.

    start_position: how many of its tokens are in the KV cache already; token_ids follow them.
    block_table: the request's KV blocks in order, enough for start_position + len(token_ids) tokens.
    samples: whether the last of token_ids is the last known token, so that the step yields the next one.
    report: of the prompt, where the request asked for one.
    """

    request_id: str
    start_position: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    samples: bool
    report: PromptReport | None = None

    @property
    def num_logits(self) -> int:
        """Rows for which the next token's distribution is computed."""
        return self.samples + (0 if self.report is None else len(self.report.token_ids))


@dataclass(frozen=True, slots=True)
class StartedRequest:
    """What the sampler must know before a request's first sample: here or after it comes back from preemption."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The scheduler's word to the attention worker: pure data, no tensors, everything one step needs.

    micro_batches: each is run as one coroutine; no request is in two of them.
    started: requests whose sampling state the worker must create, in this step or before it.
    finished: requests whose sampling state it may forget (ended, aborted or preempted).
    """

    step: int
    micro_batches: tuple[tuple[ScheduledRequest, ...], ...]
    started: tuple[StartedRequest, ...] = ()
    finished: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(request.token_ids) for batch in self.micro_batches for request in batch)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one request."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """What a PromptReport asked for: an entry for each of its tokens."""

    request_id: str
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Where the time of one step went, in seconds, summed over its hops (one hop = one layer of one micro-batch).

    attention_s: computing on the attention worker. ffn_s: computing on the FFN workers (the slowest shard per hop).
    wire_s: round trips less the FFN's computing and queueing, as far as the attention worker did nothing else meanwhile.
    bubble_s: the attention worker handed calls over or stood still, waiting.
    ffn_rows: rows of the batches that the FFN workers ran for this step's calls, merged with other replicas' calls.
    period_s: from the end of the step before, or the moment there was work again, to the end of this one: what a decoding
        request waits for its token. predicted_s: what the engine had expected of it; 0 when it expected nothing.
    num_resent: calls that were sent again, because a worker was lost or failed.
    """

    total_s: float
    attention_s: float = 0.0
    ffn_s: float = 0.0
    wire_s: float = 0.0
    bubble_s: float = 0.0
    num_hops: int = 0
    num_micro_batches: int = 1
    num_tokens: int = 0
    ffn_rows: int = 0
    period_s: float = 0.0
    predicted_s: float = 0.0
    num_resent: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The attention worker's answer to a StepPlan."""

    step: int
    tokens: tuple[SampledToken, ...]
    timing: StepTiming
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class StepForecast:
    """What a replica expects of its steps under a TPOT promise: a line through its model of step time, in seconds.

    A step of n decoding requests and p prompt tokens takes base_s + n * request_s + p * prompt_token_s; it may take
    limit_s. max_requests: as many may run at once.
    """

    limit_s: float
    base_s: float
    request_s: float
    prompt_token_s: float
    max_requests: int


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """An attention replica's state after a step, for the router's choice and for the metrics.

    The counters (num_preemptions, prefix_cache_*_tokens) only grow; the rest are current values.
    forecast: None without a TPOT promise, and before anything was measured.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    prefix_cache_queried_tokens: int = 0
    prefix_cache_hit_tokens: int = 0
    timing: StepTiming | None = None
    forecast: StepForecast | None = None


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker as operators see it. role: attention or ffn. state: loading, serving, draining, restarting or down.

    since_s: how long it has been in that state. node and pid: where its process is, as far as is known. restarts: how often
    its process has been started again. reason: why it is down.
    """

    name: str
    role: str
    state: str
    since_s: float
    node: str | None
    pid: int | None
    restarts: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class HopSpan:
    """A stretch of time in a worker's life, began_s to ended_s, spent for one layer of one micro-batch of a step.

    name, in an attention worker: "attention" (computing a layer's part), "send" (handing the call over; none where a kernel makes the
    hops by itself), "bubble" (its thread waits for an answer), "sampling" (the LM head and the choice of tokens: no layer, -1), and beside its thread, one for each FFN worker that is
    asked: "call" (from handing it over to its answer), in it "wire out" and "wire back".
    In an FFN worker: "queue" (the call is there, the worker at something else) and "ffn" (computing it).
    peer: the worker that the call goes to, or comes from. rows: of the call, tokens; 0 where there is none.
    Seconds of a monotonic clock, of the front-end where spans of several workers stand beside one another.
    """

    name: str
    began_s: float
    ended_s: float
    step: int
    layer: int
    micro_batch: int
    peer: str = ""
    rows: int = 0


@dataclass(frozen=True, slots=True)
class WorkerTrace:
    """Every hop of one worker in a window of time, by when it began. num_missing: of spans that there was no room for."""

    worker: str
    role: str
    spans: tuple[HopSpan, ...]
    num_missing: int = 0


@dataclass(frozen=True, slots=True)
class LayerTotal:
    """Sums of a layer's share of a worker's work: seconds of computing, batches that were computed, and their rows."""

    seconds: float = 0.0
    batches: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class WaitTotal:
    """Sums of an attention worker's calls to one FFN worker: how many were answered, the seconds that it computed them and that they
    lay there before, by its own word, and those that the caller's thread stood waiting for it, beyond its wait for those asked before."""

    worker: str
    calls: int = 0
    ffn_s: float = 0.0
    queue_s: float = 0.0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerTotals:
    """What a worker has done since it was loaded: sums that only grow.

    layers: by layer, an attention worker's own computing or an FFN worker's. waits: of an attention worker. expert_tokens: of an
    FFN worker, by layer: how often each of its experts was chosen, from number first_expert on; empty for a worker whose experts
    another one of its replica counts as well.
    """

    worker: str
    role: str
    layers: tuple[LayerTotal, ...] = ()
    waits: tuple[WaitTotal, ...] = ()
    first_expert: int = 0
    expert_tokens: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaUpdate:
    """One message from an attention replica to its router: all that a step changed, in one go."""

    outputs: tuple[RequestOutput, ...]
    stats: ReplicaStats

"""What runs in each step: which requests, how many tokens of each, in which KV blocks, in which micro-batch.

What lives here: continuous batching and its account. What does not: tensors and the KV cache behind the blocks, the
sampler, threads (loop.py), and how many micro-batches are best (micro_batches.py). Called by engine.py: `schedule`
makes a plan, then either `complete` takes its result or `fail_step` says that there is none; everything else comes
between two steps.

The rules, in order. First come, first served: nobody is admitted before one who came earlier. A step first gives every
decoding request its one token, then fills the rest of its budget with prompts: tokens, and under a promise of time per
token also seconds (pace.py). A request is admitted when the blocks for all of its known tokens are free, so reading a
prompt never stops half-way for want of blocks, and when there is room for its pace too, unless it has been admitted before.

A decoding request that needs a block when none is free takes those of the request that is cheapest to compute again,
itself included, but never of the oldest that runs: that one is preempted, and computed again when there is room. Nobody
starves. While the oldest request of all waits, nobody else is admitted; of those that run the oldest is never preempted,
so it ends, and then the next; at last the one that waits fits, since a request of full length fits the cache alone. Once it
runs it is the oldest that runs, and of the time of a step that is left for prompts, which is never none, its own gets all.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter

from afd_server.config import ServeConfig
from afd_server.engine.micro_batches import divide
from afd_server.engine.pace import Pace, StepBudget
from afd_server.engine.request_state import RequestState
from afd_server.engine.step_time import StepTimeModel
from afd_server.errors import RequestError
from afd_server.kvcache.block_pool import BlockPool, extend_keys
from afd_server.types import (
    FinishReason,
    GenerationRequest,
    ReplicaStats,
    RequestOutput,
    SampledToken,
    StepOutput,
    StepPlan,
    StepTiming,
    TokenLogprobs,
)


class Scheduler:
    """All requests of one attention replica. Used by one thread. `config` is a resolved one.

    pace: the promise to keep; without it there is none.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        num_blocks: int,
        eos_token_ids: Sequence[int],
        pace: Pace | None = None,
    ) -> None:
        assert config.max_model_len is not None
        assert num_blocks * config.block_size >= config.max_model_len, "one request of full length must fit"
        self._max_model_len = config.max_model_len
        self._max_running = config.max_num_seqs
        self._max_step_tokens = config.max_num_batched_tokens
        self._chunked_prefill = config.enable_chunked_prefill
        self._eos_token_ids = frozenset(eos_token_ids)
        self._pace = pace or Pace(None, config.max_num_seqs, StepTimeModel())
        self._pool = BlockPool(num_blocks, config.block_size, config.enable_prefix_caching)
        # Both in order of arrival.
        self._running: list[RequestState] = []
        self._waiting: deque[RequestState] = deque()
        self._requests: dict[str, RequestState] = {}
        self._step = 0
        self._under_way: StepPlan | None = None
        self._to_forget: list[str] = []
        self._num_arrivals = 0
        self._num_preemptions = 0
        self._queried_tokens = 0
        self._hit_tokens = 0

    # --- requests come and go, between steps -----------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: GenerationRequest) -> None:
        """Queues a request. Raises RequestError for one with nothing to do, or whose id is taken."""
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id} is in use already", "request_id")
        state = RequestState.accept(request, self._max_model_len, self._num_arrivals)
        self._num_arrivals += 1
        self._requests[request.request_id] = state
        self._waiting.append(state)

    def abort(self, request_id: str) -> list[RequestOutput]:
        """Ends a request and frees its blocks. Gives its last output; nothing when it is not here (any more)."""
        assert self._under_way is None, "requests are aborted between steps"
        state = self._requests.get(request_id)
        if state is None:
            return []
        self._remove(state)
        return [RequestOutput(request_id, finish_reason=FinishReason.ABORT)]

    def abort_all(self) -> list[RequestOutput]:
        """Ends every request."""
        return [output for request_id in list(self._requests) for output in self.abort(request_id)]

    # --- one step --------------------------------------------------------------------------------------------------

    def schedule(self, choose_micro_batches: Callable[[Sequence[int]], int]) -> StepPlan | None:
        """The next step, None when there is no request.

        choose_micro_batches: from the number of tokens of each request in the step to the number of micro-batches.
        """
        assert self._under_way is None, "the last step has neither been completed nor failed"
        if not self.has_work:
            return None
        decoding = [state for state in self._running if state.num_uncomputed == 1]
        budget = self._pace.begin_step(self._max_step_tokens, decoding)
        self._schedule_decodes(decoding, budget)
        self._schedule_prefills(budget)
        admitted = self._admit(budget)
        scheduled = [state for state in self._running if state.num_scheduled]
        assert scheduled, "requests wait and none can run"
        num_tokens = [state.num_scheduled for state in scheduled]
        self._step += 1
        self._under_way = StepPlan(
            self._step,
            tuple(
                tuple(scheduled[index].scheduled() for index in micro_batch)
                for micro_batch in divide(num_tokens, choose_micro_batches(num_tokens))
            ),
            started=tuple(state.started() for state in admitted),
            finished=tuple(self._to_forget),
        )
        self._to_forget = []
        return self._under_way

    def complete(self, output: StepOutput) -> list[RequestOutput]:
        """Takes in what the step gave: one output for each request that got something, ended or not."""
        plan = self._under_way
        assert plan is not None and output.step == plan.step, f"no step {output.step} is under way"
        sampled = {token.request_id: token for token in output.tokens}
        asked = {part.request_id for part in chain.from_iterable(plan.micro_batches) if part.samples}
        assert sampled.keys() == asked, "the worker sampled other requests than the plan asked for"
        reports = {report.request_id: report.logprobs for report in output.prompt_logprobs}
        wanted = {part.request_id for part in chain.from_iterable(plan.micro_batches) if part.report}
        assert reports.keys() == wanted, "the worker reported other prompts than the plan asked for"
        self._under_way = None
        self._pace.note_tokens(self._requests[request_id] for request_id in asked)
        outputs = []
        for part in chain.from_iterable(plan.micro_batches):
            state = self._requests[part.request_id]
            state.num_computed += state.num_scheduled
            state.num_scheduled = 0
            self._register_full_blocks(state)
            news = self._take_in(state, sampled.get(part.request_id), reports.get(part.request_id, ()))
            if news is not None:
                outputs.append(news)
                if news.finish_reason is not None:
                    self._pace.note_end(state)
                    self._remove(state)
        return outputs

    def _take_in(
        self, state: RequestState, token: SampledToken | None, prompt_logprobs: tuple[TokenLogprobs, ...]
    ) -> RequestOutput | None:
        """What a step gave one request."""
        if token is None:
            return state.read(prompt_logprobs)
        return state.append(token, self._eos_token_ids, self._max_model_len, prompt_logprobs)

    def fail_step(self, error: str) -> list[RequestOutput]:
        """Ends the requests of the step under way with this sentence; of all requests, when there was no plan yet.

        What the step wrote into the KV cache is unknown, but only these requests hold those blocks, and the prefix
        cache has not been told of them.
        """
        if self._under_way is None:
            failed = list(self._requests)
        else:
            plan, self._under_way = self._under_way, None
            failed = [part.request_id for part in chain.from_iterable(plan.micro_batches)]
            self._to_forget = list(plan.finished)  # the worker may not have come to it
        for request_id in failed:
            self._remove(self._requests[request_id])
        return [RequestOutput(name, finish_reason=FinishReason.ERROR, error=error) for name in failed]

    # --- the account -----------------------------------------------------------------------------------------------

    def stats(self, timing: StepTiming | None = None) -> ReplicaStats:
        """The replica's state now. timing: of the step that led to it."""
        return ReplicaStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=self._pool.num_blocks,
            num_free_blocks=self._pool.num_free,
            num_preemptions=self._num_preemptions,
            prefix_cache_queried_tokens=self._queried_tokens,
            prefix_cache_hit_tokens=self._hit_tokens,
            timing=timing,
            forecast=self._pace.forecast(),
        )

    def check(self) -> None:
        """Raises BlockAccountError unless every block is free or held by a request."""
        self._pool.check(state.blocks for state in self._requests.values())

    # --- inside a step ---------------------------------------------------------------------------------------------

    def _schedule_decodes(self, decoding: Sequence[RequestState], budget: StepBudget) -> None:
        """One token for each decoding request, oldest first."""
        for state in decoding:
            if budget.tokens == 0:
                break
            if state not in self._running:
                continue  # preempted for another one
            if self._needs_block(state):
                if not self._make_room(state):
                    continue
                state.blocks += self._pool.allocate(1)
            self._schedule(state, 1, budget)

    def _schedule(self, state: RequestState, num_tokens: int, budget: StepBudget) -> None:
        state.num_scheduled = num_tokens
        ends = num_tokens == state.num_uncomputed
        budget.take(state.num_computed, num_tokens, ends, state.reported_entries)

    def _make_room(self, state: RequestState) -> bool:
        """Preempts the cheapest requests until a block is free; False when `state` itself had to go.

        None that is in the step already: decodes are scheduled oldest first, before any prompt, so whoever comes after
        `state` is not, and the oldest that runs is never a candidate but for itself, which finds all others.
        """
        while self._pool.num_free == 0:
            others = [other for other in self._running[1:] if not other.num_scheduled]
            victim = min(others, key=self._cost_of_preempting)
            self._preempt(victim)
            if victim is state:
                return False
        return True

    def _cost_of_preempting(self, state: RequestState) -> tuple[bool, int, int]:
        """The tokens to compute again: those in blocks that nobody else holds, since these are wanted by others now.

        One that frees nothing comes last, and of equals the latest first.
        """
        num_freed = self._pool.num_held_once(state.blocks)
        num_kept = (len(state.blocks) - num_freed) * self._pool.block_size
        return num_freed == 0, state.num_computed - num_kept, -state.arrival

    def _needs_block(self, state: RequestState) -> bool:
        return state.num_computed == len(state.blocks) * self._pool.block_size

    def _schedule_prefills(self, budget: StepBudget) -> None:
        """What is left of prompts that are being read, oldest first. Their blocks are theirs since they were admitted."""
        for state in self._running:
            if state.num_uncomputed > 1:
                fitting = budget.fitting(state.num_computed, state.num_uncomputed, state.reported_entries)
                self._schedule(state, fitting, budget)
                if fitting < state.num_uncomputed:
                    budget.close()

    def _admit(self, budget: StepBudget) -> list[RequestState]:
        """Moves waiting requests into the step while budget, places, blocks and the pace allow."""
        admitted = []
        while self._waiting and budget.tokens and len(self._running) < self._max_running:
            state = self._waiting[0]
            cached = self._find_cached(state)
            num_cached = len(cached) * self._pool.block_size
            num_uncomputed = len(state.token_ids) - num_cached
            fitting = budget.fitting(num_cached, num_uncomputed, state.reported_entries)
            # A prompt that is reported may be cut in any case: its report has a bound of its own.
            in_parts = self._chunked_prefill or state.reported_entries
            if fitting == 0 or (fitting < num_uncomputed and not in_parts):
                break
            num_new = -(-len(state.token_ids) // self._pool.block_size) - len(cached)
            if num_new + self._pool.num_free_among(cached) > self._pool.num_free:
                break
            if not self._pace.has_room(self._running, state):
                break
            self._waiting.popleft()
            self._pool.take(cached)
            state.blocks = cached + self._pool.allocate(num_new)
            state.num_computed = num_cached
            state.num_registered = len(cached)
            self._count_cached(state)
            self._schedule(state, fitting, budget)
            insort(self._running, state, key=attrgetter("arrival"))
            admitted.append(state)
            if fitting < num_uncomputed:
                budget.close()
        return admitted

    def _find_cached(self, state: RequestState) -> list[int]:
        if not self._pool.enable_prefix_caching:
            return []
        extend_keys(state.keys, state.token_ids, self._pool.block_size)
        found = self._pool.find_prefix(state.keys, len(state.token_ids))
        # What is to be reported of the prompt has to be computed.
        return found[: state.num_reported // self._pool.block_size] if state.num_unreported else found

    def _count_cached(self, state: RequestState) -> None:
        """Once per request: what it finds again after a preemption is its own."""
        if state.cached_tokens is None:
            state.cached_tokens = min(state.num_computed, state.num_prompt)
            if self._pool.enable_prefix_caching:
                self._queried_tokens += state.num_prompt
                self._hit_tokens += state.cached_tokens

    def _preempt(self, state: RequestState) -> None:
        self._running.remove(state)
        self._pool.release(state.blocks)
        state.forget_computed()
        self._to_forget.append(state.request_id)
        self._waiting.insert(bisect(self._waiting, state.arrival, key=attrgetter("arrival")), state)
        self._num_preemptions += 1

    def _register_full_blocks(self, state: RequestState) -> None:
        if not self._pool.enable_prefix_caching:
            return
        num_full = state.num_computed // self._pool.block_size
        if num_full > len(state.keys):
            extend_keys(state.keys, state.token_ids, self._pool.block_size)
        for index in range(state.num_registered, num_full):
            self._pool.register(state.blocks[index], state.keys[index])
        state.num_registered = max(state.num_registered, num_full)

    def _remove(self, state: RequestState) -> None:
        """It has ended: nothing of it stays but the prefixes it leaves in the cache."""
        del self._requests[state.request_id]
        if state in self._running:
            self._running.remove(state)
            self._to_forget.append(state.request_id)
        else:
            self._waiting.remove(state)
        self._pool.release(state.blocks)
